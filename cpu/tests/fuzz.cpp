// Random calls of the C interface between guard pages: the right answer or a refusal, never a stray
// byte. A case is decoded from a string of bytes, by libFuzzer (built with FDK_LIBFUZZER) or by
// main:
//
//   fuzz [--seconds S] [--threads T] [--seed N]
//
// Kinds of cases: products compared with a float64 oracle, products of arbitrary bit patterns
// (nothing may be touched beyond the buffers), broken calls (refused, y untouched), conversions of
// the layout, dense products, probes, and what models need besides (attention over a cache, a few
// tokens times an unquantised matrix), which the Python module calls. Every buffer ends or begins
// at a page that may not be touched.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "api.h"
#include "fdk.h"
#include "numbers.h"

namespace {

using fdk_test::decode;
using fdk_test::encode;
using fdk_test::size_of;

using Bytes = std::vector<uint8_t>;

[[noreturn]] void failure(const std::string &message) {
  std::fprintf(stderr, "FAILED: %s\n", message.c_str());
  std::abort();
}

void expect(bool condition, const std::string &message) {
  if (!condition) failure(message);
}

// Memory between two guard pages; buffers of a case lie flush with one of them.
class Guarded {
 public:
  Guarded() {
    void *p = mmap(nullptr, kSize + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    expect(p != MAP_FAILED, "mmap");
    base_ = static_cast<uint8_t *>(p) + kPage;
    expect(mprotect(base_, kSize, PROT_READ | PROT_WRITE) == 0, "mprotect");
  }
  ~Guarded() { munmap(base_ - kPage, kSize + 2 * kPage); }
  Guarded(const Guarded &) = delete;
  Guarded &operator=(const Guarded &) = delete;

  // At the front a buffer starts on a page, at the back it ends on one; both are aligned to
  // elements.
  uint8_t *place(size_t bytes, bool front) {
    expect(bytes <= kSize, "a buffer of the fuzzer is too large");
    return front ? base_ : base_ + kSize - bytes;
  }

 private:
  static constexpr size_t kPage = 65536;  // the largest page of a supported machine
  static constexpr size_t kSize = size_t{8} << 20;
  uint8_t *base_;
};

// Fields of a case out of the fuzzer's bytes; zeros when they run out.
class Source {
 public:
  Source(const uint8_t *data, size_t size) : data_(data), size_(size) {}
  uint64_t integer(int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; ++i)
      value = value << 8 | (position_ < size_ ? data_[position_++] : 0U);
    return value;
  }
  int64_t below(int64_t limit) { return static_cast<int64_t>(integer(2)) % limit; }
  template <typename T, size_t count>
  T one_of(const T (&values)[count]) {
    return values[below(static_cast<int64_t>(count))];
  }

 private:
  const uint8_t *data_;
  size_t size_, position_ = 0;
};

struct Case {
  fdk_weight weight{};
  fdk_matmul_args args{};
  bool has_bias;
  bool front;
  std::mt19937_64 random;

