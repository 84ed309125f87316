// Rows of the project's JSONL schema.
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
#include <sstream>
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

inline std::string number(double value) {
  if (!std::isfinite(value)) return "null";
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return text;
}

inline std::string quoted(const std::string &text) {
  if (text.empty()) return "null";
  std::string out = "\"";
  for (const char c : text)
    if (c == '"' || c == '\\') out += std::string("\\") + c;
    else if (static_cast<unsigned char>(c) >= 0x20) out += c;
  return out + "\"";
}

inline std::string integer(int64_t value) { return value == 0 ? "null" : std::to_string(value); }

struct Bounds {
  double copy_gb_s, read_gb_s;
};

inline std::string to_json(const Options &o, const Case &c, const Bounds &bounds) {
  const double count = static_cast<double>(c.samples_us.size());
  double mean = 0;
  for (const double s : c.samples_us) mean += s / count;
  double variance = 0;
  for (const double s : c.samples_us) variance += (s - mean) * (s - mean) / (count - 1);
  std::string samples;
  for (const double s : c.samples_us) samples += (samples.empty() ? "" : ", ") + number(s);
  char date[32];
  const std::time_t t = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%S+00:00", std::gmtime(&t));
  const bool weights = c.bits != 0;
  std::stringstream s;
  s << "{\"schema\": 2, \"suite\": " << quoted(o.suite) << ", \"name\": " << quoted(c.name)
    << ", \"backend\": " << quoted(c.backend) << ", \"m\": " << integer(c.m)
    << ", \"k\": " << integer(c.k) << ", \"n\": " << integer(c.n)
    << ", \"bits\": " << integer(c.bits) << ", \"group_size\": " << integer(c.group_size)
    << ", \"codebook\": " << quoted(c.codebook) << ", \"dtype\": " << quoted(c.dtype)
    << ", \"threads\": " << c.threads << ", \"bytes_rw\": " << static_cast<int64_t>(c.bytes)
    << ", \"ops\": " << static_cast<int64_t>(c.ops) << ", \"samples_us\": [" << samples
    << "], \"median_us\": " << number(quantile(c.samples_us, 0.5))
    << ", \"p95_us\": " << number(quantile(c.samples_us, 0.95)) << ", \"mean_us\": " << number(mean)
    << ", \"stderr_us\": " << number(std::sqrt(variance / count))
    << ", \"rel_rms_error\": " << number(c.error) << ", \"plain_rel_rms_error\": null"
    << ", \"copy_gb_s\": " << number(bounds.copy_gb_s)
    << ", \"read_gb_s\": " << number(bounds.read_gb_s)
    << ", \"bound_us\": " << number(weights ? c.bytes / bounds.read_gb_s * 1e-3 : std::nan(""))
    << ", \"device\": " << quoted(o.device.empty() ? processor_name() : o.device)
    << ", \"driver\": null, \"versions\": {\"compiler\": " << quoted(kCompiler)
    << ", \"fdk_abi\": " << fdk_abi_version() << "}, \"digest\": " << quoted(o.digest)
    << ", \"commit\": null, \"date\": " << quoted(date)
    << ", \"status\": \"ok\", \"reason\": null, \"arithmetic\": " << quoted(c.arithmetic)
    << ", \"isa\": " << quoted(c.isa.empty() ? fdk_isa() : c.isa)
    << ", \"kernel\": " << quoted(c.kernel) << ", \"busy_cores\": " << o.busy_cores << "}";
  return s.str();
}

}  // namespace fdk::bench
