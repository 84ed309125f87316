// The scalar twin: every kernel written plainly. It runs on any machine, and every other kernel is
// tested against it.
#include <cmath>
#include <cstring>

#include "isas.h"
#include "kernel.h"
#include "numeric.h"
#include "prompt_attention.h"

namespace fdk {
namespace {

bool supports_all(const Plan &) { return true; }
bool supports_exact(const Plan &plan) { return plan.arithmetic == FDK_EXACT; }

// The code of row r of a tile at column k.
int code_at(const Plan &plan, const uint8_t *tile, int64_t row, int64_t k) {
  const int64_t columns = step_k(plan.bits);
  const CodePosition at = code_position(plan.bits, row, k % columns);
  const int byte = tile[(k / columns) * kStepBytes + at.byte];
  return (byte >> at.shift) & ((1 << plan.bits) - 1);
}

// Exact: prepared = x as float32 [m][k].
size_t exact_prepared_bytes(const Plan &plan) {
  return static_cast<size_t>(plan.m * plan.k) * sizeof(float);
}

void exact_prepare(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end) {
  float *x = static_cast<float *>(prepared);
  for (int64_t i = token_begin * plan.k; i < token_end * plan.k; ++i)
    x[i] = load_as_f32(plan.x, plan.x_dtype, i);
}

void exact_run(const Plan &plan, const void *prepared, void *, const Range &range) {
  const float *x = static_cast<const float *>(prepared);
  const float *codebook = plan.codebook + (range.codebook << plan.bits);
  for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
    const uint8_t *packed = plan.tile_packed(tile);
    for (int64_t token = range.token_begin; token < range.token_end; ++token) {
      float sums[kTileRows] = {};
      for (const Block &block : plan.blocks) {
        float scales[kTileRows];
        load_scales(plan, tile, block.group, scales);
        for (int64_t r = 0; r < kTileRows; ++r) {
          float sum = 0.0F;
          for (int64_t k = block.k0; k < block.k0 + block.length; ++k)
            sum += codebook[code_at(plan, packed, r, k)] * x[token * plan.k + k];
          sums[r] += scales[r] * sum;
        }
      }
      store_tile(plan, token, tile, range, sums);
    }
  }
}

// Integer: prepared = for each token, float32 scales [blocks], int32 sums [blocks], int16 x [k].
int64_t integer_stride(const Plan &plan) {
  const int64_t bytes = static_cast<int64_t>(plan.blocks.size()) * 8 + plan.k * 2;
  return ceil_div(bytes, 64) * 64;
}

size_t integer_prepared_bytes(const Plan &plan) {
  return static_cast<size_t>(plan.m * integer_stride(plan));
}

struct IntegerToken {
  float *scales;
  int32_t *sums;
  int16_t *x;
  IntegerToken(const Plan &plan, void *prepared, int64_t token) {
    char *base = static_cast<char *>(prepared) + token * integer_stride(plan);
    scales = reinterpret_cast<float *>(base);
    sums = reinterpret_cast<int32_t *>(base) + plan.blocks.size();
    x = reinterpret_cast<int16_t *>(sums + plan.blocks.size());
  }
};

int32_t x_limit(const Plan &plan) {
  return plan.arithmetic == FDK_INT8 ? 127 : plan.levels[0].x_limit16;
}

void integer_prepare(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end) {
  for (int64_t token = token_begin; token < token_end; ++token) {
    const IntegerToken out(plan, prepared, token);
    for (size_t b = 0; b < plan.blocks.size(); ++b) {
      const Block &block = plan.blocks[b];
      uint32_t magnitude = 0;
      for (int64_t k = block.k0; k < block.k0 + block.length; ++k) {
        const float value = load_as_f32(plan.x, plan.x_dtype, token * plan.k + k);
        const uint32_t u = std::bit_cast<uint32_t>(value) & 0x7fffffffU;
        if (u > magnitude) magnitude = u;
      }
      const BlockScale scale = block_scale(magnitude, x_limit(plan));
      int32_t sum = 0;
      for (int64_t k = block.k0; k < block.k0 + block.length; ++k) {
        const float value = load_as_f32(plan.x, plan.x_dtype, token * plan.k + k);
        const int32_t q =
            scale.inverse == 0.0F ? 0 : static_cast<int32_t>(std::nearbyint(value * scale.inverse));
        out.x[k] = static_cast<int16_t>(q);
        sum += q;
      }
      out.scales[b] = scale.scale;
      out.sums[b] = sum;
    }
  }
}

void integer_run(const Plan &plan, const void *prepared, void *, const Range &range) {
  const Levels &levels = plan.levels[range.codebook];
  const bool int8 = plan.arithmetic == FDK_INT8;
  const float offset = int8 ? levels.offset8 : levels.offset16;
  const float factor = int8 ? levels.factor8 : levels.factor16;
  for (int64_t tile = range.tile_begin; tile < range.tile_end; ++tile) {
    const uint8_t *packed = plan.tile_packed(tile);
    for (int64_t token = range.token_begin; token < range.token_end; ++token) {
      const IntegerToken in(plan, const_cast<void *>(prepared), token);
      float sums[kTileRows] = {};
      for (size_t b = 0; b < plan.blocks.size(); ++b) {
        const Block &block = plan.blocks[b];
        float scales[kTileRows];
        load_scales(plan, tile, block.group, scales);
        for (int64_t r = 0; r < kTileRows; ++r) {
          int32_t sum = 0;
          for (int64_t k = block.k0; k < block.k0 + block.length; ++k) {
            const int code = code_at(plan, packed, r, k);
            sum += (int8 ? int32_t{levels.level8[code]} : int32_t{levels.level16[code]}) * in.x[k];
          }
          const float value =
              factor * static_cast<float>(sum) + offset * static_cast<float>(in.sums[b]);
          sums[r] += scales[r] * (in.scales[b] * value);
        }
      }
      store_tile(plan, token, tile, range, sums);
    }
  }
}

void dense_rows(const fdk_dense_args &args, int64_t row_begin, int64_t row_end) {
  for (int64_t n = row_begin; n < row_end; ++n) {
    for (int64_t m = 0; m < args.m; ++m) {
      float sum = 0.0F;
      for (int64_t k = 0; k < args.in_features; ++k)
        sum += bf16_to_f32(args.weight[n * args.in_features + k]) *
               bf16_to_f32(args.x[m * args.in_features + k]);
      args.y[m * args.out_features + n] = f32_to_bf16(sum);
    }
  }
}

void probe_copy(const void *source, void *target, size_t bytes) {
  std::memcpy(target, source, bytes);
}

int64_t probe_sum(const int32_t *source, size_t count) {
  int64_t sum = 0;
  for (size_t i = 0; i < count; ++i) sum += source[i];
  return sum;
}

constexpr Kernel kKernels[] = {
    {"scalar.exact", supports_exact, exact_prepared_bytes, exact_prepare, nullptr, exact_run, 1},
    {"scalar.integer", supports_all, integer_prepared_bytes, integer_prepare, nullptr, integer_run,
     1},
};

bool available() { return true; }

}  // namespace

const Isa kScalarIsa = {"scalar",   available, kKernels,  dense_rows,
                        probe_copy, probe_sum, &kDecoding};

}  // namespace fdk
