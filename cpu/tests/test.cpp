// Tests of the library: every kernel of every ISA that this machine has, against an oracle in
// float64 that shares no code with the library, in buffers between guard pages.
//
// usage: fdk_test [--include REGEX] [--share 0..1] [--seed N]
//   --share  runs that share of the products, chosen at random (emulators are slow)
#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <functional>
#include <random>
#include <regex>
#include <string>
#include <thread>
#include <vector>

#include "fdk.h"
#include "guarded.h"
#include "numbers.h"

namespace {

using fdk_test::decode;
using fdk_test::encode;
using fdk_test::Guarded;
using fdk_test::round_as;
using fdk_test::Side;
using fdk_test::size_of;

std::mt19937_64 g_random;
double g_share = 1.0;
std::atomic<int> g_checks = 0;  // tests call expect() from several threads
std::atomic<int> g_failures = 0;

__attribute__((format(printf, 2, 3))) void expect(bool condition, const char *format, ...) {
  ++g_checks;
  if (condition || ++g_failures > 20) return;
  std::printf("FAILED: ");
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(g_random);
}
int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(g_random);
}

// --- a problem and its oracle ------------------------------------------------------------------

struct Shape {
  int64_t m, n, k, group_size;
  int bits;
  int64_t codebooks = 1;
  bool affine = false;
  bool bias = false;
  fdk_dtype x = FDK_BF16, scales = FDK_BF16, y = FDK_F32;

  int64_t groups() const { return (k + group_size - 1) / group_size; }
  int64_t row_bytes() const { return (k * bits + 7) / 8; }
};

std::string describe(const Shape &s) {
  char text[200];
  std::snprintf(text, sizeof text,
                "m=%lld n=%lld k=%lld g=%lld bits=%d codebooks=%lld affine=%d bias=%d "
                "dtypes x=%d scales=%d y=%d",
                static_cast<long long>(s.m), static_cast<long long>(s.n),
                static_cast<long long>(s.k), static_cast<long long>(s.group_size), s.bits,
                static_cast<long long>(s.codebooks), s.affine, s.bias, s.x, s.scales, s.y);
  return text;
}

struct Problem {
  Shape shape;
  std::vector<uint8_t> codes;           // [n][k]
  std::vector<double> scales, x, bias;  // [n][groups], [m][k], [n]
  std::vector<float> codebook;          // [codebooks][2**bits]
  std::vector<double> expected;         // [m][n]
  std::vector<double> magnitude;        // [m][n]: sum of the absolute values of all that is added
  double size = 0.0;  // sum of the squares of all products: what y's would be without cancellation
};

Problem make_problem(const Shape &s) {
  Problem p;
  p.shape = s;
  std::normal_distribution<double> normal;
  const int count = 1 << s.bits;
  for (int64_t i = 0; i < s.n * s.k; ++i)
    p.codes.push_back(static_cast<uint8_t>(integer(0, count - 1)));
  for (int64_t i = 0; i < s.n * s.groups(); ++i)
    p.scales.push_back(round_as(uniform(0.5, 2.0), s.scales));
  for (int64_t i = 0; i < s.m * s.k; ++i) p.x.push_back(round_as(normal(g_random), s.x));
  for (int64_t i = 0; i < s.n; ++i) p.bias.push_back(round_as(normal(g_random), s.x));
  for (int64_t c = 0; c < s.codebooks; ++c) {
    std::vector<float> values;
    const double low = uniform(-2.0, -0.5);
    const double step = uniform(1.0, 3.0) / (count - 1);
    for (int q = 0; q < count; ++q)
      values.push_back(static_cast<float>(s.affine ? low + q * step : normal(g_random)));
    std::sort(values.begin(), values.end());
    p.codebook.insert(p.codebook.end(), values.begin(), values.end());
  }
  const int64_t rows = s.n / s.codebooks;
  for (int64_t m = 0; m < s.m; ++m)
    for (int64_t n = 0; n < s.n; ++n) {
      double sum = s.bias ? p.bias[static_cast<size_t>(n)] : 0.0;
      double magnitude = std::fabs(sum);
      for (int64_t k = 0; k < s.k; ++k) {
        const auto code = p.codes[static_cast<size_t>(n * s.k + k)];
        const float value = p.codebook[static_cast<size_t>((n / rows) * count + code)];
        const double product = p.scales[static_cast<size_t>(n * s.groups() + k / s.group_size)] *
                               round_as(double{value}, s.scales) *
                               p.x[static_cast<size_t>(m * s.k + k)];
        sum += product;
        magnitude += std::fabs(product);
        p.size += product * product;
      }
      p.expected.push_back(sum);
      p.magnitude.push_back(magnitude);
    }
  return p;
}

