// The Python module: XLA FFI handlers for use inside jit, and the functions of the C interface that
// Python needs outside of it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "api.h"
#include "compiler.h"
#include "fdk.h"
#include "numeric.h"
#include "xla/ffi/api/ffi.h"

namespace py = pybind11;
namespace ffi = xla::ffi;

namespace {

// XLA's own threads as a team. Tasks that start after the work is done find the door closed and
// leave; nobody waits for a task that has not started.
struct Door {
  static constexpr int kClosed = 1 << 30;
  std::atomic<int> inside{0};
  fdk::Body body;
  void *context;

  void visit() {
    if ((inside.fetch_add(1, std::memory_order_acq_rel) & kClosed) == 0) body(context);
    inside.fetch_sub(1, std::memory_order_acq_rel);
  }

  void close_and_wait() {
    inside.fetch_or(kClosed, std::memory_order_acq_rel);
    for (int spins = 0; inside.load(std::memory_order_acquire) != kClosed; ++spins)
      if (spins > 2000) std::this_thread::yield();
  }
};

void run_inside_xla(const fdk::Team &team, int threads, fdk::Body body, void *context) {
  if (threads <= 1) return body(context);
  auto &pool = *static_cast<ffi::ThreadPool *>(const_cast<void *>(team.handle));
  const auto door = std::make_shared<Door>();
  door->body = body;
  door->context = context;
  for (int i = 1; i < threads; ++i) pool.Schedule([door] { door->visit(); });
  body(context);
  door->close_and_wait();
}

bool to_dtype(ffi::DataType type, fdk_dtype &out) {
  switch (type) {
    case ffi::DataType::F32: out = FDK_F32; return true;
    case ffi::DataType::F16: out = FDK_F16; return true;
    case ffi::DataType::BF16: out = FDK_BF16; return true;
    default: return false;
  }
}

ffi::Error to_error(fdk_status status) {
  if (status == FDK_OK) return ffi::Error::Success();
  const std::string message = std::string("fdk: ") + fdk_last_error();
  switch (status) {
    case FDK_INVALID_ARGUMENT: return ffi::Error::InvalidArgument(message);
    case FDK_UNSUPPORTED: return ffi::Error(ffi::ErrorCode::kUnimplemented, message);
    case FDK_OUT_OF_MEMORY: return ffi::Error(ffi::ErrorCode::kResourceExhausted, message);
    default: return ffi::Error::Internal(message);
  }
}

// x [M, K], packed [tiles, bytes], scales [tiles, groups, 16], codebook [..., 2**bits] float32,
// bias [N] or [0] -> y [M, N].
ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> packed,
                  ffi::AnyBuffer scales, ffi::Buffer<ffi::F32> codebook, ffi::AnyBuffer bias,
                  ffi::Result<ffi::AnyBuffer> y, int64_t bits, int64_t group_size, bool uniform,
                  int64_t arithmetic) {
  if (x.dimensions().size() != 2 || y->dimensions().size() != 2 || codebook.dimensions().size() < 1)
    return ffi::Error::InvalidArgument("fdk: x and y must have two axes, the codebook one or two");
  fdk_weight weight{};
  weight.struct_size = sizeof weight;
  weight.out_features = y->dimensions()[1];
  weight.in_features = x.dimensions()[1];
  weight.bits = static_cast<int32_t>(bits);
  weight.uniform = uniform ? 1 : 0;
  weight.group_size = group_size;
  weight.packed = packed.typed_data();
  weight.packed_bytes = packed.size_bytes();
  weight.scales = scales.untyped_data();
  weight.scales_bytes = scales.size_bytes();
  weight.codebook = codebook.typed_data();
  weight.codebook_bytes = codebook.size_bytes();
  weight.num_codebooks = codebook.dimensions().size() > 1 ? codebook.dimensions()[0] : 1;
  fdk_matmul_args args{};
  args.struct_size = sizeof args;
  args.m = x.dimensions()[0];
  args.x = x.untyped_data();
  args.x_bytes = x.size_bytes();
  args.y = y->untyped_data();
  args.y_bytes = y->size_bytes();
  args.bias = bias.element_count() == 0 ? nullptr : bias.untyped_data();
  args.bias_bytes = bias.size_bytes();
  args.arithmetic = static_cast<fdk_arithmetic>(arithmetic);
  if (y->dimensions()[0] != args.m || !to_dtype(x.element_type(), args.x_dtype) ||
      !to_dtype(y->element_type(), args.y_dtype) ||
      !to_dtype(bias.element_type(), args.bias_dtype) ||
      !to_dtype(scales.element_type(), weight.scales_dtype))
    return ffi::Error::InvalidArgument(
        "fdk: x, y, scales or bias has a shape or dtype unknown here");
  return to_error(fdk::matmul(&weight, &args, fdk::Team{run_inside_xla, &pool}));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(fdk_ffi_matmul, matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<bool>("uniform")
                                  .Attr<int64_t>("arithmetic"));

// Causal attention of many tokens: q [B, T, H, d], keys and values [B, KV, S, d] or, `by_token`,
// [B, S, KV, d], starts [B] or [1] -> out like q.
ffi::Error prompt_attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys,
                            ffi::AnyBuffer values, ffi::BufferR1<ffi::S32> starts,
                            ffi::Result<ffi::AnyBuffer> out, bool by_token, int64_t window) {
  fdk::PromptAttention args{};
  const auto queries = q.dimensions();
  const auto cache = keys.dimensions();
  if (queries.size() != 4 || cache.size() != 4)
    return ffi::Error::InvalidArgument("fdk: q and keys must have four axes");
  args.batch = queries[0];
  args.tokens = queries[1];
  args.heads = queries[2];
  args.head_dim = queries[3];
  args.kv_heads = cache[by_token ? 2 : 1];
  args.slots = cache[by_token ? 1 : 2];
  args.window = window;
  if (q.element_count() == 0 || keys.element_count() == 0 || cache[0] != args.batch ||
      cache[3] != args.head_dim || args.heads % args.kv_heads != 0 || window < 0 ||
      values.dimensions() != cache || out->dimensions() != queries ||
      keys.element_type() != q.element_type() || values.element_type() != q.element_type() ||
      out->element_type() != q.element_type() || !to_dtype(q.element_type(), args.dtype) ||
      (starts.dimensions()[0] != 1 && starts.dimensions()[0] != args.batch))
    return ffi::Error::InvalidArgument("fdk: attention's shapes or dtypes do not fit one another");
  args.key_sequence = args.kv_heads * args.slots * args.head_dim;
  args.key_head = (by_token ? 1 : args.slots) * args.head_dim;
  args.key_token = (by_token ? args.kv_heads : 1) * args.head_dim;
  args.start_step = starts.dimensions()[0] == 1 ? 0 : 1;
  args.q = q.untyped_data();
  args.keys = keys.untyped_data();
  args.values = values.untyped_data();
  args.starts = starts.typed_data();
  args.out = out->untyped_data();
  return to_error(fdk::prompt_attention(args, fdk::Team{run_inside_xla, &pool}));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(fdk_ffi_prompt_attention, prompt_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("by_token")
                                  .Attr<int64_t>("window"));

// Attention of one token a sequence, which puts its key and value into the cache in place: qkv
// [B, (H + 2 KV) d], cos and sin [B, d / 2], lengths [B], keys and values [B, KV, S, d] (also
// results), norms [d] or [0] -> out [B, H d].
ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::BufferR2<ffi::F32> cos,
                     ffi::BufferR2<ffi::F32> sin, ffi::BufferR1<ffi::S32> lengths,
                     ffi::AnyBuffer keys, ffi::AnyBuffer values, ffi::AnyBuffer q_norm,
                     ffi::AnyBuffer k_norm, ffi::Result<ffi::AnyBuffer> out,
                     ffi::Result<ffi::AnyBuffer> new_keys, ffi::Result<ffi::AnyBuffer> new_values,
                     float norm_eps) {
  fdk::Attention args{};
  const auto cache = keys.dimensions();
  if (cache.size() != 4 || qkv.dimensions().size() != 2 || out->dimensions().size() != 2)
    return ffi::Error::InvalidArgument("fdk: keys must have four axes, qkv and out two");
  args.batch = cache[0];
  args.kv_heads = cache[1];
  args.capacity = cache[2];
  args.head_dim = cache[3];
  if (args.batch < 1 || args.kv_heads < 1 || args.capacity < 1 || args.head_dim < 2 ||
      args.head_dim % 2 != 0)
    return ffi::Error::InvalidArgument("fdk: the cache is empty or its head_dim is odd");
  const int64_t d = args.head_dim;
  args.heads = out->dimensions()[1] / d;
  const auto is = [](auto dimensions, int64_t rows, int64_t columns) {
    return dimensions.size() == 2 && dimensions[0] == rows && dimensions[1] == columns;
  };
  const auto same = [&](auto &buffer) {
    return buffer.element_type() == keys.element_type() && buffer.dimensions() == cache;
  };
  const auto is_norm = [&](auto &buffer) {
    return buffer.element_type() == keys.element_type() &&
           (buffer.element_count() == 0 || buffer.element_count() == static_cast<size_t>(d));
  };
  if (args.heads < 1 || args.heads % args.kv_heads != 0 ||
      !is(out->dimensions(), args.batch, args.heads * d) ||
      !is(qkv.dimensions(), args.batch, (args.heads + 2 * args.kv_heads) * d) ||
      !is(cos.dimensions(), args.batch, d / 2) || !is(sin.dimensions(), args.batch, d / 2) ||
      lengths.dimensions()[0] != args.batch || !same(values) || !same(*new_keys) ||
      !same(*new_values) || !is_norm(q_norm) || !is_norm(k_norm) ||
      qkv.element_type() != keys.element_type() || out->element_type() != keys.element_type() ||
      !to_dtype(keys.element_type(), args.dtype))
    return ffi::Error::InvalidArgument("fdk: attention's shapes or dtypes do not fit the cache's");
  if (keys.untyped_data() != new_keys->untyped_data() ||
      values.untyped_data() != new_values->untyped_data())
    return ffi::Error::InvalidArgument("fdk: attention updates the cache in place: alias it");
  args.qkv = qkv.untyped_data();
  args.cos = cos.typed_data();
  args.sin = sin.typed_data();
  args.lengths = lengths.typed_data();
  args.keys = new_keys->untyped_data();
  args.values = new_values->untyped_data();
  args.q_norm = q_norm.element_count() == 0 ? nullptr : q_norm.untyped_data();
  args.k_norm = k_norm.element_count() == 0 ? nullptr : k_norm.untyped_data();
  args.norm_eps = norm_eps;
  args.out = out->untyped_data();
  return to_error(fdk::attention(args, fdk::Team{run_inside_xla, &pool}));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(fdk_ffi_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("norm_eps"));

// A few tokens x [M, K] times an unquantised weight, [N, K] (`rows`) or [K, N] -> y [M, N].
ffi::Error dense(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                 ffi::Result<ffi::AnyBuffer> y, bool rows) {
  if (x.dimensions().size() != 2 || weight.dimensions().size() != 2 || y->dimensions().size() != 2)
    return ffi::Error::InvalidArgument("fdk: x, weight and y must have two axes");
  fdk::FewTokens args{};
  args.m = x.dimensions()[0];
  args.k = x.dimensions()[1];
  args.n = y->dimensions()[1];
  args.rows = rows;
  fdk_dtype x_dtype{};
  if (y->dimensions()[0] != args.m || args.m > fdk::kFewTokens ||
      weight.dimensions()[rows ? 0 : 1] != args.n || weight.dimensions()[rows ? 1 : 0] != args.k ||
      !to_dtype(x.element_type(), x_dtype) || !to_dtype(weight.element_type(), args.dtype) ||
      !to_dtype(y->element_type(), args.y_dtype))
    return ffi::Error::InvalidArgument(
        "fdk: x, weight and y do not fit each other, or have a dtype unknown here or over 16 "
        "tokens");
  args.weight = weight.untyped_data();
  args.y = y->untyped_data();
  return to_error(
      fdk::few_tokens(args, x.untyped_data(), x_dtype, fdk::Team{run_inside_xla, &pool}));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(fdk_ffi_dense, dense,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("rows"));

// table [N, D], index [M] -> the rows [M, D], out of range the nearest one.
ffi::Error take_rows(ffi::AnyBuffer table, ffi::BufferR1<ffi::S32> index,
                     ffi::Result<ffi::AnyBuffer> rows) {
  const auto from = table.dimensions();
  const auto to = rows->dimensions();
  if (from.size() != 2 || to.size() != 2 || from[0] < 1 || to[1] != from[1] ||
      to[0] != index.dimensions()[0] || rows->element_type() != table.element_type())
    return ffi::Error::InvalidArgument("fdk: the rows do not fit the table and the index");
  const size_t size = table.size_bytes() / static_cast<size_t>(from[0]);
  for (int64_t i = 0; i < to[0]; ++i) {
    const int64_t row = std::clamp<int64_t>(index.typed_data()[i], 0, from[0] - 1);
    std::memcpy(static_cast<char *>(rows->untyped_data()) + static_cast<size_t>(i) * size,
                static_cast<const char *>(table.untyped_data()) + static_cast<size_t>(row) * size,
                size);
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    fdk_ffi_take_rows, take_rows,
    ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::BufferR1<ffi::S32>>().Ret<ffi::AnyBuffer>());

// Of each row of x + delta [M, D]: the sum, and its RMS norm times `scale` [D], which as in the
// models is rounded before it is scaled. What XLA makes of it is six operations.
template <fdk_dtype dtype>
void add_norm_of(const ffi::AnyBuffer &x, const ffi::AnyBuffer &delta, const ffi::AnyBuffer &scale,
                 ffi::AnyBuffer &total, ffi::AnyBuffer &normed, float eps) {
  const int64_t width = x.dimensions()[1];
  std::vector<float> row(static_cast<size_t>(width));
  for (int64_t r = 0; r < x.dimensions()[0]; ++r) {
    float squares = 0.0F;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) {
      const int64_t at = r * width + i;
      const float sum = fdk::load_as_f32(x.untyped_data(), dtype, at) +
                        fdk::load_as_f32(delta.untyped_data(), dtype, at);
      const float value = fdk::round_to(sum, dtype);
      row[static_cast<size_t>(i)] = value;
      squares += value * value;
    }
    const float factor = 1.0F / std::sqrt(squares / static_cast<float>(width) + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float value = row[static_cast<size_t>(i)];
      fdk::store_from_f32(total.untyped_data(), dtype, r * width + i, value);
      const float scaled =
          fdk::round_to(value * factor, dtype) * fdk::load_as_f32(scale.untyped_data(), dtype, i);
      fdk::store_from_f32(normed.untyped_data(), dtype, r * width + i, scaled);
    }
  }
}

ffi::Error add_norm(ffi::AnyBuffer x, ffi::AnyBuffer delta, ffi::AnyBuffer scale,
                    ffi::Result<ffi::AnyBuffer> total, ffi::Result<ffi::AnyBuffer> normed,
                    float eps) {
  const auto like_x = [&](auto &buffer) {
    return buffer.element_type() == x.element_type() && buffer.dimensions() == x.dimensions();
  };
  fdk_dtype dtype{};
  if (x.dimensions().size() != 2 || x.dimensions()[1] < 1 || !like_x(delta) || !like_x(*total) ||
      !like_x(*normed) || scale.element_type() != x.element_type() ||
      scale.element_count() != static_cast<size_t>(x.dimensions()[1]) ||
      !to_dtype(x.element_type(), dtype))
    return ffi::Error::InvalidArgument("fdk: the norm's arrays do not fit one another");
  if (dtype == FDK_F32) add_norm_of<FDK_F32>(x, delta, scale, *total, *normed, eps);
  else if (dtype == FDK_F16) add_norm_of<FDK_F16>(x, delta, scale, *total, *normed, eps);
  else add_norm_of<FDK_BF16>(x, delta, scale, *total, *normed, eps);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(fdk_ffi_add_norm, add_norm,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"));

void check(fdk_status status) {
  if (status == FDK_OK) return;
  const std::string message = fdk_last_error();
  if (status == FDK_INVALID_ARGUMENT) throw py::value_error(message);
  if (status == FDK_OUT_OF_MEMORY) throw std::bad_alloc();
  throw std::runtime_error(message);
}

using Bytes = py::array_t<uint8_t, py::array::c_style>;

fdk_layout make_layout(int32_t bits, int64_t group_size, int64_t n, int64_t k, int64_t scale_size) {
  fdk_layout layout{};
  layout.struct_size = sizeof layout;
  layout.out_features = n;
  layout.in_features = k;
  layout.group_size = group_size;
  layout.bits = bits;
  // Scales are copied, never computed with: only their size matters.
  layout.scales_dtype = scale_size == 4 ? FDK_F32 : FDK_BF16;
  return layout;
}

size_t size_of(const Bytes &bytes) { return static_cast<size_t>(bytes.nbytes()); }

void to_tiled(const Bytes &packed, const Bytes &scales, Bytes &tiled_packed, Bytes &tiled_scales,
              int32_t bits, int64_t group_size, int64_t n, int64_t k, int64_t scale_size) {
  const fdk_layout layout = make_layout(bits, group_size, n, k, scale_size);
  uint8_t *target_packed = tiled_packed.mutable_data();
  uint8_t *target_scales = tiled_scales.mutable_data();
  fdk_status status = FDK_OK;
  {
    const py::gil_scoped_release release;
    status =
        fdk_to_tiled(&layout, packed.data(), size_of(packed), scales.data(), size_of(scales),
                     target_packed, size_of(tiled_packed), target_scales, size_of(tiled_scales));
  }
  check(status);
}

void from_tiled(const Bytes &tiled_packed, const Bytes &tiled_scales, Bytes &packed, Bytes &scales,
                int32_t bits, int64_t group_size, int64_t n, int64_t k, int64_t scale_size) {
  const fdk_layout layout = make_layout(bits, group_size, n, k, scale_size);
  uint8_t *target_packed = packed.mutable_data();
  uint8_t *target_scales = scales.mutable_data();
  fdk_status status = FDK_OK;
  {
    const py::gil_scoped_release release;
    status = fdk_from_tiled(&layout, tiled_packed.data(), size_of(tiled_packed),
                            tiled_scales.data(), size_of(tiled_scales), target_packed,
                            size_of(packed), target_scales, size_of(scales));
  }
  check(status);
}

// The kernel that a product would take. It does not depend on the rows of the weight beyond their
// codebooks, so that one row a codebook stands for all.
std::string kernel_name(int64_t m, int64_t k, int32_t bits, int64_t group_size, bool uniform,
                        int64_t num_codebooks, int32_t x_size, bool x_is_f16, int32_t scales_size,
                        bool scales_are_f16, int32_t arithmetic) {
  const auto dtype = [](int32_t size, bool f16) {
    return size == 4 ? FDK_F32 : f16 ? FDK_F16 : FDK_BF16;
  };
  size_t packed_bytes = 0;
  size_t scales_count = 0;
  check(fdk_tiled_packed_bytes(num_codebooks, k, bits, &packed_bytes));
  check(fdk_tiled_scales_count(num_codebooks, k, group_size, &scales_count));
  const auto element = static_cast<size_t>(x_size);
  const auto rows = static_cast<size_t>(m);
  const std::vector<uint8_t> packed(packed_bytes);
  const std::vector<uint8_t> scales(scales_count * static_cast<size_t>(scales_size));
  const std::vector<uint8_t> x(rows * static_cast<size_t>(k) * element);
  std::vector<uint8_t> y(rows * static_cast<size_t>(num_codebooks) * element);
  const std::vector<float> codebook(static_cast<size_t>(num_codebooks) << bits);
  const fdk_weight weight{sizeof(fdk_weight),
                          num_codebooks,
                          k,
                          bits,
                          uniform ? 1 : 0,
                          group_size,
                          packed.data(),
                          packed.size(),
                          scales.data(),
                          scales.size(),
                          dtype(scales_size, scales_are_f16),
                          0,
                          codebook.data(),
                          codebook.size() * sizeof(float),
                          num_codebooks};
  fdk_matmul_args args{};
  args.struct_size = sizeof args;
  args.m = m;
  args.x = x.data();
  args.x_bytes = x.size();
  args.x_dtype = args.y_dtype = dtype(x_size, x_is_f16);
  args.y = y.data();
  args.y_bytes = y.size();
  args.arithmetic = static_cast<fdk_arithmetic>(arithmetic);
  const char *name = nullptr;
  check(fdk_kernel_name(&weight, &args, &name));
  return name;
}

int64_t reduce_sum(const py::array_t<int32_t, py::array::c_style> &source) {
  const size_t bytes = static_cast<size_t>(source.nbytes());
  int64_t sum = 0;
  fdk_status status = FDK_OK;
  {
    const py::gil_scoped_release release;
    status = fdk_probe_reduce_sum(source.data(), bytes, 0, &sum);
  }
  check(status);
  return sum;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "The CPU library: XLA FFI handlers and the layout conversion.";
  module.attr("interface") = 6;  // raised with every change that fdk_jax/cpu_backend.py must follow
  module.attr("compiler") = fdk::kCompiler;
  module.def(
      "ffi_handlers",
      [] {
        py::dict handlers;
        handlers["fdk_matmul"] = py::capsule(reinterpret_cast<void *>(fdk_ffi_matmul));
        handlers["fdk_prompt_attention"] =
            py::capsule(reinterpret_cast<void *>(fdk_ffi_prompt_attention));
        handlers["fdk_attention"] = py::capsule(reinterpret_cast<void *>(fdk_ffi_attention));
        handlers["fdk_dense"] = py::capsule(reinterpret_cast<void *>(fdk_ffi_dense));
        handlers["fdk_add_norm"] = py::capsule(reinterpret_cast<void *>(fdk_ffi_add_norm));
        handlers["fdk_take_rows"] = py::capsule(reinterpret_cast<void *>(fdk_ffi_take_rows));
        return handlers;
      },
      "FFI handlers by the name of their target.");
  // Scales travel as bytes.
  module.def("to_tiled", to_tiled, py::arg("packed").noconvert(), py::arg("scales").noconvert(),
             py::arg("tiled_packed").noconvert(), py::arg("tiled_scales").noconvert(),
             py::kw_only(), py::arg("bits"), py::arg("group_size"), py::arg("out_features"),
             py::arg("in_features"), py::arg("scale_size"));
  module.def("from_tiled", from_tiled, py::arg("tiled_packed").noconvert(),
             py::arg("tiled_scales").noconvert(), py::arg("packed").noconvert(),
             py::arg("scales").noconvert(), py::kw_only(), py::arg("bits"), py::arg("group_size"),
             py::arg("out_features"), py::arg("in_features"), py::arg("scale_size"));
  module.def("reduce_sum", reduce_sum, py::arg("source").noconvert(),
             "The sum of int32 values, read as fast as the machine does: a probe of bandwidth.");
  module.def("isa", [] { return std::string(fdk_isa()); }, "The ISA in use.");
  module.def("kernel_name", kernel_name, py::kw_only(), py::arg("m"), py::arg("k"), py::arg("bits"),
             py::arg("group_size"), py::arg("uniform"), py::arg("num_codebooks"), py::arg("x_size"),
             py::arg("x_is_f16"), py::arg("scales_size"), py::arg("scales_are_f16"),
             py::arg("arithmetic"), "The kernel that a product takes with the ISA in use.");
  module.def(
      "isas",
      [] {
        py::list names;
        for (int32_t i = 0; i < fdk_num_isas(); ++i)
          if (fdk_isa_available(fdk_isa_at(i)) != 0) names.append(fdk_isa_at(i));
        return names;
      },
      "Levels that this machine can run, the best first.");
  module.def(
      "set_isa",
      [](const py::object &name) {
        check(fdk_set_isa(name.is_none() ? nullptr : name.cast<std::string>().c_str()));
      },
      py::arg("name"), "Forces an ISA; None returns to the best one.");
  module.def("num_threads", &fdk_default_num_threads, "Threads that a call may use now.");
}
