// What the benchmark times: products by codebook weights, dense products, bandwidth probes.
#pragma once

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fdk.h"
#include "layout.h"
#include "numeric.h"
#include "options.h"
#include "platform.h"

namespace fdk::bench {

// Memory that is aligned and touched.
struct Buffer {
  explicit Buffer(size_t bytes)
      : size(bytes), data(allocate_aligned(64, (bytes + 63) / 64 * 64), free_aligned) {
    if (data == nullptr) fail("out of memory: use a smaller --rotate_mib");
    std::memset(data.get(), 0, (bytes + 63) / 64 * 64);
  }
  Buffer copy() const {
    Buffer result(size);
    std::memcpy(result.data.get(), data.get(), size);
    return result;
  }
  template <typename T>
  T *as() const {
    return static_cast<T *>(data.get());
  }
  size_t size;
  std::unique_ptr<void, void (*)(void *)> data;
};

inline std::mt19937_64 g_random(std::random_device{}());

inline void fill_random(const Buffer &buffer) {
  for (size_t i = 0; i + 8 <= buffer.size; i += 8) buffer.as<uint64_t>()[i / 8] = g_random();
}

// Values as large as those of a layer: x ~ N(0, 1), scales near 1 / sqrt(k).
inline void fill_normal(const Buffer &buffer, fdk_dtype dtype, float mean, float deviation) {
  std::normal_distribution<float> normal(mean, deviation);
  const size_t count = buffer.size / dtype_size(dtype);
  for (size_t i = 0; i < count; ++i)
    store_from_f32(buffer.as<void>(), dtype, static_cast<int64_t>(i), normal(g_random));
}

struct Case {
  std::string name, backend = "cpu", codebook, dtype = "bfloat16", arithmetic, kernel, isa;
  int64_t m = 0, k = 0, n = 0, bits = 0, group_size = 0, threads = 1;
  double bytes = 0, ops = 0, error = std::nan("");
  std::function<void(int64_t)> call;  // argument: number of the copy
  size_t probe = 0;                   // the case that reads the memory its weights are in
  std::vector<double> samples_us;
};

inline void check(fdk_status status) {
  if (status != FDK_OK) fail(fdk_last_error());
}

// Forces the ISA of the case, if it names one.
inline void use_isa(const Case &c) {
  if (!c.isa.empty()) check(fdk_set_isa(c.isa.c_str()));
}

// --- codebook products -------------------------------------------------------------------------

// Copies of a weight, one after another.
struct Weights {
  size_t packed_bytes, scales_bytes;  // of one
  int64_t copies;
  Buffer packed, scales, codebook;