  explicit Case(Source &source) {
    constexpr int64_t sizes[] = {1,  2,  3,  5,  7,  8,  13, 15, 16,  17,  31,  32,  33,
                                 47, 48, 49, 63, 64, 65, 67, 97, 127, 128, 129, 191, 257};
    constexpr int64_t groups[] = {8, 16, 24, 32, 40, 56, 64, 72, 96, 128, 136, 192, 256, 1 << 20};
    constexpr int32_t widths[] = {1, 2, 4, 8};
    constexpr fdk_dtype dtypes[] = {FDK_F32, FDK_F16, FDK_BF16};
    weight.struct_size = sizeof weight;
    args.struct_size = sizeof args;
    weight.out_features = source.one_of(sizes);
    weight.in_features = source.one_of(sizes) * (source.below(4) == 0 ? 4 : 1) + source.below(3);
    args.m = source.below(3) > 0 ? 1 + source.below(9) : source.one_of(sizes) / 2 + 1;
    // What the oracle computes in a few milliseconds.
    while (args.m > 1 && args.m * weight.out_features * weight.in_features > 500'000) args.m /= 2;
    weight.bits = source.one_of(widths);
    weight.group_size = source.one_of(groups);
    weight.uniform = static_cast<int32_t>(source.below(2));
    weight.scales_dtype = source.one_of(dtypes);
    args.x_dtype = source.one_of(dtypes);
    args.y_dtype = source.one_of(dtypes);
    args.bias_dtype = source.one_of(dtypes);
    constexpr fdk_arithmetic arithmetics[] = {FDK_EXACT, FDK_EXACT, FDK_INT16, FDK_INT8};
    args.arithmetic = source.one_of(arithmetics);
    constexpr int32_t threads[] = {1, 1, 1, 2, 2, 2, 3, 0, 8, 4096};
    args.num_threads = source.one_of(threads);
    weight.num_codebooks = 1;
    const int64_t wanted = source.below(4);
    if (wanted > 0)
      while (weight.num_codebooks < wanted || weight.out_features % weight.num_codebooks != 0)
        if (++weight.num_codebooks >= weight.out_features) {
          weight.num_codebooks = weight.out_features;
          break;
        }
    has_bias = source.below(2) == 1;
    front = source.below(2) == 1;
    random.seed(source.integer(8));
  }

  int64_t groups() const {
    return (weight.in_features + weight.group_size - 1) / weight.group_size;
  }
  int64_t tiles() const { return (weight.out_features + 15) / 16; }
  int64_t row_bytes() const { return (weight.in_features * weight.bits + 7) / 8; }
  int64_t codes() const { return int64_t{1} << weight.bits; }

  // A value that bfloat16 holds exactly, or, in float32, any.
  float value(fdk_dtype dtype) {
    const auto integer = static_cast<float>(static_cast<int64_t>(random() % 255) - 127) / 64.0F;
    if (dtype != FDK_F32) return integer;
    return integer + static_cast<float>(random() % 4096) / (1 << 20);
  }
  Bytes noise(size_t bytes) {
    Bytes out(bytes);
    for (uint8_t &byte : out) byte = static_cast<uint8_t>(random());
    return out;
  }
  Bytes values(int64_t count, fdk_dtype dtype) {
    Bytes out(static_cast<size_t>(count) * size_of(dtype));
    for (int64_t i = 0; i < count; ++i)
      encode(out.data(), dtype, static_cast<size_t>(i), double{value(dtype)});
    return out;
  }
  // Ascending; affine in the code when the weight says so (a step of 1 / 64 is exact in bfloat16).
  Bytes codebook() {
    Bytes out;
    for (int64_t c = 0; c < weight.num_codebooks; ++c) {
      std::vector<float> levels(static_cast<size_t>(codes()));
      for (float &level : levels) level = value(weight.scales_dtype) / 2;
      std::sort(levels.begin(), levels.end());
      if (weight.uniform != 0)
        for (size_t q = 0; q < levels.size(); ++q)
          levels[q] = (static_cast<float>(q) - static_cast<float>(levels.size()) / 2) / 64.0F;
      for (const float level : levels) {
        out.resize(out.size() + 4);
        encode(out.data(), FDK_F32, out.size() / 4 - 1, double{level});
      }
    }
    return out;
  }
};

// The buffers of one thread.
struct Arena {
  Guarded packed, scales, codebook, x, y, bias, tiled_packed, tiled_scales, norm;
};

const uint8_t *put(Guarded &where, const Bytes &bytes, bool front) {
  uint8_t *target = where.place(bytes.size(), front);
  std::copy(bytes.begin(), bytes.end(), target);
  return target;
}

uint8_t *poisoned(Guarded &where, size_t bytes, bool front) {
  uint8_t *target = where.place(bytes, front);
  std::memset(target, 0xff, bytes);  // NaN in every dtype
  return target;
}

bool is_poison(const uint8_t *data, size_t bytes) {
  return std::all_of(data, data + bytes, [](uint8_t byte) { return byte == 0xff; });
}

// Fills in the pointers of a case: tiled arrays, codebook, x, y, bias.
void attach(Case &c, Arena &arena, const Bytes &tiled_packed, const Bytes &tiled_scales,
            const Bytes &codebook, const Bytes &x, const Bytes &bias) {
  c.weight.packed = put(arena.tiled_packed, tiled_packed, c.front);
  c.weight.packed_bytes = tiled_packed.size();
  c.weight.scales = put(arena.tiled_scales, tiled_scales, c.front);
  c.weight.scales_bytes = tiled_scales.size();
  c.weight.codebook = reinterpret_cast<const float *>(put(arena.codebook, codebook, c.front));
  c.weight.codebook_bytes = codebook.size();
  c.args.x = put(arena.x, x, c.front);
  c.args.x_bytes = x.size();
  c.args.y_bytes = static_cast<size_t>(c.args.m * c.weight.out_features) * size_of(c.args.y_dtype);
  c.args.y = poisoned(arena.y, c.args.y_bytes, c.front);
  if (c.has_bias) {
    c.args.bias = put(arena.bias, bias, c.front);
    c.args.bias_bytes = bias.size();
  }
}

Bytes x_of(Case &c) { return c.values(c.args.m * c.weight.in_features, c.args.x_dtype); }
Bytes bias_of(Case &c) { return c.values(c.weight.out_features, c.args.bias_dtype); }

size_t tiled_packed_bytes(const Case &c) {
  size_t bytes = 0;
  expect(fdk_tiled_packed_bytes(c.weight.out_features, c.weight.in_features, c.weight.bits,
                                &bytes) == FDK_OK,
         fdk_last_error());
  const int64_t steps = (c.weight.in_features * c.weight.bits + 31) / 32;
  expect(bytes == static_cast<size_t>(c.tiles() * steps * 64), "fdk_tiled_packed_bytes");
  return bytes;
}

size_t tiled_scales_bytes(const Case &c) {
  size_t count = 0;
  expect(fdk_tiled_scales_count(c.weight.out_features, c.weight.in_features, c.weight.group_size,
                                &count) == FDK_OK,
         fdk_last_error());
  expect(count == static_cast<size_t>(c.tiles() * c.groups() * 16), "fdk_tiled_scales_count");
  return count * size_of(c.weight.scales_dtype);
}

fdk_layout layout_of(const Case &c) {
  fdk_layout layout{};
  layout.struct_size = sizeof layout;
  layout.out_features = c.weight.out_features;
  layout.in_features = c.weight.in_features;
  layout.group_size = c.weight.group_size;
  layout.bits = c.weight.bits;
  layout.scales_dtype = c.weight.scales_dtype;
  layout.num_threads = c.args.num_threads;
  return layout;
}

// A quantised matrix in the interchange layout, and the same through fdk_to_tiled.
struct Matrix {
  Bytes packed, scales, tiled_packed, tiled_scales;