Guarded to_buffer(const std::vector<double> &values, fdk_dtype dtype, Side side) {
  Guarded buffer(values.size() * size_of(dtype), side);
  for (size_t i = 0; i < values.size(); ++i) encode(buffer.get(), dtype, i, values[i]);
  return buffer;
}

// Codes -> interchange bytes, the first code in the highest bits.
std::vector<uint8_t> interchange(const Problem &p) {
  const Shape &s = p.shape;
  std::vector<uint8_t> packed(static_cast<size_t>(s.n * s.row_bytes()), 0);
  const int per_byte = 8 / s.bits;
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t k = 0; k < s.k; ++k) {
      const int shift = 8 - s.bits * (static_cast<int>(k % per_byte) + 1);
      uint8_t &byte = packed[static_cast<size_t>(n * s.row_bytes() + k / per_byte)];
      byte = static_cast<uint8_t>(byte | p.codes[static_cast<size_t>(n * s.k + k)] << shift);
    }
  return packed;
}

fdk_layout layout_of(const Shape &s) {
  return {sizeof(fdk_layout), s.n, s.k, s.group_size, s.bits, s.scales, 0, 0};
}

// The problem's buffers, in place for fdk_matmul.
struct Call {
  Guarded packed, scales, x, bias, codebook, y;
  fdk_weight weight{};
  fdk_matmul_args args{};

  Call(const Problem &p, Side side)
      : packed(tiled_bytes(p.shape), side),
        scales(tiled_scales(p.shape) * size_of(p.shape.scales), side),
        x(to_buffer(p.x, p.shape.x, side)),
        bias(to_buffer(p.bias, p.shape.x, side)),
        codebook(p.codebook, side),
        y(static_cast<size_t>(p.shape.m * p.shape.n) * size_of(p.shape.y), side) {
    const Shape &s = p.shape;
    const Guarded source(interchange(p), side);
    const Guarded source_scales = to_buffer(p.scales, s.scales, side);
    const fdk_layout layout = layout_of(s);
    const fdk_status status = fdk_to_tiled(
        &layout, source.as<uint8_t>(), source.size(), source_scales.get(), source_scales.size(),
        packed.as<uint8_t>(), packed.size(), scales.get(), scales.size());
    expect(status == FDK_OK, "to_tiled: %s", fdk_last_error());
    weight = {sizeof(fdk_weight),
              s.n,
              s.k,
              s.bits,
              s.affine,
              s.group_size,
              packed.as<uint8_t>(),
              packed.size(),
              scales.get(),
              scales.size(),
              s.scales,
              0,
              codebook.as<float>(),
              codebook.size(),
              s.codebooks};
    args = {
        sizeof(fdk_matmul_args),       s.m,         x.get(), x.size(),  s.x, s.y, y.get(), y.size(),
        s.bias ? bias.get() : nullptr, bias.size(), s.x,     FDK_EXACT, 0,   0};
  }

  static size_t tiled_bytes(const Shape &s) {
    size_t bytes = 0;
    expect(fdk_tiled_packed_bytes(s.n, s.k, s.bits, &bytes) == FDK_OK, "%s", fdk_last_error());
    return bytes;
  }
  static size_t tiled_scales(const Shape &s) {
    size_t count = 0;
    expect(fdk_tiled_scales_count(s.n, s.k, s.group_size, &count) == FDK_OK, "%s",
           fdk_last_error());
    return count;
  }
};