  uint8_t *packed_at(int64_t copy) const {
    return packed.as<uint8_t>() + static_cast<size_t>(copy) * packed_bytes;
  }
  char *scales_at(int64_t copy) const {
    return scales.as<char>() + static_cast<size_t>(copy) * scales_bytes;
  }
};

inline std::shared_ptr<Weights> make_weights(const Options &o, int64_t n, int64_t k, int bits,
                                             const std::string &kind) {
  size_t packed_bytes = 0;
  size_t scales = 0;
  check(fdk_tiled_packed_bytes(n, k, bits, &packed_bytes));
  check(fdk_tiled_scales_count(n, k, o.group_size, &scales));
  const size_t scales_bytes = scales * 2;
  const auto copies = static_cast<int64_t>((static_cast<size_t>(o.rotate_mib) << 20) /
                                           (packed_bytes + scales_bytes)) +
                      2;
  const auto all = [&](size_t bytes) { return Buffer(bytes * static_cast<size_t>(copies)); };
  auto weights =
      std::make_shared<Weights>(Weights{packed_bytes, scales_bytes, copies, all(packed_bytes),
                                        all(scales_bytes), Buffer(sizeof(float) << bits)});
  const Buffer packed(packed_bytes);
  const Buffer some_scales(scales_bytes);
  fill_random(packed);
  fill_normal(some_scales, FDK_BF16, 1.0F / std::sqrt(static_cast<float>(k)),
              0.1F / std::sqrt(static_cast<float>(k)));
  for (int64_t i = 0; i < copies; ++i) {
    std::memcpy(weights->packed_at(i), packed.as<void>(), packed_bytes);
    std::memcpy(weights->scales_at(i), some_scales.as<void>(), scales_bytes);
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

inline Product make_product(const Case &c, const Weights &w, int64_t copy, const Buffer &x,
                            const Buffer &y) {
  Product p;
  p.weight.struct_size = sizeof p.weight;
  p.weight.out_features = c.n;
  p.weight.in_features = c.k;
  p.weight.bits = static_cast<int32_t>(c.bits);
  p.weight.uniform = c.codebook == "uniform";
  p.weight.group_size = c.group_size;
  p.weight.packed = w.packed_at(copy);
  p.weight.packed_bytes = w.packed_bytes;
  p.weight.scales = w.scales_at(copy);
  p.weight.scales_bytes = w.scales_bytes;
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
inline double measure_error(const Case &c, const Weights &w, const Buffer &x, const Buffer &y) {
  std::memset(y.as<void>(), 0xff, y.size);
  const Product p = make_product(c, w, 0, x, y);
  check(fdk_matmul(&p.weight, &p.args));
  const int bits = static_cast<int>(c.bits);
  const int64_t columns = step_k(bits);
  const int64_t steps = num_steps(c.k, bits);
  const int64_t groups = ceil_div(c.k, c.group_size);
  double wrong = 0;
  double total = 0;
  for (int i = 0; i < 64; ++i) {
    const auto n = static_cast<int64_t>(g_random() % static_cast<uint64_t>(c.n));
    const auto m = static_cast<int64_t>(g_random() % static_cast<uint64_t>(c.m));
    double sum = 0;
    for (int64_t k = 0; k < c.k; ++k) {
      const auto at = code_position(bits, n % kTileRows, k % columns);
      const uint8_t byte =
          p.weight.packed[((n / kTileRows) * steps + k / columns) * kStepBytes + at.byte];
      const int code = (byte >> at.shift) & ((1 << bits) - 1);
      const int64_t scale =
          ((n / kTileRows) * groups + k / c.group_size) * kTileRows + n % kTileRows;
      sum += double{load_as_f32(p.weight.scales, FDK_BF16, scale)} *
             double{round_to(p.weight.codebook[code], FDK_BF16)} *
             double{load_as_f32(p.args.x, p.args.x_dtype, m * c.k + k)};
    }
    const double got = double{load_as_f32(p.args.y, p.args.y_dtype, m * c.n + n)};
    wrong += (got - sum) * (got - sum);
    total += sum * sum;
  }
  return std::sqrt(wrong / total);
}

inline Case codebook_case(const Options &o, int64_t m, int64_t k, int64_t n, int64_t bits,
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
            static_cast<double>(num_tiles(n) * kTileRows * ceil_div(k, o.group_size) * 2) +
            static_cast<double>(num_tiles(n) * num_steps(k, static_cast<int>(bits)) * kStepBytes);
  return c;
}

inline void bind_codebook(Case &c, const std::shared_ptr<Weights> &w) {
  const size_t size = c.dtype == "float32" ? 4 : 2;
  auto x = std::make_shared<Buffer>(static_cast<size_t>(c.m * c.k) * size);
  auto y = std::make_shared<Buffer>(static_cast<size_t>(c.m * c.n) * size);
  fill_normal(*x, c.dtype == "float32" ? FDK_F32 : FDK_BF16, 0.0F, 1.0F);
  use_isa(c);
  const Product p = make_product(c, *w, 0, *x, *y);
  const char *kernel = "";
  check(fdk_kernel_name(&p.weight, &p.args, &kernel));
  c.kernel = kernel;
  c.error = measure_error(c, *w, *x, *y);
  c.call = [c, w, x, y](int64_t copy) {
    use_isa(c);
    const Product product = make_product(c, *w, copy % w->copies, *x, *y);
    check(fdk_matmul(&product.weight, &product.args));
  };
}

// The same product of one token divided beforehand: every thread has as many tiles as the others.
inline void bind_equal_split(Case &c, const std::shared_ptr<Weights> &w) {
  auto x = std::make_shared<Buffer>(static_cast<size_t>(c.k) * 2);
  auto y = std::make_shared<Buffer>(static_cast<size_t>(c.n) * 2);
  fill_normal(*x, FDK_BF16, 0.0F, 1.0F);
  c.name += "_equal_split";
  c.call = [c, w, x, y](int64_t copy) {
    const Product whole = make_product(c, *w, copy % w->copies, *x, *y);
    const int64_t tiles = num_tiles(c.n);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(static_cast<int>(c.threads)) schedule(static)
#endif
    for (int64_t i = 0; i < c.threads; ++i) {
      const int64_t begin = tiles * i / c.threads;
      const int64_t count = tiles * (i + 1) / c.threads - begin;
      const auto part = [&](size_t bytes) { return static_cast<int64_t>(bytes) / tiles; };
      Product p = whole;
      p.weight.out_features = count * kTileRows;
      p.weight.packed += begin * part(whole.weight.packed_bytes);
      p.weight.packed_bytes = static_cast<size_t>(count * part(whole.weight.packed_bytes));
      p.weight.scales =
          static_cast<const char *>(whole.weight.scales) + begin * part(whole.weight.scales_bytes);
      p.weight.scales_bytes = static_cast<size_t>(count * part(whole.weight.scales_bytes));
      p.args.y = y->as<uint16_t>() + begin * kTileRows;
      p.args.y_bytes = static_cast<size_t>(count * kTileRows * 2);
      p.args.num_threads = 1;
      check(fdk_matmul(&p.weight, &p.args));
    }
  };
}

// --- baselines ---------------------------------------------------------------------------------

inline Case dense_case(const Options &o, int64_t m, int64_t k, int64_t n, int64_t threads) {
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
    const fdk_dense_args args{sizeof(fdk_dense_args),
                              m,
                              n,
                              k,
                              x->as<uint16_t>(),
                              x->size,
                              w.as<uint16_t>(),
                              w.size,
                              y->as<uint16_t>(),
                              y->size,
                              static_cast<int32_t>(threads),
                              0};
    check(fdk_dense_matmul(&args));
  };
  return c;
}

// The start of a call is nothing beside it.
inline constexpr size_t kProbeBytes = 64 << 20;

inline Case probe_case(const std::shared_ptr<const Buffer> &memory, bool copy, int64_t threads) {
  Case c;
  c.name = copy ? "probe_copy" : "probe_reduce_sum";
  c.dtype = "int32";
  c.threads = threads;
  const size_t bytes = std::min(kProbeBytes, memory->size);
  c.bytes = static_cast<double>(copy ? 2 * bytes : bytes);
  const auto pieces = static_cast<int64_t>(memory->size / bytes);
  c.call = [=](int64_t i) {
    char *at = memory->as<char>() + static_cast<size_t>(i % pieces) * bytes;
    if (copy) {
      char *to = memory->as<char>() + static_cast<size_t>((i + pieces / 2) % pieces) * bytes;
      check(fdk_probe_copy(at, to, bytes, static_cast<int32_t>(threads)));
    } else {
      int64_t sum = 0;
      check(fdk_probe_reduce_sum(reinterpret_cast<int32_t *>(at), bytes,
                                 static_cast<int32_t>(threads), &sum));
    }
  };
  return c;
}

// Reads the memory that the copies of a weight are in: on a virtual machine one part of its memory
// is read up to twice as fast as another, so that a probe of other memory bounds nothing.
inline Case weights_probe(const Case &product, const std::shared_ptr<Weights> &weights) {
  Case c = probe_case({weights, &weights->packed}, false, product.threads);
  c.k = product.k;
  c.n = product.n;
  c.bits = product.bits;
  c.codebook = product.codebook;
  return c;
}

}  // namespace fdk::bench
