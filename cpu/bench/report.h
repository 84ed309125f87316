// Measurements as lines of JSON.
#pragma once

#if !defined(_WIN32)
#include <sys/utsname.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <string>
#include <vector>

#include "cases.h"
#include "compiler.h"
#include "options.h"

namespace fdk::bench {

inline double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  const double at = q * static_cast<double>(values.size() - 1);
  const auto low = static_cast<size_t>(at);
  const size_t high = std::min(low + 1, values.size() - 1);
  return values[low] + (at - static_cast<double>(low)) * (values[high] - values[low]);
}

inline std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0 || line.rfind("Hardware", 0) == 0)
      return line.substr(line.find(':') + 2);
#if defined(_WIN32)
  const char *name = std::getenv("PROCESSOR_IDENTIFIER");
  return name == nullptr ? "unknown" : name;
#else
  utsname name{};
  uname(&name);
  return name.machine;
#endif
}

inline std::string quoted(const std::string &text) {
  std::string out = "\"";
  for (const char c : text)
    if (c == '"' || c == '\\') out += std::string("\\") + c;
    else if (static_cast<unsigned char>(c) >= 0x20) out += c;
  return out + "\"";
}

// An object of JSON in the making. What is empty, zero or not finite is left out.
class Object {
 public:
  void add(const char *key, const std::string &text) {
    if (!text.empty()) add_raw(key, quoted(text));
  }
  void add(const char *key, int64_t value) {
    if (value != 0) add_raw(key, std::to_string(value));
  }
  void add(const char *key, double value) {
    if (std::isfinite(value)) add_raw(key, number(value));
  }
  void add(const char *key, const std::vector<double> &values) {
    std::string list;
    for (const double value : values) list += (list.empty() ? "" : ", ") + number(value);
    add_raw(key, "[" + list + "]");
  }
  void add_raw(const char *key, const std::string &json) {
    text_ += (text_.empty() ? "" : ", ") + quoted(key) + ": " + json;
  }
  std::string text() const { return "{" + text_ + "}"; }

 private:
  static std::string number(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.6g", value);
    return text;
  }
  std::string text_;
};

struct Bounds {
  double copy_gb_s, read_gb_s;
};

// What was measured of a case. Rows are made of it by fdk_jax/benchmark/records.py, which knows
// their keys and what follows from samples.
inline std::string to_json(const Options &o, const Case &c, const Bounds &bounds) {
  char date[32];
  const std::time_t t = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S+00:00", std::gmtime(&t));
  Object versions;
  versions.add("compiler", std::string(kCompiler));
  versions.add("fdk_abi", int64_t{fdk_abi_version()});
  Object row;
  row.add("suite", o.suite);
  row.add("name", c.name);
  row.add("backend", c.backend);
  row.add("m", c.m);
  row.add("k", c.k);
  row.add("n", c.n);
  row.add("bits", c.bits);
  row.add("group_size", c.group_size);
  row.add("codebook", c.codebook);
  row.add("dtype", c.dtype);
  row.add("threads", c.threads);
  row.add("bytes_rw", static_cast<int64_t>(c.bytes));
  row.add_raw("ops", std::to_string(static_cast<int64_t>(c.ops)));  // a probe has none: 0
  row.add("samples_us", c.samples_us);
  row.add("rel_rms_error", c.error);
  row.add("copy_gb_s", bounds.copy_gb_s);
  row.add("read_gb_s", bounds.read_gb_s);
  row.add("device", o.device.empty() ? processor_name() : o.device);
  row.add_raw("versions", versions.text());
  row.add("digest", o.digest);
  row.add("date", std::string(date));
  row.add("arithmetic", c.arithmetic);
  row.add("isa", c.isa.empty() ? fdk_isa() : c.isa);
  row.add("kernel", c.kernel);
  row.add_raw("busy_cores", std::to_string(o.busy_cores));
  return row.text();
}

}  // namespace fdk::bench