double relative_error(const Problem &p, const Guarded &y) {
  double wrong = 0.0;
  double total = 0.0;
  for (size_t i = 0; i < p.expected.size(); ++i) {
    const double miss = decode(y.get(), p.shape.y, i) - p.expected[i];
    wrong += miss * miss;
    total += p.expected[i] * p.expected[i];
  }
  return std::sqrt(wrong / std::max({total, p.size, 1e-30}));
}

// The most that an element of `exact` differs, in units of what it may: each float32 sum rounds to
// 2**-24 of what it holds, at most `magnitude`, and the roundings of k sums add up like their root;
// then y is rounded. One product left out of a thousand is more than that.
double worst_element(const Problem &p, const Guarded &y) {
  const Shape &s = p.shape;
  const double sums = (32.0 + 4.0 * std::sqrt(static_cast<double>(s.k))) * 0x1p-24;
  const double rounding = s.y == FDK_F32 ? 0x1p-24 : s.y == FDK_F16 ? 0x1p-11 : 0x1p-8;
  double worst = 0.0;
  for (size_t i = 0; i < p.expected.size(); ++i) {
    const double miss = std::fabs(decode(y.get(), s.y, i) - p.expected[i]);
    const double allowed = sums * p.magnitude[i] + rounding * std::fabs(p.expected[i]) +
                           (s.y == FDK_F16 ? 0x1p-25 : 1e-37);
    worst = miss <= allowed * worst ? worst : miss / allowed;  // NaN wins
  }
  return worst;
}

// What the arithmetic may lose, plus what rounding y loses.
double tolerance(const Shape &s, fdk_arithmetic arithmetic) {
  const double rounding = s.y == FDK_F32 ? 0.0 : s.y == FDK_F16 ? 5e-4 : 4e-3;
  switch (arithmetic) {
    case FDK_INT8: return 4e-2 + rounding;
    case FDK_INT16: return 1.5e-3 + rounding;
    default: return 1e-5 + rounding;
  }
}

void run_case(const Problem &problem, fdk_arithmetic arithmetic, Side side, int threads) {
  Call call(problem, side);
  call.args.arithmetic = arithmetic;
  call.args.num_threads = threads;
  const char *kernel = "";
  expect(fdk_kernel_name(&call.weight, &call.args, &kernel) == FDK_OK, "%s", fdk_last_error());
  const fdk_status status = fdk_matmul(&call.weight, &call.args);
  expect(status == FDK_OK, "%s: %s", kernel, fdk_last_error());
  const double error = relative_error(problem, call.y);
  expect(error <= tolerance(problem.shape, arithmetic), "%s, error %g: %s", kernel, error,
         describe(problem.shape).c_str());
  if (arithmetic != FDK_EXACT) return;
  const double worst = worst_element(problem, call.y);
  expect(worst <= 1.0, "%s, an element is off by %g times what it may be: %s", kernel, worst,
         describe(problem.shape).c_str());
}

// --- tests ---------------------------------------------------------------------------------------

constexpr int kBits[] = {1, 2, 4, 8};
constexpr fdk_arithmetic kArithmetics[] = {FDK_EXACT, FDK_INT16, FDK_INT8};
constexpr fdk_dtype kDtypes[] = {FDK_F32, FDK_F16, FDK_BF16};

template <typename T, size_t N>
T pick(const T (&values)[N]) {
  return values[static_cast<size_t>(integer(0, static_cast<int64_t>(N) - 1))];
}

void for_isas(const std::function<void(const char *)> &test) {
  for (int32_t i = 0; i < fdk_num_isas(); ++i) {
    const char *isa = fdk_isa_at(i);
    if (fdk_isa_available(isa) == 0) continue;
    expect(fdk_set_isa(isa) == FDK_OK, "set_isa(%s)", isa);
    test(isa);
  }
  expect(fdk_set_isa(nullptr) == FDK_OK, "set_isa(null)");
}

