// Benchmark of the library: bandwidth probes, dense bfloat16 and codebook products.
//
// All cases of a run take turns, round by round, so that a machine whose speed drifts treats them
// alike. Weights rotate through copies that no cache holds. Prints a table, and rows of the
// project's JSONL schema with --output.
#include <sys/utsname.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <regex>
#include <sstream>
#include <string>
#include <vector>

#include "fdk.h"
#include "layout.h"
#include "numeric.h"

namespace {

using fdk::kStepBytes;
using fdk::kTileRows;

struct Options {
  std::vector<int64_t> m{1}, k{4096}, n{}, bits{8, 4, 2, 1}, threads{};
  std::vector<std::string> arithmetic{"int8", "int16", "exact"}, codebook{"kmeans"};
  int64_t group_size = 64;
  int64_t rotate_mib = 256;
  int rounds = 15;
  double round_ms = 4.0;
  std::string dtype = "bfloat16", include = ".*", output, suite = "kernels", commit, device;
};

constexpr const char *kUsage =
    "usage: fdk_bench [--m 1,16] [--k 4096] [--n 4096] [--bits 8,4,2,1] [--group_size 64]\n"
    "  [--arithmetic int8,int16,exact] [--codebook kmeans,uniform] [--dtype bfloat16|float32]\n"
    "  [--threads 1,2] [--rounds 15] [--round_ms 4] [--rotate_mib 256] [--include REGEX]\n"
    "  [--output FILE.jsonl] [--suite kernels|android] [--commit HASH] [--device NAME]\n";

[[noreturn]] void fail(const std::string &message) {
  std::fprintf(stderr, "fdk_bench: %s\n", message.c_str());
  std::exit(2);
}

std::vector<std::string> split(const std::string &text) {
  std::vector<std::string> parts;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  if (parts.empty()) fail("an empty list");
  return parts;
}

int64_t to_int(const std::string &text) {
  char *end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < 1) fail("not a positive number: " + text);
  return value;
}

std::vector<int64_t> to_ints(const std::string &text) {
  std::vector<int64_t> values;
  for (const std::string &part : split(text)) values.push_back(to_int(part));
  return values;
}

Options parse(int argc, char **argv) {
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
    else if (name == "--codebook") o.codebook = split(value);
    else if (name == "--group_size") o.group_size = to_int(value);
    else if (name == "--rotate_mib") o.rotate_mib = to_int(value);
    else if (name == "--rounds") o.rounds = static_cast<int>(to_int(value));
    else if (name == "--round_ms") o.round_ms = static_cast<double>(to_int(value));
    else if (name == "--dtype") o.dtype = value;
    else if (name == "--include") o.include = value;
    else if (name == "--output") o.output = value;
    else if (name == "--suite") o.suite = value;
    else if (name == "--commit") o.commit = value;
    else if (name == "--device") o.device = value;
    else fail("unknown flag " + name + "\n" + kUsage);
  }
  if (o.dtype != "bfloat16" && o.dtype != "float32") fail("--dtype is bfloat16 or float32");
  return o;
}

// Memory that is aligned and touched.
struct Buffer {
  explicit Buffer(size_t bytes)
      : size(bytes), data(std::aligned_alloc(64, (bytes + 63) / 64 * 64), std::free) {
    if (data == nullptr) fail("out of memory: use a smaller --rotate_mib");
    std::memset(data.get(), 0, (bytes + 63) / 64 * 64);
  }
  Buffer copy() const {
    Buffer result(size);
    std::memcpy(result.data.get(), data.get(), size);
    return result;
  }
  template <typename T>
  T *as() const { return static_cast<T *>(data.get()); }
  size_t size;
  std::unique_ptr<void, void (*)(void *)> data;
};

std::mt19937_64 g_random(std::random_device{}());

void fill_random(const Buffer &buffer) {
  for (size_t i = 0; i + 8 <= buffer.size; i += 8) buffer.as<uint64_t>()[i / 8] = g_random();
}

// Values as large as those of a layer: x ~ N(0, 1), scales near 1 / sqrt(k).
void fill_normal(const Buffer &buffer, fdk_dtype dtype, float mean, float deviation) {
  std::normal_distribution<float> normal(mean, deviation);
  const size_t count = buffer.size / fdk::dtype_size(dtype);
  for (size_t i = 0; i < count; ++i)
    fdk::store_from_f32(buffer.as<void>(), dtype, static_cast<int64_t>(i), normal(g_random));
}