  Matrix(Case &c, Arena &arena) {
    packed = c.noise(static_cast<size_t>(c.weight.out_features * c.row_bytes()));
    scales = c.values(c.weight.out_features * c.groups(), c.weight.scales_dtype);
    const uint8_t *from_packed = put(arena.packed, packed, c.front);
    const uint8_t *from_scales = put(arena.scales, scales, c.front);
    tiled_packed.resize(tiled_packed_bytes(c));
    tiled_scales.resize(tiled_scales_bytes(c));
    uint8_t *to_packed = poisoned(arena.tiled_packed, tiled_packed.size(), c.front);
    uint8_t *to_scales = poisoned(arena.tiled_scales, tiled_scales.size(), c.front);
    const fdk_layout layout = layout_of(c);
    expect(fdk_to_tiled(&layout, from_packed, packed.size(), from_scales, scales.size(), to_packed,
                        tiled_packed.size(), to_scales, tiled_scales.size()) == FDK_OK,
           fdk_last_error());
    std::copy_n(to_packed, tiled_packed.size(), tiled_packed.begin());
    std::copy_n(to_scales, tiled_scales.size(), tiled_scales.begin());
  }

  int code(const Case &c, int64_t n, int64_t k) const {
    const int64_t bit = k * c.weight.bits;
    const uint8_t byte = packed[static_cast<size_t>(n * c.row_bytes() + bit / 8)];
    return byte >> (8 - c.weight.bits - bit % 8) & static_cast<int>(c.codes() - 1);
  }
  double scale(const Case &c, int64_t n, int64_t k) const {
    const auto index = static_cast<size_t>(n * c.groups() + k / c.weight.group_size);
    return decode(&scales[index * size_of(c.weight.scales_dtype)], c.weight.scales_dtype);
  }
};

// Error of a product's elements, as a fraction of sqrt(sum of (x * scale * largest level)^2).
double arithmetic_tolerance(const Case &c) {
  if (c.args.arithmetic == FDK_INT8) return 0.06;
  if (c.args.arithmetic == FDK_INT16) return 2e-3;
  return 2e-5;
}

// What storing a value may change; the least numbers of float16 lie 2**-24 apart.
double rounding(fdk_dtype dtype, double value) {
  const double relative = dtype == FDK_F32 ? 1e-6 : dtype == FDK_F16 ? 0x1p-10 : 0x1p-8;
  return std::max(relative * std::fabs(value), dtype == FDK_F16 ? 0x1p-24 : 0.0);
}

std::string describe(const Case &c) {
  const char *name = "?";
  if (fdk_kernel_name(&c.weight, &c.args, &name) != FDK_OK) name = fdk_last_error();
  return std::string(name) + " m=" + std::to_string(c.args.m) +
         " n=" + std::to_string(c.weight.out_features) +
         " k=" + std::to_string(c.weight.in_features) + " bits=" + std::to_string(c.weight.bits) +
         " group=" + std::to_string(c.weight.group_size) +
         " codebooks=" + std::to_string(c.weight.num_codebooks) +
         " uniform=" + std::to_string(c.weight.uniform) + " x/scales/y/bias dtypes " +
         std::to_string(c.args.x_dtype) + std::to_string(c.weight.scales_dtype) +
         std::to_string(c.args.y_dtype) + std::to_string(c.args.bias_dtype) +
         " arithmetic=" + std::to_string(c.args.arithmetic) +
         " threads=" + std::to_string(c.args.num_threads);
}

void check_product(const Case &c, const Matrix &matrix, const Bytes &codebook, const Bytes &x,
                   const Bytes &bias) {
  const auto *y = static_cast<const uint8_t *>(c.args.y);
  const int64_t rows_of_book = c.weight.out_features / c.weight.num_codebooks;
  std::vector<double> weights(static_cast<size_t>(c.weight.in_features));
  std::vector<double> largest(weights.size());
  for (int64_t n = 0; n < c.weight.out_features; ++n) {
    const uint8_t *levels = &codebook[static_cast<size_t>(n / rows_of_book * c.codes()) * 4];
    double top = 0.0;
    for (int64_t q = 0; q < c.codes(); ++q)
      top = std::max(top, std::fabs(decode(levels + q * 4, FDK_F32)));
    for (size_t k = 0; k < weights.size(); ++k) {
      const auto column = static_cast<int64_t>(k);
      const double scale = matrix.scale(c, n, column);
      weights[k] = scale * decode(levels + matrix.code(c, n, column) * 4, FDK_F32);
      largest[k] = scale * top;
    }
    for (int64_t m = 0; m < c.args.m; ++m) {
      double expected = 0.0;
      double norm = 0.0;
      for (size_t k = 0; k < weights.size(); ++k) {
        const size_t at = static_cast<size_t>(m) * weights.size() + k;
        const double value = decode(&x[at * size_of(c.args.x_dtype)], c.args.x_dtype);
        expected += value * weights[k];
        norm += value * largest[k] * value * largest[k];
      }
      if (c.has_bias)
        expected +=
            decode(&bias[static_cast<size_t>(n) * size_of(c.args.bias_dtype)], c.args.bias_dtype);
      const auto at = static_cast<size_t>(m * c.weight.out_features + n);
      const double got = decode(y + at * size_of(c.args.y_dtype), c.args.y_dtype);
      const double allowed =
          arithmetic_tolerance(c) * std::sqrt(norm) + rounding(c.args.y_dtype, expected) + 1e-6;
      if (!(std::fabs(got - expected) <= allowed))
        failure("y[" + std::to_string(m) + ", " + std::to_string(n) + "] is " +
                std::to_string(got) + ", expected " + std::to_string(expected) + " within " +
                std::to_string(allowed) + ": " + describe(c));
    }
  }
}

// A product whose values can be computed otherwise.
void right_answer(Case &c, Arena &arena) {
  const Matrix matrix(c, arena);
  const Bytes codebook = c.codebook();
  const Bytes x = x_of(c);
  const Bytes bias = bias_of(c);
  attach(c, arena, matrix.tiled_packed, matrix.tiled_scales, codebook, x, bias);
  if (fdk_matmul(&c.weight, &c.args) != FDK_OK) failure(describe(c));
  check_product(c, matrix, codebook, x, bias);
}

void attach_noise(Case &c, Arena &arena) {
  const Bytes packed = c.noise(tiled_packed_bytes(c));
  const Bytes scales = c.noise(tiled_scales_bytes(c));
  const Bytes codebook = c.noise(static_cast<size_t>(c.weight.num_codebooks * c.codes()) * 4);
  const Bytes x =
      c.noise(static_cast<size_t>(c.args.m * c.weight.in_features) * size_of(c.args.x_dtype));
  const Bytes bias =
      c.noise(static_cast<size_t>(c.weight.out_features) * size_of(c.args.bias_dtype));
  attach(c, arena, packed, scales, codebook, x, bias);
}

// Arbitrary bits everywhere (NaN, infinities, a codebook out of order): only memory is checked.
void arbitrary_bits(Case &c, Arena &arena) {
  attach_noise(c, arena);
  if (fdk_matmul(&c.weight, &c.args) != FDK_OK) failure(describe(c));
}

// Breaks one field of a valid call. False where the change happens to be valid.
bool break_call(Case &c, Source &source) {
  fdk_weight &w = c.weight;
  fdk_matmul_args &a = c.args;
  const int64_t which = source.below(30);
  constexpr int64_t bad_counts[] = {
      0, -1, INT64_MIN, INT64_MAX, int64_t{1} << 31, int64_t{1} << 62};
  constexpr int64_t bad_groups[] = {0, -8, INT64_MIN, 7, 12, 63, INT64_MAX - 7};
  constexpr size_t off_by[] = {1, 4, 64, ~size_t{0}, ~size_t{63}, size_t{1} << 63};
  const size_t off = source.one_of(off_by);
  const int32_t enumerator = static_cast<int32_t>(3 + source.below(1 << 15)) * (off > 64 ? -1 : 1);
  auto *y = static_cast<uint8_t *>(a.y);
  switch (which) {
    case 0: w.struct_size += off; return true;
    case 1: a.struct_size += off; return true;
    case 2: w.out_features = source.one_of(bad_counts); return true;
    case 3: w.in_features = source.one_of(bad_counts); return true;
    case 4: a.m = source.one_of(bad_counts); return true;
    case 5: w.bits = enumerator; return w.bits != 4 && w.bits != 8;
    case 6: w.group_size = source.one_of(bad_groups); return true;
    case 7: w.packed_bytes += off; return true;
    case 8: w.scales_bytes += off; return true;
    case 9: w.codebook_bytes += off; return true;
    case 10: a.x_bytes += off; return true;
    case 11: a.y_bytes += off; return true;
    case 12: a.bias_bytes += off; return c.has_bias;
    case 13: w.packed = nullptr; return true;
    case 14: w.scales = nullptr; return true;
    case 15: w.codebook = nullptr; return true;
    case 16: a.x = nullptr; return true;
    case 17: a.y = nullptr; return true;
    case 18: w.num_codebooks = source.one_of(bad_counts); return true;
    case 19: std::memcpy(&w.scales_dtype, &enumerator, 4); return true;
    case 20: std::memcpy(&a.x_dtype, &enumerator, 4); return true;
    case 21: std::memcpy(&a.y_dtype, &enumerator, 4); return true;
    case 22: std::memcpy(&a.bias_dtype, &enumerator, 4); return c.has_bias;
    case 23: std::memcpy(&a.arithmetic, &enumerator, 4); return true;
    case 24:
      a.num_threads = off > 64 ? -std::abs(enumerator) : 4097 + std::abs(enumerator);
      return true;
    case 25: a.x = static_cast<const uint8_t *>(a.x) + 1; return true;  // misaligned
    case 26: w.scales = static_cast<const uint8_t *>(w.scales) + 1; return true;
    case 27:
      w.codebook = reinterpret_cast<const float *>(reinterpret_cast<uintptr_t>(w.codebook) + 2);
      return true;
    case 28: a.y = y + 1; return true;
    default: break;
  }
  // y over an input: the result would depend on the order of the work.
  if (a.x_bytes < a.y_bytes || (reinterpret_cast<uintptr_t>(a.x) % size_of(a.y_dtype)) != 0)
    return false;
  a.y = const_cast<void *>(a.x);
  return true;
}

void refusal(Case &c, Arena &arena, Source &source) {
  attach_noise(c, arena);
  auto *y = static_cast<uint8_t *>(c.args.y);
  const size_t y_bytes = c.args.y_bytes;
  const Bytes x_before(static_cast<const uint8_t *>(c.args.x),
                       static_cast<const uint8_t *>(c.args.x) + c.args.x_bytes);
  const uint8_t *x = static_cast<const uint8_t *>(c.args.x);
  if (!break_call(c, source)) return;
  const fdk_status status = fdk_matmul(&c.weight, &c.args);
  const std::string message = fdk_last_error();
  if (status != FDK_INVALID_ARGUMENT)
    failure("a broken call ended with " + std::to_string(status) + " " + message + " " +
            describe(c));
  expect(!message.empty(), "a refusal without a message");
  expect(is_poison(y, y_bytes) && std::equal(x_before.begin(), x_before.end(), x),
         "a refused call wrote");
  const char *name = nullptr;
  expect(fdk_matmul(nullptr, &c.args) == FDK_INVALID_ARGUMENT, "null weight");
  expect(fdk_matmul(&c.weight, nullptr) == FDK_INVALID_ARGUMENT, "null args");
  expect(fdk_kernel_name(&c.weight, &c.args, nullptr) == FDK_INVALID_ARGUMENT, "null name");
  fdk_kernel_name(&c.weight, &c.args, &name);
}

// The layout as its description says, code by code, and back.
void conversion(Case &c, Arena &arena) {
  const Matrix matrix(c, arena);
  const int64_t columns = 32 / c.weight.bits;
  const int64_t steps = (c.weight.in_features + columns - 1) / columns;
  for (int64_t n = 0; n < c.tiles() * 16; ++n)
    for (int64_t k = 0; k < steps * columns; ++k) {
      const int64_t i = k % columns;
      const int64_t r = n % 16;
      const int64_t byte = c.weight.bits == 1 ? i / 8 * 16 + r : r * 4 + i % 4;
      const int64_t shift = c.weight.bits == 1 ? i % 8 : i / 4 * c.weight.bits;
      const auto at = static_cast<size_t>((n / 16 * steps + k / columns) * 64 + byte);
      const int got = matrix.tiled_packed[at] >> shift & static_cast<int>(c.codes() - 1);
      const bool inside = n < c.weight.out_features && k < c.weight.in_features;
      expect(got == (inside ? matrix.code(c, n, k) : 0), "a code is in the wrong place");
    }
  const fdk_layout layout = layout_of(c);
  uint8_t *packed = poisoned(arena.packed, matrix.packed.size(), c.front);
  uint8_t *scales = poisoned(arena.scales, matrix.scales.size(), c.front);
  const uint8_t *tiled_packed = put(arena.tiled_packed, matrix.tiled_packed, c.front);
  const uint8_t *tiled_scales = put(arena.tiled_scales, matrix.tiled_scales, c.front);
  expect(fdk_from_tiled(&layout, tiled_packed, matrix.tiled_packed.size(), tiled_scales,
                        matrix.tiled_scales.size(), packed, matrix.packed.size(), scales,
                        matrix.scales.size()) == FDK_OK,
         fdk_last_error());
  expect(std::equal(matrix.scales.begin(), matrix.scales.end(), scales), "scales differ");
  const int64_t used = c.weight.in_features * c.weight.bits % 8;
  const int mask = used == 0 ? 0xff : 0xff00 >> used & 0xff;
  for (int64_t i = 0; i < c.weight.out_features * c.row_bytes(); ++i) {
    const bool last = (i + 1) % c.row_bytes() == 0;
    const int wanted = matrix.packed[static_cast<size_t>(i)] & (last ? mask : 0xff);
    expect(packed[i] == wanted, "packed bytes differ after a round trip");
  }
  // Sizes that do not fit are refused before a byte is written.
  std::memset(packed, 0xff, matrix.packed.size());
  expect(fdk_from_tiled(&layout, tiled_packed, matrix.tiled_packed.size() + 64, tiled_scales,
                        matrix.tiled_scales.size(), packed, matrix.packed.size(), scales,
                        matrix.scales.size()) == FDK_INVALID_ARGUMENT,
         "a wrong size was taken");
  expect(is_poison(packed, matrix.packed.size()), "a refused conversion wrote");
}

void dense(Case &c, Arena &arena) {
  const int64_t n = c.weight.out_features;
  const int64_t k = c.weight.in_features;
  const Bytes x = c.values(c.args.m * k, FDK_BF16);
  const Bytes weight = c.values(n * k, FDK_BF16);
  fdk_dense_args args{};
  args.struct_size = sizeof args;
  args.m = c.args.m;
  args.out_features = n;
  args.in_features = k;
  args.x = reinterpret_cast<const uint16_t *>(put(arena.x, x, c.front));
  args.x_bytes = x.size();
  args.weight = reinterpret_cast<const uint16_t *>(put(arena.packed, weight, c.front));
  args.weight_bytes = weight.size();
  args.y_bytes = static_cast<size_t>(args.m * n) * 2;
  uint8_t *y = poisoned(arena.y, args.y_bytes, c.front);
  args.y = reinterpret_cast<uint16_t *>(y);
  args.num_threads = c.args.num_threads;
  expect(fdk_dense_matmul(&args) == FDK_OK, fdk_last_error());
  for (int64_t i = 0; i < args.m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double expected = 0.0;
      double norm = 0.0;
      for (int64_t l = 0; l < k; ++l) {
        const double term = decode(&x[static_cast<size_t>(i * k + l) * 2], FDK_BF16) *
                            decode(&weight[static_cast<size_t>(j * k + l) * 2], FDK_BF16);
        expected += term;
        norm += term * term;
      }
      const double got = decode(y + (i * n + j) * 2, FDK_BF16);
      if (!(std::fabs(got - expected) <= 1e-4 * std::sqrt(norm) + 0x1p-8 * std::fabs(expected)))
        failure("a dense product is " + std::to_string(got) + ", not " + std::to_string(expected));
    }
  args.y_bytes += 2;
  expect(fdk_dense_matmul(&args) == FDK_INVALID_ARGUMENT, "a wrong size of y was taken");
}

void probes(Case &c, Arena &arena) {
  const auto count = static_cast<size_t>(c.args.m * c.weight.in_features);
  const Bytes data = c.noise(count * 4);
  const uint8_t *source = put(arena.x, data, c.front);
  uint8_t *target = poisoned(arena.y, data.size(), c.front);
  expect(fdk_probe_copy(source, target, data.size(), c.args.num_threads) == FDK_OK,
         fdk_last_error());
  expect(std::equal(data.begin(), data.end(), target), "a copy differs");
  int64_t expected = 0;
  for (size_t i = 0; i < count; ++i) {
    int32_t word = 0;
    std::memcpy(&word, &data[i * 4], 4);
    expected += word;
  }
  int64_t sum = 0;
  expect(fdk_probe_reduce_sum(reinterpret_cast<const int32_t *>(source), data.size(),
                              c.args.num_threads, &sum) == FDK_OK,
         fdk_last_error());
  // Levels may sum in 32 bits: the probe measures reading.
  expect(static_cast<uint32_t>(sum) == static_cast<uint32_t>(expected), "a sum differs");
}

// Attention of one token a sequence. Its operands may hold any bits (`wild`): then only memory is
// checked.
struct DecodingStep {
  fdk::Attention args{};
  Bytes qkv, cos, sin, lengths, keys, values, q_norm, k_norm;
  bool wild;