// Every combination that chooses another path through a kernel, the rest at random.
void test_products() {
  constexpr int64_t groups[] = {8, 16, 24, 32, 40, 64, 72, 96, 104, 128, 136, 256};
  constexpr int64_t tokens[] = {1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 17, 31, 33, 49};
  for_isas([&](const char *) {
    for (const int bits : kBits)
      for (const fdk_arithmetic arithmetic : kArithmetics)
        for (const int64_t group_size : groups)
          for (const int64_t m : tokens) {
            if (uniform(0.0, 1.0) > g_share) continue;
            Shape s{m, integer(1, 70), integer(8, 300), group_size, bits};
            s.x = pick(kDtypes);
            s.scales = integer(0, 2) != 0 ? s.x : pick(kDtypes);
            s.y = pick(kDtypes);
            s.affine = integer(0, 2) == 0;
            s.bias = integer(0, 1) == 0;
            const Problem problem = make_problem(s);
            run_case(problem, arithmetic, integer(0, 1) == 0 ? Side::kFront : Side::kBack,
                     static_cast<int>(integer(0, 3)));
          }
  });
}

// Larger ones: many tokens, several panels and pieces of work.
void test_large_products() {
  for_isas([&](const char *isa) {
    for (const int bits : kBits)
      for (const fdk_arithmetic arithmetic : kArithmetics) {
        if (uniform(0.0, 1.0) > g_share) continue;
        const bool scalar = std::string(isa) == "scalar";
        Shape s{scalar ? 20 : 131, scalar ? 33 : 205, scalar ? 300 : 1096, 64, bits};
        s.bias = true;
        s.x = s.scales = arithmetic == FDK_EXACT && bits == 4 ? FDK_F32 : FDK_BF16;
        run_case(make_problem(s), arithmetic, Side::kBack, 2);
        s.m = 515;
        s.n = 7;
        s.k = scalar ? 96 : 704;
        run_case(make_problem(s), arithmetic, Side::kBack, 3);
      }
  });
}

// Columns fewer than a step, one row, one column: the smallest of everything.
void test_tiny_products() {
  for_isas([&](const char *) {
    for (const int bits : kBits)
      for (int64_t k = 1; k <= 40; ++k)
        for (const int64_t n : {1, 15, 16, 17}) {
          if (uniform(0.0, 1.0) > g_share) continue;
          Shape s{integer(1, 3), n, k, 8 * integer(1, 5), bits};
          s.x = s.scales = FDK_F32;
          run_case(make_problem(s), FDK_EXACT, Side::kBack, 1);
          run_case(make_problem(s), FDK_EXACT, Side::kFront, 1);
        }
  });
}

// Codebooks whose rows do not begin with a tile, down to one a row.
void test_several_codebooks() {
  for_isas([&](const char *) {
    for (const int bits : kBits)
      for (const fdk_arithmetic arithmetic : kArithmetics)
        for (const int64_t codebooks : {2, 3, 5, 36}) {
          if (uniform(0.0, 1.0) > g_share) continue;
          Shape s{integer(1, 10), codebooks * integer(1, 31), integer(8, 200), 64, bits};
          s.codebooks = codebooks;
          s.affine = integer(0, 1) == 0;
          s.x = s.scales = FDK_F32;
          run_case(make_problem(s), arithmetic, Side::kBack, 2);
        }
  });
}