struct Case {
  std::string name, backend = "cpu", codebook, dtype = "bfloat16", arithmetic, kernel;
  int64_t m = 0, k = 0, n = 0, bits = 0, group_size = 0, threads = 1;
  double bytes = 0, ops = 0, error = std::nan("");
  std::function<void(int64_t)> call;  // argument: number of the copy
  std::vector<double> samples_us;
};

void check(fdk_status status) {
  if (status != FDK_OK) fail(fdk_last_error());
}

// --- codebook products -------------------------------------------------------------------------

struct Weights {
  std::vector<Buffer> packed, scales;
  Buffer codebook;
  int64_t copies;
};

std::shared_ptr<Weights> make_weights(const Options &o, int64_t n, int64_t k, int bits,
                                      const std::string &kind) {
  size_t packed_bytes = 0;
  size_t scales = 0;
  check(fdk_tiled_packed_bytes(n, k, bits, &packed_bytes));
  check(fdk_tiled_scales_count(n, k, o.group_size, &scales));
  const size_t one = packed_bytes + scales * 2;
  const auto copies = static_cast<int64_t>((static_cast<size_t>(o.rotate_mib) << 20) / one) + 2;
  auto weights = std::make_shared<Weights>(
      Weights{{}, {}, Buffer(sizeof(float) << bits), copies});
  fill_random(weights->packed.emplace_back(packed_bytes));
  fill_normal(weights->scales.emplace_back(scales * 2), FDK_BF16,
              1.0F / std::sqrt(static_cast<float>(k)), 0.1F / std::sqrt(static_cast<float>(k)));
  for (int64_t i = 1; i < copies; ++i) {
    weights->packed.push_back(weights->packed[0].copy());
    weights->scales.push_back(weights->scales[0].copy());
  }
  const int count = 1 << bits;
  for (int q = 0; q < count; ++q) {
    const float line = (2.0F * static_cast<float>(q) + 1.0F) / static_cast<float>(count) - 1.0F;
    // Like the centroids of a bell-shaped density: closer together in the middle.
    weights->codebook.as<float>()[q] =
        kind == "uniform" ? line : 0.5F * line + 0.5F * line * std::fabs(line);
  }
  return weights;
}

struct Product {
  fdk_weight weight{};
  fdk_matmul_args args{};
};

Product make_product(const Case &c, const Weights &w, int64_t copy, const Buffer &x,
                     const Buffer &y) {
  Product p;
  p.weight.struct_size = sizeof p.weight;
  p.weight.out_features = c.n;
  p.weight.in_features = c.k;
  p.weight.bits = static_cast<int32_t>(c.bits);
  p.weight.uniform = c.codebook == "uniform";
  p.weight.group_size = c.group_size;
  p.weight.packed = w.packed[static_cast<size_t>(copy)].as<uint8_t>();
  p.weight.packed_bytes = w.packed[0].size;
  p.weight.scales = w.scales[static_cast<size_t>(copy)].as<void>();
  p.weight.scales_bytes = w.scales[0].size;
  p.weight.scales_dtype = FDK_BF16;
  p.weight.codebook = w.codebook.as<float>();
  p.weight.codebook_bytes = w.codebook.size;
  p.weight.num_codebooks = 1;
  p.args.struct_size = sizeof p.args;
  p.args.m = c.m;
  p.args.x = x.as<void>();
  p.args.x_bytes = x.size;
  p.args.x_dtype = p.args.y_dtype = c.dtype == "float32" ? FDK_F32 : FDK_BF16;
  p.args.y = y.as<void>();
  p.args.y_bytes = y.size;
  p.args.arithmetic = c.arithmetic == "int8"    ? FDK_INT8
                      : c.arithmetic == "int16" ? FDK_INT16
                                                : FDK_EXACT;
  p.args.num_threads = static_cast<int32_t>(c.threads);
  return p;
}

