// The C boundary: checks, then work; exceptions become error codes here and nowhere else.
#include "api.h"

#include <cstring>
#include <exception>
#include <initializer_list>
#include <new>
#include <string>
#include <vector>

#include "convert.h"
#include "dispatch.h"
#include "layout.h"
#include "numeric.h"
#include "plan.h"

namespace fdk {
namespace {

// A fixed buffer: recording a failure must not fail.
thread_local char t_message[512] = "";

fdk_status fail(fdk_status status, const char *message) noexcept {
  std::strncpy(t_message, message, sizeof t_message - 1);
  t_message[sizeof t_message - 1] = '\0';
  return status;
}

template <typename Function>
fdk_status guarded(Function function) noexcept {
  t_message[0] = '\0';
  try {
    function();
    return FDK_OK;
  } catch (const Error &error) {
    return fail(error.status, error.what());
  } catch (const std::bad_alloc &) {
    return fail(FDK_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception &error) {
    return fail(FDK_INTERNAL, error.what());
  } catch (...) {
    return fail(FDK_INTERNAL, "unknown failure");
  }
}

int threads_or_default(int32_t threads) {
  require(threads >= 0 && threads <= 4096, "num_threads must be in [0, 4096]");
  return threads > 0 ? threads : default_num_threads();
}

void check_dense(const fdk_dense_args &args) {
  require(args.struct_size == sizeof(fdk_dense_args), "fdk_dense_args.struct_size is wrong");
  require(args.m >= 1 && args.out_features >= 1 && args.in_features >= 1,
          "m, out_features and in_features must be positive");
  check_buffer("x", args.x, args.x_bytes, checked_product(args.m, args.in_features, 2), 2);
  check_buffer("weight", args.weight, args.weight_bytes,
               checked_product(args.out_features, args.in_features, 2), 2);
  check_buffer("y", args.y, args.y_bytes, checked_product(args.m, args.out_features, 2), 2);
  check_apart("x", args.x, args.x_bytes, args.y, args.y_bytes);
  check_apart("weight", args.weight, args.weight_bytes, args.y, args.y_bytes);
}

struct LayoutSizes {
  size_t packed, scales, tiled_packed, tiled_scales, scale;  // scale: of one
};

LayoutSizes check_layout(const fdk_layout &layout) {
  require(layout.struct_size == sizeof(fdk_layout), "fdk_layout.struct_size is wrong");
  check_bits(layout.bits);
  check_group_size(layout.group_size);
  check_dtype(layout.scales_dtype, "scales_dtype");
  const int64_t n = layout.out_features;
  const int64_t k = layout.in_features;
  require(n >= 1 && k >= 1 && n < (int64_t{1} << 40) && k < (int64_t{1} << 40),
          "out_features and in_features must be positive (and below 2**40)");
  const int64_t groups = ceil_div(k, layout.group_size);
  const size_t scale_size = dtype_size(layout.scales_dtype);
  return {checked_product(n, ceil_div(k * layout.bits, 8)), checked_product(n, groups) * scale_size,
          checked_product(num_tiles(n), num_steps(k, layout.bits), kStepBytes),
          checked_product(num_tiles(n), groups, kTileRows) * scale_size, scale_size};
}

struct Buffer {
  const char *name;
  const void *data;
  size_t bytes;
};

void check_conversion(std::initializer_list<Buffer> sources,
                      std::initializer_list<Buffer> results) {
  for (const Buffer &source : sources)
    for (const Buffer &result : results)
      check_apart(source.name, source.data, source.bytes, result.data, result.bytes);
}

// Runs work(begin, end) over the tiles of the layout.
template <typename Work>
void for_tiles(const fdk_layout &layout, Work work) {
  for_pieces(openmp_team(), threads_or_default(layout.num_threads), num_tiles(layout.out_features),
             1, work);
}

}  // namespace

fdk_status matmul(const fdk_weight *weight, const fdk_matmul_args *args, const Team &team) {
  return guarded([&] {
    require(weight != nullptr && args != nullptr, "weight or args is null");
    const OwnedPlan plan(*weight, *args);
    run_plan(plan.get(), team, threads_or_default(args->num_threads));
  });
}

fdk_status prompt_attention(const PromptAttention &args, const Team &team) {
  return guarded([&] { run_prompt_attention(args, team, threads_or_default(0)); });
}

fdk_status attention(const Attention &args, const Team &team) {
  return guarded([&] { run_attention(args, team, threads_or_default(0)); });
}

fdk_status few_tokens(FewTokens args, const void *x, fdk_dtype x_dtype, const Team &team) {
  return guarded([&] {
    std::vector<float> wide(static_cast<size_t>(args.m * args.k));
    for (size_t i = 0; i < wide.size(); ++i)
      wide[i] = load_as_f32(x, x_dtype, static_cast<int64_t>(i));
    args.x = wide.data();
    run_few_tokens(args, team, threads_or_default(0));
  });
}

}  // namespace fdk

using namespace fdk;

extern "C" {

int32_t fdk_abi_version(void) { return FDK_ABI_VERSION; }

const char *fdk_last_error(void) { return t_message; }

fdk_status fdk_matmul(const fdk_weight *weight, const fdk_matmul_args *args) {
  return matmul(weight, args, openmp_team());
}

fdk_status fdk_kernel_name(const fdk_weight *weight, const fdk_matmul_args *args,
                           const char **name) {
  return guarded([&] {
    require(weight != nullptr && args != nullptr && name != nullptr, "an argument is null");
    const OwnedPlan plan(*weight, *args);
    *name = choose_kernel(plan.get()).name;
  });
}

fdk_status fdk_dense_matmul(const fdk_dense_args *args) {
  return guarded([&] {
    require(args != nullptr, "args is null");
    check_dense(*args);
    run_dense(*args, openmp_team(), threads_or_default(args->num_threads));
  });
}

fdk_status fdk_tiled_packed_bytes(int64_t out_features, int64_t in_features, int32_t bits,
                                  size_t *bytes) {
  return guarded([&] {
    require(bytes != nullptr, "bytes is null");
    const fdk_layout layout{sizeof(fdk_layout), out_features, in_features, 8, bits, FDK_F32, 1, 0};
    *bytes = check_layout(layout).tiled_packed;
  });
}

fdk_status fdk_tiled_scales_count(int64_t out_features, int64_t in_features, int64_t group_size,
                                  size_t *count) {
  return guarded([&] {
    require(count != nullptr, "count is null");
    const fdk_layout layout{
        sizeof(fdk_layout), out_features, in_features, group_size, 8, FDK_BF16, 1, 0};
    *count = check_layout(layout).tiled_scales / dtype_size(FDK_BF16);
  });
}

fdk_status fdk_to_tiled(const fdk_layout *layout, const uint8_t *packed, size_t packed_bytes,
                        const void *scales, size_t scales_bytes, uint8_t *tiled_packed,
                        size_t tiled_packed_bytes, void *tiled_scales, size_t tiled_scales_bytes) {
  return guarded([&] {
    require(layout != nullptr, "layout is null");
    const LayoutSizes sizes = check_layout(*layout);
    check_buffer("packed", packed, packed_bytes, sizes.packed, 1);
    check_buffer("scales", scales, scales_bytes, sizes.scales, sizes.scale);
    check_buffer("tiled_packed", tiled_packed, tiled_packed_bytes, sizes.tiled_packed, 1);
    check_buffer("tiled_scales", tiled_scales, tiled_scales_bytes, sizes.tiled_scales, sizes.scale);
    check_conversion({{"packed", packed, packed_bytes}, {"scales", scales, scales_bytes}},
                     {{"tiled_packed", tiled_packed, tiled_packed_bytes},
                      {"tiled_scales", tiled_scales, tiled_scales_bytes}});
    for_tiles(*layout, [&](int64_t begin, int64_t end) {
      pack_tiles(*layout, packed, tiled_packed, begin, end);
      pack_scales(*layout, scales, tiled_scales, begin, end);
    });
  });
}

fdk_status fdk_from_tiled(const fdk_layout *layout, const uint8_t *tiled_packed,
                          size_t tiled_packed_bytes, const void *tiled_scales,
                          size_t tiled_scales_bytes, uint8_t *packed, size_t packed_bytes,
                          void *scales, size_t scales_bytes) {
  return guarded([&] {
    require(layout != nullptr, "layout is null");
    const LayoutSizes sizes = check_layout(*layout);
    check_buffer("tiled_packed", tiled_packed, tiled_packed_bytes, sizes.tiled_packed, 1);
    check_buffer("tiled_scales", tiled_scales, tiled_scales_bytes, sizes.tiled_scales, sizes.scale);
    check_buffer("packed", packed, packed_bytes, sizes.packed, 1);
    check_buffer("scales", scales, scales_bytes, sizes.scales, sizes.scale);
    check_conversion({{"tiled_packed", tiled_packed, tiled_packed_bytes},
                      {"tiled_scales", tiled_scales, tiled_scales_bytes}},
                     {{"packed", packed, packed_bytes}, {"scales", scales, scales_bytes}});
    for_tiles(*layout, [&](int64_t begin, int64_t end) {
      unpack_tiles(*layout, tiled_packed, packed, begin, end);
      unpack_scales(*layout, tiled_scales, scales, begin, end);
    });
  });
}

fdk_status fdk_probe_copy(const void *source, void *target, size_t bytes, int32_t num_threads) {
  return guarded([&] {
    require(source != nullptr && target != nullptr, "source or target is null");
    run_probe_copy(source, target, bytes, openmp_team(), threads_or_default(num_threads));
  });
}

fdk_status fdk_probe_reduce_sum(const int32_t *source, size_t bytes, int32_t num_threads,
                                int64_t *sum) {
  return guarded([&] {
    require(source != nullptr && sum != nullptr, "source or sum is null");
    require(bytes % sizeof(int32_t) == 0, "bytes must be a multiple of 4");
    *sum = run_probe_sum(source, bytes / sizeof(int32_t), openmp_team(),
                         threads_or_default(num_threads));
  });
}

const char *fdk_isa(void) { return current_isa().name; }

int32_t fdk_num_isas(void) { return static_cast<int32_t>(all_isas().size()); }

const char *fdk_isa_at(int32_t index) {
  const auto isas = all_isas();
  if (index < 0 || static_cast<size_t>(index) >= isas.size()) return nullptr;
  return isas[static_cast<size_t>(index)]->name;
}

int32_t fdk_isa_available(const char *name) {
  const Isa *isa = name == nullptr ? nullptr : find_isa(name);
  return isa != nullptr && isa->available() ? 1 : 0;
}

fdk_status fdk_set_isa(const char *name) {
  return guarded([&] { set_isa(name); });
}

int32_t fdk_default_num_threads(void) { return default_num_threads(); }

}  // extern "C"