// The integer arithmetics are defined to the last integer: all ISAs agree with the scalar twin
// up to the order of float32 sums. The ARM ISAs also round the constant part of an int8 block to
// a whole number of steps of its products, which are large beside it.
void test_isas_agree() {
  for (const int bits : kBits)
    for (const fdk_arithmetic arithmetic : {FDK_INT16, FDK_INT8})
      for (const int64_t group_size : {32, 64, 200}) {
        Shape s{integer(1, 12), integer(1, 50), integer(8, 400), group_size, bits};
        s.affine = integer(0, 1) == 0;
        s.x = pick(kDtypes);
        Problem problem = make_problem(s);
        Call call(problem, Side::kBack);
        call.args.arithmetic = arithmetic;
        expect(fdk_set_isa("scalar") == FDK_OK, "set_isa");
        expect(fdk_matmul(&call.weight, &call.args) == FDK_OK, "%s", fdk_last_error());
        for (size_t i = 0; i < problem.expected.size(); ++i)
          problem.expected[i] = double{call.y.as<float>()[i]};
        for_isas([&](const char *isa) {
          expect(fdk_matmul(&call.weight, &call.args) == FDK_OK, "%s", fdk_last_error());
          const double error = relative_error(problem, call.y);
          expect(error < (arithmetic == FDK_INT8 ? 2e-5 : 3e-6), "%s differs from scalar by %g: %s",
                 isa, error, describe(s).c_str());
        });
      }
}

// Activations of zero, tiny, huge, infinite and not a number; a codebook of one value.
void test_special_values() {
  for_isas([&](const char *isa) {
    for (const int bits : kBits)
      for (const fdk_arithmetic arithmetic : kArithmetics) {
        Shape s{1, 20, 128, 64, bits};
        s.x = FDK_F32;
        Problem p = make_problem(s);
        const auto product = [&] {
          Call call(p, Side::kBack);
          call.args.arithmetic = arithmetic;
          expect(fdk_matmul(&call.weight, &call.args) == FDK_OK, "%s", fdk_last_error());
          return decode(call.y.get(), FDK_F32, 3);
        };
        std::fill(p.x.begin(), p.x.end(), 0.0);
        expect(product() == 0.0, "%s: zeros give %g", isa, product());
        std::fill(p.x.begin(), p.x.end(), 1e-44);
        expect(std::fabs(product()) < 1e-35, "%s: tiny gives %g", isa, product());
        std::fill(p.x.begin(), p.x.end(), 1e34);
        expect(std::isfinite(product()), "%s: huge gives %g", isa, product());
        std::fill(p.x.begin(), p.x.end(), 1.0);
        p.x[70] = std::nan("");
        expect(std::isnan(product()), "%s: NaN gives %g", isa, product());
        p.x[70] = HUGE_VAL;
        expect(!std::isfinite(product()), "%s: infinity gives %g", isa, product());
        p.x[70] = 1.0;
        std::fill(p.codebook.begin(), p.codebook.end(), 0.75F);
        for (const bool affine : {false, true}) {
          p.shape.affine = affine;
          const double sum = 0.75 * 64.0 * (p.scales[6] + p.scales[7]);
          expect(std::fabs(product() - sum) < 1e-2 * sum, "%s: constant codebook gives %g, not %g",
                 isa, product(), sum);
        }
      }
  });
}

void test_conversion() {
  for (const int bits : kBits)
    for (int i = 0; i < 60; ++i) {
      Shape s{1, integer(1, 70), integer(1, 300), 8 * integer(1, 12), bits};
      s.scales = pick(kDtypes);
      const Problem p = make_problem(s);
      for (const Side side : {Side::kFront, Side::kBack}) {
        const Guarded packed(interchange(p), side);
        const Guarded scales = to_buffer(p.scales, s.scales, side);
        const Guarded tiled(Call::tiled_bytes(s), side);
        const Guarded tiled_scales(Call::tiled_scales(s) * size_of(s.scales), side);
        const Guarded back(packed.size(), side);
        const Guarded back_scales(scales.size(), side);
        const fdk_layout layout = layout_of(s);
        expect(fdk_to_tiled(&layout, packed.as<uint8_t>(), packed.size(), scales.get(),
                            scales.size(), tiled.as<uint8_t>(), tiled.size(), tiled_scales.get(),
                            tiled_scales.size()) == FDK_OK,
               "%s", fdk_last_error());
        expect(fdk_from_tiled(&layout, tiled.as<uint8_t>(), tiled.size(), tiled_scales.get(),
                              tiled_scales.size(), back.as<uint8_t>(), back.size(),
                              back_scales.get(), back_scales.size()) == FDK_OK,
               "%s", fdk_last_error());
        expect(std::memcmp(packed.get(), back.get(), packed.size()) == 0, "codes changed: %s",
               describe(s).c_str());
        expect(std::memcmp(scales.get(), back_scales.get(), scales.size()) == 0,
               "scales changed: %s", describe(s).c_str());
      }
    }
}