// Relative RMS error of some rows against float64.
double measure_error(const Case &c, const Weights &w, const Buffer &x, const Buffer &y) {
  std::memset(y.as<void>(), 0xff, y.size);
  const Product p = make_product(c, w, 0, x, y);
  check(fdk_matmul(&p.weight, &p.args));
  const int bits = static_cast<int>(c.bits);
  const int64_t columns = fdk::step_k(bits);
  const int64_t steps = fdk::num_steps(c.k, bits);
  const int64_t groups = fdk::ceil_div(c.k, c.group_size);
  double wrong = 0;
  double total = 0;
  for (int i = 0; i < 64; ++i) {
    const auto n = static_cast<int64_t>(g_random() % static_cast<uint64_t>(c.n));
    const auto m = static_cast<int64_t>(g_random() % static_cast<uint64_t>(c.m));
    double sum = 0;
    for (int64_t k = 0; k < c.k; ++k) {
      const auto at = fdk::code_position(bits, n % kTileRows, k % columns);
      const uint8_t byte =
          p.weight.packed[((n / kTileRows) * steps + k / columns) * kStepBytes + at.byte];
      const int code = (byte >> at.shift) & ((1 << bits) - 1);
      const int64_t scale = ((n / kTileRows) * groups + k / c.group_size) * kTileRows + n % kTileRows;
      sum += double{fdk::load_as_f32(p.weight.scales, FDK_BF16, scale)} *
             double{fdk::round_to(p.weight.codebook[code], FDK_BF16)} *
             double{fdk::load_as_f32(p.args.x, p.args.x_dtype, m * c.k + k)};
    }
    const double got = double{fdk::load_as_f32(p.args.y, p.args.y_dtype, m * c.n + n)};
    wrong += (got - sum) * (got - sum);
    total += sum * sum;
  }
  return std::sqrt(wrong / total);
}

Case codebook_case(const Options &o, int64_t m, int64_t k, int64_t n, int64_t bits,
                   const std::string &arithmetic, const std::string &kind, int64_t threads) {
  Case c;
  c.name = "codebook_" + arithmetic;
  c.codebook = kind;
  c.dtype = o.dtype;
  c.arithmetic = arithmetic;
  c.m = m;
  c.k = k;
  c.n = n;
  c.bits = bits;
  c.group_size = o.group_size;
  c.threads = threads;
  const auto size = static_cast<int64_t>(c.dtype == "float32" ? 4 : 2);
  c.ops = 2.0 * static_cast<double>(m * n * k);
  c.call = nullptr;
  c.bytes = static_cast<double>(size * (m * k + m * n)) +
            static_cast<double>(fdk::num_tiles(n) * kTileRows * fdk::ceil_div(k, o.group_size) * 2) +
            static_cast<double>(fdk::num_tiles(n) * fdk::num_steps(k, static_cast<int>(bits)) *
                                kStepBytes);
  return c;
}

void bind_codebook(Case &c, const std::shared_ptr<Weights> &w) {
  const size_t size = c.dtype == "float32" ? 4 : 2;
  auto x = std::make_shared<Buffer>(static_cast<size_t>(c.m * c.k) * size);
  auto y = std::make_shared<Buffer>(static_cast<size_t>(c.m * c.n) * size);
  fill_normal(*x, c.dtype == "float32" ? FDK_F32 : FDK_BF16, 0.0F, 1.0F);
  const Product p = make_product(c, *w, 0, *x, *y);
  const char *kernel = "";
  check(fdk_kernel_name(&p.weight, &p.args, &kernel));
  c.kernel = kernel;
  c.error = measure_error(c, *w, *x, *y);
  c.call = [c, w, x, y](int64_t copy) {
    const Product product = make_product(c, *w, copy % w->copies, *x, *y);
    check(fdk_matmul(&product.weight, &product.args));
  };
}

// --- baselines ---------------------------------------------------------------------------------

Case dense_case(const Options &o, int64_t m, int64_t k, int64_t n, int64_t threads) {
  Case c;
  c.name = "dense";
  c.m = m;
  c.k = k;
  c.n = n;
  c.bits = 16;
  c.threads = threads;
  c.ops = 2.0 * static_cast<double>(m * n * k);
  c.bytes = 2.0 * static_cast<double>(m * k + m * n + n * k);
  auto x = std::make_shared<Buffer>(static_cast<size_t>(m * k * 2));
  auto y = std::make_shared<Buffer>(static_cast<size_t>(m * n * 2));
  auto weights = std::make_shared<std::vector<Buffer>>();
  fill_normal(*x, FDK_BF16, 0.0F, 1.0F);
  const auto copies = (o.rotate_mib << 20) / (n * k * 2) + 2;
  fill_normal(weights->emplace_back(static_cast<size_t>(n * k * 2)), FDK_BF16, 0.0F, 0.02F);
  for (int64_t i = 1; i < copies; ++i) weights->push_back((*weights)[0].copy());
  c.call = [=](int64_t copy) {
    const Buffer &w = (*weights)[static_cast<size_t>(copy % copies)];
    const fdk_dense_args args{sizeof(fdk_dense_args), m, n, k, x->as<uint16_t>(), x->size,
                              w.as<uint16_t>(), w.size, y->as<uint16_t>(), y->size,
                              static_cast<int32_t>(threads), 0};
    check(fdk_dense_matmul(&args));
  };
  return c;
}