  DecodingStep(Case &c, Source &source) {
    constexpr int64_t few[] = {1, 2, 3, 5};
    constexpr int64_t dims[] = {2, 6, 16, 32, 64, 98, 128};
    constexpr int64_t capacities[] = {1, 2, 7, 16, 33, 64, 130};
    args.batch = source.one_of(few);
    args.kv_heads = source.one_of(few);
    args.heads = args.kv_heads * source.one_of(few);
    args.head_dim = source.one_of(dims);
    args.capacity = source.one_of(capacities);
    args.dtype = c.args.x_dtype;
    args.norm_eps = 1e-6F;
    wild = source.below(3) == 0;
    const auto some = [&](int64_t count, fdk_dtype dtype) {
      return wild ? c.noise(static_cast<size_t>(count) * size_of(dtype)) : c.values(count, dtype);
    };
    const int64_t cache = args.batch * args.kv_heads * args.capacity * args.head_dim;
    qkv = some(args.batch * (args.heads + 2 * args.kv_heads) * args.head_dim, args.dtype);
    cos = some(args.batch * args.head_dim / 2, FDK_F32);
    sin = some(args.batch * args.head_dim / 2, FDK_F32);
    keys = some(cache, args.dtype);
    values = some(cache, args.dtype);
    if (source.below(2) == 1) q_norm = some(args.head_dim, args.dtype);
    if (source.below(2) == 1) k_norm = some(args.head_dim, args.dtype);
    for (int64_t b = 0; b < args.batch; ++b) {  // also negative ones, and those of a full cache
      auto length = static_cast<int32_t>(source.below(args.capacity + 2) - 1);
      if (source.below(16) == 0) length = source.below(2) == 0 ? INT32_MAX : INT32_MIN;
      lengths.resize(lengths.size() + 4);
      std::memcpy(lengths.data() + lengths.size() - 4, &length, 4);
    }
  }