// The packed bytes themselves, so that no later version reads other bytes than it wrote.
void test_layout_bytes() {
  struct Expected {
    int bits;
    int64_t row, column, byte;
    int value;
  };
  // One code of 1 at (row, column) of a 16-row tile of 128 columns.
  constexpr Expected cases[] = {
      {8, 2, 5, 64 + 2 * 4 + 1, 1}, {4, 3, 13, 64 + 3 * 4 + 1, 0x10}, {4, 15, 0, 60, 1},
      {2, 1, 30, 64 + 4 + 2, 0x40}, {1, 9, 43, 64 + 16 + 9, 8},       {1, 0, 31, 48, 0x80}};
  for (const Expected &e : cases) {
    Problem p;
    p.shape = {1, 16, 128, 64, e.bits};
    p.codes.assign(16 * 128, 0);
    p.codes[static_cast<size_t>(e.row * 128 + e.column)] = 1;
    p.scales.assign(32, 1.0);
    p.x.assign(128, 0.0);
    p.bias.assign(16, 0.0);
    p.codebook.assign(size_t{1} << e.bits, 0.0F);
    const Call call(p, Side::kBack);
    for (size_t i = 0; i < call.packed.size(); ++i)
      expect(call.packed.as<uint8_t>()[i] == (static_cast<int64_t>(i) == e.byte ? e.value : 0),
             "bits=%d row=%d column=%d: byte %d is %d", e.bits, static_cast<int>(e.row),
             static_cast<int>(e.column), static_cast<int>(i), call.packed.as<uint8_t>()[i]);
  }
}

void test_dense() {
  for_isas([&](const char *isa) {
    for (const int64_t m : {1, 2, 4, 5, 9})
      for (const int64_t k : {1, 31, 32, 33, 200}) {
        const int64_t n = integer(1, 40);
        std::vector<double> x, w;
        std::normal_distribution<double> normal;
        for (int64_t i = 0; i < m * k; ++i) x.push_back(round_as(normal(g_random), FDK_BF16));
        for (int64_t i = 0; i < n * k; ++i) w.push_back(round_as(normal(g_random), FDK_BF16));
        for (const Side side : {Side::kFront, Side::kBack}) {
          const Guarded xs = to_buffer(x, FDK_BF16, side);
          const Guarded ws = to_buffer(w, FDK_BF16, side);
          Problem p;
          p.shape.y = FDK_BF16;
          const Guarded y(static_cast<size_t>(m * n * 2), side);
          const fdk_dense_args args{sizeof(fdk_dense_args),
                                    m,
                                    n,
                                    k,
                                    xs.as<uint16_t>(),
                                    xs.size(),
                                    ws.as<uint16_t>(),
                                    ws.size(),
                                    y.as<uint16_t>(),
                                    y.size(),
                                    2,
                                    0};
          expect(fdk_dense_matmul(&args) == FDK_OK, "%s", fdk_last_error());
          for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) {
              double sum = 0.0;
              for (int64_t c = 0; c < k; ++c)
                sum += x[static_cast<size_t>(i * k + c)] * w[static_cast<size_t>(j * k + c)];
              p.expected.push_back(sum);
            }
          const double error = relative_error(p, y);
          expect(error < 4e-3, "%s: dense m=%d k=%d error %g", isa, static_cast<int>(m),
                 static_cast<int>(k), error);
        }
      }
  });
}