constexpr size_t kProbeBytes = 32 << 20;

Case probe_case(const std::shared_ptr<Buffer> &memory, bool copy, int64_t threads) {
  Case c;
  c.name = copy ? "probe_copy" : "probe_reduce_sum";
  c.dtype = "int32";
  c.threads = threads;
  c.bytes = static_cast<double>(copy ? 2 * kProbeBytes : kProbeBytes);
  const auto pieces = static_cast<int64_t>(memory->size / kProbeBytes);
  c.call = [=](int64_t i) {
    char *at = memory->as<char>() + static_cast<size_t>(i % pieces) * kProbeBytes;
    if (copy) {
      char *to = memory->as<char>() + static_cast<size_t>((i + pieces / 2) % pieces) * kProbeBytes;
      check(fdk_probe_copy(at, to, kProbeBytes, static_cast<int32_t>(threads)));
    } else {
      int64_t sum = 0;
      check(fdk_probe_reduce_sum(reinterpret_cast<int32_t *>(at), kProbeBytes,
                                 static_cast<int32_t>(threads), &sum));
    }
  };
  return c;
}

// --- measurement -------------------------------------------------------------------------------

double now_us() {
  const auto t = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::micro>(t).count();
}

// One sample: the mean of as many calls as fill round_ms.
void sample(Case &c, double round_ms, int64_t &copy, bool keep) {
  int64_t calls = 0;
  const double start = now_us();
  double passed = 0;
  do {
    c.call(copy++);
    ++calls;
    passed = now_us() - start;
  } while (passed < round_ms * 1000.0);
  if (keep) c.samples_us.push_back(passed / static_cast<double>(calls));
}

double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  const double at = q * static_cast<double>(values.size() - 1);
  const auto low = static_cast<size_t>(at);
  const size_t high = std::min(low + 1, values.size() - 1);
  return values[low] + (at - static_cast<double>(low)) * (values[high] - values[low]);
}

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0 || line.rfind("Hardware", 0) == 0)
      return line.substr(line.find(':') + 2);
  utsname name{};
  uname(&name);
  return name.machine;
}

std::string number(double value) {
  if (!std::isfinite(value)) return "null";
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return text;
}

std::string quoted(const std::string &text) {
  if (text.empty()) return "null";
  std::string out = "\"";
  for (const char c : text)
    if (c == '"' || c == '\\') out += std::string("\\") + c;
    else if (static_cast<unsigned char>(c) >= 0x20) out += c;
  return out + "\"";
}

std::string integer(int64_t value) { return value == 0 ? "null" : std::to_string(value); }

struct Bounds {
  double copy_gb_s, read_gb_s;
};

std::string to_json(const Options &o, const Case &c, const Bounds &bounds) {
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
  s << "{\"schema\": 1, \"suite\": " << quoted(o.suite) << ", \"name\": " << quoted(c.name)
    << ", \"backend\": " << quoted(c.backend) << ", \"m\": " << integer(c.m)
    << ", \"k\": " << integer(c.k) << ", \"n\": " << integer(c.n)
    << ", \"bits\": " << integer(c.bits) << ", \"group_size\": " << integer(c.group_size)
    << ", \"codebook\": " << quoted(c.codebook) << ", \"dtype\": " << quoted(c.dtype)
    << ", \"threads\": " << c.threads << ", \"bytes_rw\": " << static_cast<int64_t>(c.bytes)
    << ", \"ops\": " << static_cast<int64_t>(c.ops) << ", \"samples_us\": [" << samples
    << "], \"median_us\": " << number(quantile(c.samples_us, 0.5))
    << ", \"p95_us\": " << number(quantile(c.samples_us, 0.95)) << ", \"mean_us\": " << number(mean)
    << ", \"stderr_us\": " << number(std::sqrt(variance / count))
    << ", \"rel_rms_error\": " << number(c.error)
    << ", \"copy_gb_s\": " << number(bounds.copy_gb_s)
    << ", \"read_gb_s\": " << number(bounds.read_gb_s) << ", \"bound_us\": "
    << number(weights ? c.bytes / bounds.read_gb_s * 1e-3 : std::nan(""))
    << ", \"device\": " << quoted(o.device.empty() ? processor_name() : o.device)
    << ", \"driver\": null, \"versions\": {\"compiler\": " << quoted(__VERSION__)
    << ", \"fdk_abi\": " << fdk_abi_version() << "}, \"commit\": " << quoted(o.commit)
    << ", \"dirty\": null, \"date\": " << quoted(date)
    << ", \"status\": \"ok\", \"reason\": null, \"arithmetic\": " << quoted(c.arithmetic)
    << ", \"level\": " << quoted(fdk_level()) << ", \"kernel\": " << quoted(c.kernel) << "}";
  return s.str();
}

