// The command line of the benchmark.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace fdk::bench {

struct Options {
  std::vector<int64_t> m{1}, k{4096}, n{}, bits{8, 4, 2, 1}, threads{};
  std::vector<std::string> arithmetic{"int8", "int16", "exact"}, codebook{"kmeans"};
  std::vector<std::string> isa{""};  // "": the one in use
  int64_t group_size = 64;
  int64_t rotate_mib = 0;  // default_rotate_mib()
  int64_t busy_cores = 0;
  int rounds = 15;
  double round_ms = 4.0;
  std::string dtype = "bfloat16", include = ".*", output, suite = "kernels", digest, device;
};

inline constexpr const char *kUsage =
    "usage: fdk_bench [--m 1,16] [--k 4096] [--n 4096] [--bits 8,4,2,1] [--group_size 64]\n"
    "  [--arithmetic int8,int16,exact] [--codebook kmeans,uniform] [--dtype bfloat16|float32]\n"
    "  [--isa amx,avx2]: every product on each of these instruction sets, in turns\n"
    "  [--threads 1,2] [--rounds 15] [--round_ms 4] [--rotate_mib MIB] [--include REGEX]\n"
    "  [--busy_cores 0]: that many processors are kept busy, and an equal split is timed as well\n"
    "  [--output FILE.jsonl] [--suite kernels|android] [--digest SOURCE] [--device NAME]\n"
    "  --digest: what `python fdk_jax/benchmark/source.py --digest` prints\n";

[[noreturn]] inline void fail(const std::string &message) {
  std::fprintf(stderr, "fdk_bench: %s\n", message.c_str());
  std::exit(2);
}

inline std::vector<std::string> split(const std::string &text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  if (parts.empty()) fail("an empty list");
  return parts;
}

inline int64_t to_int(const std::string &text) {
  char *end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < 1) fail("not a positive number: " + text);
  return value;
}

inline std::vector<int64_t> to_ints(const std::string &text) {
  std::vector<int64_t> values;
  for (const std::string &part : split(text)) values.push_back(to_int(part));
  return values;
}

// Three times what the largest cache holds: copies of a weight in turns come from memory.
inline int64_t default_rotate_mib() {
  int64_t largest = 85;
  for (int i = 0; i < 8; ++i) {
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/size");
    int64_t size = 0;
    char unit = 0;
    if (file >> size >> unit) largest = std::max(largest, unit == 'M' ? size : size >> 10);
  }
  return 3 * largest;
}

inline Options parse(int argc, char **argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    std::string name = argv[i];
    if (name == "--help" || name == "-h") {
      std::fputs(kUsage, stdout);
      std::exit(0);
    }
    std::string value;
    if (const size_t equals = name.find('='); equals != std::string::npos) {
      value = name.substr(equals + 1);
      name = name.substr(0, equals);
    } else if (i + 1 < argc) {
      value = argv[++i];
    } else {
      fail(name + " needs a value");
    }
    if (name == "--m") o.m = to_ints(value);
    else if (name == "--k") o.k = to_ints(value);
    else if (name == "--n") o.n = to_ints(value);
    else if (name == "--bits") o.bits = to_ints(value);
    else if (name == "--threads") o.threads = to_ints(value);
    else if (name == "--arithmetic") o.arithmetic = split(value);
    else if (name == "--isa") o.isa = split(value);
    else if (name == "--codebook") o.codebook = split(value);
    else if (name == "--group_size") o.group_size = to_int(value);
    else if (name == "--rotate_mib") o.rotate_mib = to_int(value);
    else if (name == "--busy_cores") o.busy_cores = to_int(value);
    else if (name == "--rounds") o.rounds = static_cast<int>(to_int(value));
    else if (name == "--round_ms") o.round_ms = static_cast<double>(to_int(value));
    else if (name == "--dtype") o.dtype = value;
    else if (name == "--include") o.include = value;
    else if (name == "--output") o.output = value;
    else if (name == "--suite") o.suite = value;
    else if (name == "--digest") o.digest = value;
    else if (name == "--device") o.device = value;
    else fail("unknown flag " + name + "\n" + kUsage);
  }
  if (o.rotate_mib == 0) o.rotate_mib = default_rotate_mib();
  if (o.dtype != "bfloat16" && o.dtype != "float32") fail("--dtype is bfloat16 or float32");
  return o;
}

}  // namespace fdk::bench