void test_probes() {
  for_isas([&](const char *isa) {
    for (const size_t count : {size_t{0}, size_t{1}, size_t{15}, size_t{16}, size_t{100003}}) {
      std::vector<int32_t> values;
      int64_t total = 0;
      for (size_t i = 0; i < count; ++i) {
        values.push_back(static_cast<int32_t>(integer(INT32_MIN, INT32_MAX)));
        total += values.back();
      }
      const Guarded source(values, Side::kBack);
      const Guarded target(source.size(), Side::kBack);
      int64_t sum = -1;
      expect(fdk_probe_reduce_sum(source.as<int32_t>(), source.size(), 2, &sum) == FDK_OK, "%s",
             fdk_last_error());
      expect(sum == total, "%s: sum of %zu", isa, count);
      expect(fdk_probe_copy(source.get(), target.get(), source.size(), 2) == FDK_OK, "%s",
             fdk_last_error());
      expect(std::memcmp(source.get(), target.get(), source.size()) == 0, "%s: copy of %zu", isa,
             count);
    }
  });
}

// Each mistake is refused with a message, and y stays as it was.
void test_errors() {
  Shape s{2, 20, 100, 64, 4};
  const Problem p = make_problem(s);
  const auto refused = [&](const char *what, auto change) {
    Call call(p, Side::kBack);
    change(call);
    expect(fdk_matmul(&call.weight, &call.args) == FDK_INVALID_ARGUMENT, "accepted: %s", what);
    expect(std::strlen(fdk_last_error()) > 5, "no message: %s", what);
    for (size_t i = 0; i < call.y.size(); ++i)
      expect(call.y.as<uint8_t>()[i] == 0xff, "y was written: %s", what);
  };
  refused("weight size", [](Call &c) { c.weight.struct_size = 8; });
  refused("args size", [](Call &c) { c.args.struct_size = 8; });
  refused("bits", [](Call &c) { c.weight.bits = 3; });
  refused("group size", [](Call &c) { c.weight.group_size = 12; });
  refused("group size 0", [](Call &c) { c.weight.group_size = 0; });
  refused("m", [](Call &c) { c.args.m = 0; });
  refused("large m", [](Call &c) { c.args.m = INT64_MAX; });
  refused("n", [](Call &c) { c.weight.out_features = 21; });
  refused("negative n", [](Call &c) { c.weight.out_features = -1; });
  refused("k", [](Call &c) { c.weight.in_features = 108; });
  refused("packed bytes", [](Call &c) { c.weight.packed_bytes -= 1; });
  refused("packed", [](Call &c) { c.weight.packed = nullptr; });
  refused("scales", [](Call &c) { c.weight.scales_bytes += 2; });
  refused("codebook", [](Call &c) { c.weight.codebook_bytes = 4; });
  refused("codebooks", [](Call &c) { c.weight.num_codebooks = 3; });
  refused("no codebooks", [](Call &c) { c.weight.num_codebooks = 0; });
  refused("x", [](Call &c) { c.args.x = nullptr; });
  refused("x bytes", [](Call &c) { c.args.x_bytes = 7; });
  refused("x dtype", [](Call &c) { c.args.x_dtype = static_cast<fdk_dtype>(3); });
  refused("y bytes", [](Call &c) { c.args.y_bytes = 0; });
  refused("bias bytes", [](Call &c) {
    c.args.bias = c.bias.get();
    c.args.bias_bytes = 3;
  });
  refused("arithmetic", [](Call &c) { c.args.arithmetic = static_cast<fdk_arithmetic>(3); });
  refused("threads", [](Call &c) { c.args.num_threads = -1; });
  expect(fdk_matmul(nullptr, nullptr) == FDK_INVALID_ARGUMENT, "null");
  expect(fdk_set_isa("nonsense") == FDK_INVALID_ARGUMENT, "nonsense ISA");
  expect(fdk_isa_at(-1) == nullptr && fdk_isa_at(99) == nullptr, "isa_at");
  size_t bytes = 0;
  expect(fdk_tiled_packed_bytes(INT64_MAX, INT64_MAX, 8, &bytes) == FDK_INVALID_ARGUMENT,
         "overflow");
  Call good(p, Side::kBack);
  expect(fdk_matmul(&good.weight, &good.args) == FDK_OK && *fdk_last_error() == '\0',
         "an error stays behind");
}