  double element(const Bytes &bytes, int64_t index) const {
    return decode(&bytes[static_cast<size_t>(index) * size_of(args.dtype)], args.dtype);
  }

  // A head of the newest token after its norm and its rotation.
  std::vector<double> head(int64_t sequence, int64_t which, const Bytes &norm) const {
    const int64_t d = args.head_dim;
    const int64_t first = (sequence * (args.heads + 2 * args.kv_heads) + which) * d;
    std::vector<double> plain(static_cast<size_t>(d));
    double squares = 0.0;
    for (int64_t i = 0; i < d; ++i) {
      plain[static_cast<size_t>(i)] = element(qkv, first + i);
      squares += plain[static_cast<size_t>(i)] * plain[static_cast<size_t>(i)];
    }
    if (!norm.empty())
      for (int64_t i = 0; i < d; ++i)
        plain[static_cast<size_t>(i)] *=
            element(norm, i) /
            std::sqrt(squares / static_cast<double>(d) + static_cast<double>(args.norm_eps));
    std::vector<double> turned(plain.size());
    for (int64_t i = 0; i < d; ++i) {
      const int64_t half = d / 2;
      const auto at = static_cast<size_t>(sequence * half + i % half) * 4;
      const double other = plain[static_cast<size_t>((i + half) % d)] * (i < half ? -1.0 : 1.0);
      turned[static_cast<size_t>(i)] = plain[static_cast<size_t>(i)] * decode(&cos[at], FDK_F32) +
                                       other * decode(&sin[at], FDK_F32);
    }
    return turned;
  }