std::vector<Case> make_cases(const Options &o, int64_t threads) {
  std::vector<Case> cases;
  const std::regex include(o.include);
  auto memory = std::make_shared<Buffer>(static_cast<size_t>(std::max<int64_t>(o.rotate_mib, 128)) << 20);
  fill_random(*memory);
  cases.push_back(probe_case(memory, false, threads));
  cases.push_back(probe_case(memory, true, threads));
  for (const int64_t k : o.k)
    for (const int64_t n : o.n.empty() ? std::vector<int64_t>{k} : o.n) {
      for (const int64_t m : o.m)
        if (std::regex_search("dense", include)) cases.push_back(dense_case(o, m, k, n, threads));
      for (const int64_t bits : o.bits)
        for (const std::string &kind : o.codebook) {
          std::shared_ptr<Weights> weights;
          for (const int64_t m : o.m)
            for (const std::string &arithmetic : o.arithmetic) {
              Case c = codebook_case(o, m, k, n, bits, arithmetic, kind, threads);
              if (!std::regex_search(c.name, include)) continue;
              if (weights == nullptr)
                weights = make_weights(o, n, k, static_cast<int>(bits), kind);
              bind_codebook(c, weights);
              cases.push_back(std::move(c));
            }
        }
    }
  return cases;
}

double rate(const Case &c) { return c.bytes / quantile(c.samples_us, 0.5) * 1e-3; }

void run(const Options &o, int64_t threads, std::ofstream &output) {
  std::vector<Case> cases = make_cases(o, threads);
  int64_t copy = 0;
  for (int round = -1; round < o.rounds; ++round)
    for (Case &c : cases) sample(c, o.round_ms, copy, round >= 0);
  const Bounds bounds{rate(cases[1]), rate(cases[0])};
  std::printf("\n%s, level %s, %d thread(s)\n", processor_name().c_str(), fdk_level(),
              static_cast<int>(threads));
  std::printf("%-18s %5s %6s %6s %4s %-8s %10s %9s %9s %7s %9s\n", "case", "m", "k", "n", "bits",
              "codebook", "median us", "GB/s", "GFLOP/s", "of read", "error");
  for (const Case &c : cases) {
    // The share of the bandwidth is taken round by round, neighbours in time.
    std::vector<double> shares;
    for (size_t i = 0; i < c.samples_us.size(); ++i)
      shares.push_back(c.bytes / c.samples_us[i] / (cases[0].bytes / cases[0].samples_us[i]));
    const double median = quantile(c.samples_us, 0.5);
    std::printf("%-18s %5lld %6lld %6lld %4lld %-8s %10.1f %9.2f %9.1f %6.1f%% %9.2g\n",
                c.name.c_str(), static_cast<long long>(c.m), static_cast<long long>(c.k),
                static_cast<long long>(c.n), static_cast<long long>(c.bits), c.codebook.c_str(),
                median, rate(c), c.ops / median * 1e-3, 100.0 * quantile(shares, 0.5), c.error);
    if (output.is_open()) output << to_json(o, c, bounds) << "\n" << std::flush;
  }
}

}  // namespace

int main(int argc, char **argv) {
  Options options = parse(argc, argv);
  if (options.threads.empty()) options.threads = {fdk_default_num_threads()};
  std::ofstream output;
  if (!options.output.empty()) {
    output.open(options.output, std::ios::app);
    if (!output) fail("cannot write " + options.output);
  }
  for (const int64_t threads : options.threads) run(options, threads, output);
  return 0;
}