// Callers in several threads, each with a team of its own.
void test_callers_in_threads() {
  Shape s{3, 200, 256, 64, 4};
  const Problem p = make_problem(s);
  std::vector<std::thread> callers;
  std::vector<double> errors(6, 1.0);
  for (size_t i = 0; i < errors.size(); ++i)
    callers.emplace_back([&, i] {
      Call call(p, Side::kBack);
      call.args.num_threads = static_cast<int32_t>(i % 3 + 1);
      errors[i] = 0.0;
      for (int repeat = 0; repeat < 20; ++repeat) {
        if (fdk_matmul(&call.weight, &call.args) != FDK_OK) errors[i] = 1.0;
        errors[i] = std::max(errors[i], relative_error(p, call.y));
      }
    });
  for (std::thread &caller : callers) caller.join();
  for (const double error : errors) expect(error < 1e-5, "a caller's error is %g", error);
}

#if !defined(_WIN32)
// A child of fork() multiplies, after its parent's threads have been at work.
void test_fork() {
  Shape s{2, 300, 256, 64, 4};
  const Problem p = make_problem(s);
  Call call(p, Side::kBack);
  call.args.num_threads = 2;
  expect(fdk_matmul(&call.weight, &call.args) == FDK_OK, "%s", fdk_last_error());
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    std::memset(call.y.get(), 0xff, call.y.size());
    const bool good =
        fdk_matmul(&call.weight, &call.args) == FDK_OK && relative_error(p, call.y) < 1e-5;
    _exit(good ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %d", status);
}
#endif

struct Test {
  const char *name;
  void (*run)();
};

constexpr Test kTests[] = {
    {"products", test_products},
    {"large_products", test_large_products},
    {"tiny_products", test_tiny_products},
    {"several_codebooks", test_several_codebooks},
    {"isas_agree", test_isas_agree},
    {"special_values", test_special_values},
    {"conversion", test_conversion},
    {"layout_bytes", test_layout_bytes},
    {"dense", test_dense},
    {"probes", test_probes},
    {"errors", test_errors},
    {"callers_in_threads", test_callers_in_threads},
#if !defined(_WIN32)
    {"fork", test_fork},
#endif
};

}  // namespace

int main(int argc, char **argv) {
  std::string include = ".*";
  uint64_t seed = std::random_device{}();
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--include") include = argv[i + 1];
    else if (flag == "--share") g_share = std::atof(argv[i + 1]);
    else if (flag == "--seed") seed = std::strtoull(argv[i + 1], nullptr, 10);
    else argc = 0;
  }
  if (argc % 2 == 0) {
    std::fputs("usage: fdk_test [--include REGEX] [--share 0..1] [--seed N]\n", stderr);
    return 2;
  }
  g_random.seed(seed);
  std::printf("seed %llu, ISA %s\n", static_cast<unsigned long long>(seed), fdk_isa());
  int ran = 0;
  for (const Test &test : kTests) {
    if (!std::regex_search(test.name, std::regex(include))) continue;
    const int checks = g_checks;
    const int failures = g_failures;
    test.run();
    std::printf("%-20s %6d checks %s\n", test.name, g_checks - checks,
                g_failures == failures ? "ok" : "FAILED");
    std::fflush(stdout);
    ++ran;
  }
  if (ran == 0) std::printf("no test matches %s\n", include.c_str());
  std::printf("%d checks, %d failures\n", g_checks.load(), g_failures.load());
  return g_failures == 0 && ran > 0 ? 0 : 1;
}