  void check_key(int64_t sequence, int64_t kv_head, const std::vector<double> &stored) const {
    const std::vector<double> wanted = head(sequence, args.heads + kv_head, k_norm);
    double norm = 0.0;
    for (const double value : wanted) norm += value * value;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const double size = std::fabs(wanted[i]) + std::sqrt(norm);
      expect(std::fabs(stored[i] - wanted[i]) <= rounding(args.dtype, size) + 2e-6 * size,
             "a new key is wrong");
    }
  }
};

void attention(Case &c, Arena &arena, Source &source) {
  DecodingStep step(c, source);
  fdk::Attention &a = step.args;
  const size_t width = size_of(a.dtype);
  const int64_t d = a.head_dim;
  a.qkv = put(arena.x, step.qkv, c.front);
  a.cos = reinterpret_cast<const float *>(put(arena.packed, step.cos, c.front));
  a.sin = reinterpret_cast<const float *>(put(arena.scales, step.sin, c.front));
  a.lengths = reinterpret_cast<const int32_t *>(put(arena.codebook, step.lengths, c.front));
  a.keys = const_cast<uint8_t *>(put(arena.tiled_packed, step.keys, c.front));
  a.values = const_cast<uint8_t *>(put(arena.tiled_scales, step.values, c.front));
  if (!step.q_norm.empty()) a.q_norm = put(arena.norm, step.q_norm, c.front);
  if (!step.k_norm.empty()) a.k_norm = put(arena.bias, step.k_norm, c.front);
  uint8_t *out = poisoned(arena.y, static_cast<size_t>(a.batch * a.heads * d) * width, c.front);
  a.out = out;
  expect(fdk::attention(a, fdk::openmp_team()) == FDK_OK, fdk_last_error());

  const auto *keys = static_cast<const uint8_t *>(a.keys);
  const auto *values = static_cast<const uint8_t *>(a.values);
  for (int64_t h = 0; h < a.batch * a.kv_heads; ++h) {
    const int64_t sequence = h / a.kv_heads;
    const int64_t slot = a.slot(sequence);
    for (int64_t s = 0; s < a.capacity; ++s) {
      const auto at = static_cast<size_t>((h * a.capacity + s) * d) * width;
      const size_t bytes = static_cast<size_t>(d) * width;
      if (s != slot)
        expect(std::memcmp(keys + at, &step.keys[at], bytes) == 0 &&
                   std::memcmp(values + at, &step.values[at], bytes) == 0,
               "attention changed another slot of the cache");
    }
    if (step.wild) continue;
    const auto stored = [&](const uint8_t *cache, int64_t s, int64_t i) {
      return decode(cache + static_cast<size_t>((h * a.capacity + s) * d + i) * width, a.dtype);
    };
    std::vector<double> key(static_cast<size_t>(d));
    for (int64_t i = 0; i < d; ++i) key[static_cast<size_t>(i)] = stored(keys, slot, i);
    step.check_key(sequence, h % a.kv_heads, key);
    const int64_t group = a.heads / a.kv_heads;
    for (int64_t g = 0; g < group; ++g) {
      const int64_t which = h % a.kv_heads * group + g;
      const std::vector<double> query = step.head(sequence, which, step.q_norm);
      std::vector<double> scores(static_cast<size_t>(slot + 1));
      double reach = 0.0;  // what scores are summed of, to which their rounding is relative
      for (int64_t s = 0; s <= slot; ++s) {
        double size = 0.0;
        for (int64_t i = 0; i < d; ++i) {
          const double term = query[static_cast<size_t>(i)] * stored(keys, s, i);
          scores[static_cast<size_t>(s)] += term / std::sqrt(static_cast<double>(d));
          size += std::fabs(term);
        }
        reach = std::max(reach, size);
      }
      const double top = *std::max_element(scores.begin(), scores.end());
      double total = 0.0;
      for (double &score : scores) total += score = std::exp(score - top);
      for (int64_t i = 0; i < d; ++i) {
        double expected = 0.0;
        double largest = 0.0;
        for (int64_t s = 0; s <= slot; ++s) {
          expected += scores[static_cast<size_t>(s)] / total * stored(values, s, i);
          largest = std::max(largest, std::fabs(stored(values, s, i)));
        }
        const auto at = static_cast<size_t>((sequence * a.heads + which) * d + i) * width;
        const double got = decode(out + at, a.dtype);
        const double allowed = rounding(a.dtype, expected) + (1e-5 + 1e-6 * reach) * largest + 1e-6;
        if (!(std::fabs(got - expected) <= allowed))
          failure("attention gives " + std::to_string(got) + ", not " + std::to_string(expected));
      }
    }
  }
}

void few_tokens(Case &c, Arena &arena, Source &source) {
  fdk::FewTokens args{};
  args.m = 1 + source.below(fdk::kFewTokens);
  args.n = c.weight.out_features * (source.below(4) == 0 ? 3 : 1);  // also past a block of columns
  args.k = c.weight.in_features;
  args.rows = source.below(2) == 1;
  args.dtype = c.weight.scales_dtype;
  args.y_dtype = c.args.y_dtype;
  const bool wild = source.below(3) == 0;
  const auto some = [&](int64_t count, fdk_dtype dtype) {
    return wild ? c.noise(static_cast<size_t>(count) * size_of(dtype)) : c.values(count, dtype);
  };
  const Bytes x = some(args.m * args.k, c.args.x_dtype);
  const Bytes weight = some(args.n * args.k, args.dtype);
  args.weight = put(arena.packed, weight, c.front);
  uint8_t *y =
      poisoned(arena.y, static_cast<size_t>(args.m * args.n) * size_of(args.y_dtype), c.front);
  args.y = y;
  expect(
      fdk::few_tokens(args, put(arena.x, x, c.front), c.args.x_dtype, fdk::openmp_team()) == FDK_OK,
      fdk_last_error());
  if (wild) return;
  for (int64_t i = 0; i < args.m; ++i)
    for (int64_t j = 0; j < args.n; ++j) {
      double expected = 0.0;
      double size = 0.0;
      for (int64_t l = 0; l < args.k; ++l) {
        const int64_t at = args.rows ? j * args.k + l : l * args.n + j;
        const double term =
            decode(&x[static_cast<size_t>(i * args.k + l) * size_of(c.args.x_dtype)],
                   c.args.x_dtype) *
            decode(&weight[static_cast<size_t>(at) * size_of(args.dtype)], args.dtype);
        expected += term;
        size += std::fabs(term);
      }
      const auto at = static_cast<size_t>(i * args.n + j) * size_of(args.y_dtype);
      const double got = decode(y + at, args.y_dtype);
      if (!(std::fabs(got - expected) <= 1e-5 * size + rounding(args.y_dtype, expected)))
        failure("a product of a few tokens is " + std::to_string(got) + ", not " +
                std::to_string(expected));
    }
}

// Threads that wait for work sleep: a test may share its machine.
[[maybe_unused]] const int g_passive = setenv("OMP_WAIT_POLICY", "passive", 0);

std::atomic<int64_t> g_counts[8];

void choose_isa(Source &source) {
  const auto count = static_cast<int64_t>(fdk_num_isas());
  const char *name = fdk_isa_at(static_cast<int32_t>(source.below(count)));
  expect(fdk_set_isa(fdk_isa_available(name) != 0 ? name : nullptr) == FDK_OK, fdk_last_error());
}

void run_case(const uint8_t *data, size_t size) {
  thread_local Arena arena;
  constexpr int weighted[] = {0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 4, 5, 6, 7};
  Source source(data, size);
  const int kind = source.one_of(weighted);
  choose_isa(source);
  Case c(source);
  switch (kind) {
    case 0: right_answer(c, arena); break;
    case 1: arbitrary_bits(c, arena); break;
    case 2: refusal(c, arena, source); break;
    case 3: conversion(c, arena); break;
    case 4: dense(c, arena); break;
    case 5: probes(c, arena); break;
    case 6: attention(c, arena, source); break;
    default: few_tokens(c, arena, source); break;
  }
  ++g_counts[kind];
}

}  // namespace

// OpenMP's runtime keeps what it allocates for its threads.
extern "C" const char *__lsan_default_suppressions() { return "leak:libomp\nleak:libgomp\n"; }

#if defined(FDK_LIBFUZZER)

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  run_case(data, size);
  return 0;
}

#else

int main(int argc, char **argv) {
  double seconds = 2.0;
  int threads = 1;
  uint64_t seed = std::random_device{}();
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--seconds") seconds = std::strtod(argv[i + 1], nullptr);
    if (flag == "--threads") threads = std::atoi(argv[i + 1]);
    if (flag == "--seed") seed = std::strtoull(argv[i + 1], nullptr, 10);
  }
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  const auto work = [&](int thread) {
    std::mt19937_64 random(seed + static_cast<uint64_t>(thread) * 1000003);
    Bytes data(128);
    while (std::chrono::steady_clock::now() < end) {
      for (uint8_t &byte : data) byte = static_cast<uint8_t>(random());
      run_case(data.data(), data.size());
    }
  };
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) team.emplace_back(work, i);
  work(0);
  for (std::thread &thread : team) thread.join();
  constexpr const char *kinds[] = {"products",       "arbitrary bits", "refusals",   "conversions",
                                   "dense products", "probes",         "attentions", "few tokens"};
  for (int kind = 0; kind < 8; ++kind)
    std::printf("%lld %s%s", static_cast<long long>(g_counts[kind].load()), kinds[kind],
                kind < 7 ? ", " : "\n");
  return 0;
}

#endif
