#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "numeric.h"

namespace fdk {

void invalid(const std::string &message) { throw Error(FDK_INVALID_ARGUMENT, message); }

void require(bool condition, const char *message) {
  if (!condition) invalid(message);
}

void check_bits(int bits) {
  if (bits != 1 && bits != 2 && bits != 4 && bits != 8)
    invalid("bits must be 1, 2, 4 or 8, not " + std::to_string(bits));
}

namespace {

// The number that a caller put into an enumeration; reading it as one needs a valid value.
template <typename Enum>
int raw(const Enum &value) {
  static_assert(sizeof(int) == sizeof(Enum));
  int number = 0;
  std::memcpy(&number, &value, sizeof number);
  return number;
}

}  // namespace

void check_dtype(const fdk_dtype &dtype, const char *name) {
  const int number = raw(dtype);
  if (number < FDK_F32 || number > FDK_BF16)
    invalid(std::string(name) + " is not a dtype of the library: " + std::to_string(number));
}

void check_group_size(int64_t group_size) {
  if (group_size < 8 || group_size % 8 != 0 || group_size >= int64_t{1} << 40)
    invalid("group_size must be a positive multiple of 8 (and below 2**40), not " +
            std::to_string(group_size));
}

size_t checked_product(int64_t a, int64_t b, int64_t c) {
  int64_t ab = 0;
  int64_t abc = 0;
  if (__builtin_mul_overflow(a, b, &ab) || __builtin_mul_overflow(ab, c, &abc) || abc < 0)
    invalid("the sizes overflow");
  return static_cast<size_t>(abc);
}

void check_buffer(const char *name, const void *data, size_t given, size_t expected,
                  size_t element) {
  if (data == nullptr) invalid(std::string(name) + " is null");
  if (given != expected)
    invalid(std::string(name) + " has " + std::to_string(given) + " bytes, expected " +
            std::to_string(expected));
  if (reinterpret_cast<uintptr_t>(data) % element != 0)
    invalid(std::string(name) + " is not aligned to its elements of " + std::to_string(element) +
            " bytes");
}

void check_apart(const char *name, const void *data, size_t bytes, const void *result,
                 size_t result_bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const auto result_begin = reinterpret_cast<uintptr_t>(result);
  if (data != nullptr && begin < result_begin + result_bytes && result_begin < begin + bytes)
    invalid(std::string(name) + " overlaps the result");
}

namespace {

void check_shape(const fdk_weight &weight, const fdk_matmul_args &args) {
  // Blocks hold columns in 32 bits; rows and tokens follow the same bound.
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() / 2;
  if (weight.out_features < 1 || weight.in_features < 1 || args.m < 1 ||
      weight.out_features > limit || weight.in_features > limit || args.m > limit)
    invalid("m, out_features and in_features must be in [1, 2**30), not " + std::to_string(args.m) +
            ", " + std::to_string(weight.out_features) + ", " + std::to_string(weight.in_features));
}

void check_buffers(const fdk_weight &weight, const fdk_matmul_args &args) {
  const int64_t n = weight.out_features;
  const int64_t k = weight.in_features;
  const int64_t tiles = num_tiles(n);
  const size_t scale_size = dtype_size(weight.scales_dtype);
  const size_t x_size = dtype_size(args.x_dtype);
  const size_t y_size = dtype_size(args.y_dtype);
  check_buffer("packed", weight.packed, weight.packed_bytes,
               checked_product(tiles, num_steps(k, weight.bits), kStepBytes), 1);
  check_buffer("scales", weight.scales, weight.scales_bytes,
               checked_product(tiles, ceil_div(k, weight.group_size), kTileRows) * scale_size,
               scale_size);
  if (weight.num_codebooks < 1 || n % weight.num_codebooks != 0)
    invalid("num_codebooks must divide out_features = " + std::to_string(n) + ", but is " +
            std::to_string(weight.num_codebooks));
  check_buffer("codebook", weight.codebook, weight.codebook_bytes,
               checked_product(weight.num_codebooks, int64_t{1} << weight.bits, sizeof(float)),
               sizeof(float));
  check_buffer("x", args.x, args.x_bytes, checked_product(args.m, k) * x_size, x_size);
  check_buffer("y", args.y, args.y_bytes, checked_product(args.m, n) * y_size, y_size);
  if (args.bias != nullptr) {
    const size_t bias_size = dtype_size(args.bias_dtype);
    check_buffer("bias", args.bias, args.bias_bytes, static_cast<size_t>(n) * bias_size, bias_size);
  }
  check_apart("packed", weight.packed, weight.packed_bytes, args.y, args.y_bytes);
  check_apart("scales", weight.scales, weight.scales_bytes, args.y, args.y_bytes);
  check_apart("codebook", weight.codebook, weight.codebook_bytes, args.y, args.y_bytes);
  check_apart("x", args.x, args.x_bytes, args.y, args.y_bytes);
  check_apart("bias", args.bias, args.bias_bytes, args.y, args.y_bytes);
}

void check(const fdk_weight &weight, const fdk_matmul_args &args) {
  require(weight.struct_size == sizeof(fdk_weight), "fdk_weight.struct_size is wrong");
  require(args.struct_size == sizeof(fdk_matmul_args), "fdk_matmul_args.struct_size is wrong");
  check_shape(weight, args);
  check_bits(weight.bits);
  check_group_size(weight.group_size);
  check_dtype(weight.scales_dtype, "scales_dtype");
  check_dtype(args.x_dtype, "x_dtype");
  check_dtype(args.y_dtype, "y_dtype");
  if (args.bias != nullptr) check_dtype(args.bias_dtype, "bias_dtype");
  const int arithmetic = raw(args.arithmetic);
  if (arithmetic < FDK_EXACT || arithmetic > FDK_INT8)
    invalid("arithmetic is unknown: " + std::to_string(arithmetic));
  require(args.num_threads >= 0, "num_threads is negative");
  check_buffers(weight, args);
}

}  // namespace

OwnedPlan::OwnedPlan(const fdk_weight &weight, const fdk_matmul_args &args) {
  check(weight, args);
  plan_.m = args.m;
  plan_.n = weight.out_features;
  plan_.k = weight.in_features;
  plan_.bits = weight.bits;
  // Beyond K a group's size means nothing; whole blocks keep what is derived from it small.
  plan_.group_size =
      std::min(weight.group_size, ceil_div(weight.in_features, kMaxBlock) * kMaxBlock);
  plan_.uniform = weight.uniform != 0 || weight.bits == 1;
  plan_.arithmetic = args.arithmetic;
  plan_.x = args.x;
  plan_.x_dtype = args.x_dtype;
  plan_.y = args.y;
  plan_.y_dtype = args.y_dtype;
  plan_.bias = args.bias;
  plan_.bias_dtype = args.bias == nullptr ? FDK_F32 : args.bias_dtype;
  plan_.packed = weight.packed;
  plan_.scales = weight.scales;
  plan_.scales_dtype = weight.scales_dtype;
  plan_.tiles = num_tiles(plan_.n);
  plan_.steps = num_steps(plan_.k, plan_.bits);
  plan_.groups = ceil_div(plan_.k, plan_.group_size);
  plan_.num_codebooks = weight.num_codebooks;
  build_blocks();
  build_codebooks(weight.codebook);
}

void OwnedPlan::build_blocks() {
  const int64_t columns = step_k(plan_.bits);
  const int64_t parts = ceil_div(plan_.group_size, kMaxBlock);
  const int64_t length = ceil_div(ceil_div(plan_.group_size, parts), 8) * 8;
  blocks_.reserve(static_cast<size_t>(plan_.groups * parts));
  for (int64_t group = 0; group < plan_.groups; ++group) {
    const int64_t end = std::min((group + 1) * plan_.group_size, plan_.k);
    for (int64_t k0 = group * plan_.group_size; k0 < end; k0 += length) {
      const int64_t block_end = std::min(k0 + length, end);
      blocks_.push_back({static_cast<int32_t>(k0), static_cast<int32_t>(block_end - k0),
                         static_cast<int32_t>(group), static_cast<int32_t>(k0 / columns),
                         static_cast<int32_t>(ceil_div(block_end, columns))});
    }
  }
  plan_.blocks = blocks_;
}

namespace {

// Towards zero, within bounds: no value of a codebook, not even NaN, may leave the integers.
int truncate(float value, float low, float high) {
  return static_cast<int>(value > low ? std::min(value, high) : low);
}

// Integers for int8: the codebook's range on 0..top, where top is the one of 224..255 that rounds
// with the smallest squared error.
void round_levels8(const float *codebook, int count, uint8_t *levels, Levels &out) {
  const auto [low, high] = std::minmax_element(codebook, codebook + count);
  const float base = *low;
  const float range = *high - *low;
  out.offset8 = base;
  out.factor8 = 1.0F;  // never 0: kernels divide by it
  if (!(range > 0.0F)) {
    std::fill(levels, levels + count, uint8_t{0});
    return;
  }
  float best_top = 255.0F;
  float best_error = std::numeric_limits<float>::infinity();
  for (int top = 224; top <= 255 && count <= 16; ++top) {
    const float per_level = static_cast<float>(top) / range;
    float error = 0.0F;
    for (int i = 0; i < count; ++i) {
      const float level = (codebook[i] - base) * per_level;
      const float miss = level - static_cast<float>(truncate(level + 0.5F, 0.0F, 255.0F));
      error += miss * miss;
    }
    error /= per_level * per_level;
    if (error < best_error) {
      best_error = error;
      best_top = static_cast<float>(top);
    }
  }
  out.factor8 = range / best_top;
  for (int i = 0; i < count; ++i)
    levels[i] = static_cast<uint8_t>(
        truncate((codebook[i] - base) * (best_top / range) + 0.5F, 0.0F, 255.0F));
}

// Integers for int16: the codebook's range on -4095..4095.
void round_levels16(const float *codebook, int count, int16_t *levels, Levels &out) {
  constexpr float top = 4095.0F;
  const auto [low, high] = std::minmax_element(codebook, codebook + count);
  const float middle = 0.5F * *low + 0.5F * *high;
  const float half = *high - middle;
  out.offset16 = middle;
  out.factor16 = half > 0.0F ? half / top : 1.0F;  // never 0: kernels divide by it
  for (int i = 0; i < count; ++i) {
    const float level = half > 0.0F ? (codebook[i] - middle) * (top / half) : 0.0F;
    levels[i] = static_cast<int16_t>(truncate(std::nearbyint(level), -top, top));
  }
}

}  // namespace

// Whether levels 0..count-1 stand for the codebook well enough: rounding it to bfloat16 moves its
// values off the line by an error that int8 activations hide and int16 ones do not. A codebook of
// one value has no step to divide by.
bool OwnedPlan::is_affine(const float *codebook, int count) const {
  const float step = (codebook[count - 1] - codebook[0]) / static_cast<float>(count - 1);
  if (step == 0.0F) return false;
  if (plan_.arithmetic == FDK_INT8) return true;
  for (int q = 0; q < count; ++q)
    if (std::fabs(codebook[q] - (codebook[0] + static_cast<float>(q) * step)) >
        1e-5F * std::fabs(codebook[count - 1] - codebook[0]))
      return false;
  return true;
}

void OwnedPlan::fill_levels(const float *codebook, int count, uint8_t *levels8, int16_t *levels16,
                            Levels &out) const {
  if (!plan_.uniform) {
    out.x_limit16 = 8191;  // 8191 * 4095 * kMaxBlock < 2**31
    if (plan_.arithmetic == FDK_INT8) round_levels8(codebook, count, levels8, out);
    else round_levels16(codebook, count, levels16, out);
    return;
  }
  out.x_limit16 = 32767;  // 32767 * 255 * kMaxBlock < 2**31
  out.offset8 = out.offset16 = codebook[0];
  out.factor8 = out.factor16 = (codebook[count - 1] - codebook[0]) / static_cast<float>(count - 1);
  for (int q = 0; q < count; ++q) {
    levels8[q] = static_cast<uint8_t>(q);
    levels16[q] = static_cast<int16_t>(q);
  }
}

void OwnedPlan::build_codebooks(const float *codebook) {
  const int count = 1 << plan_.bits;
  const size_t total = static_cast<size_t>(plan_.num_codebooks) * static_cast<size_t>(count);
  codebook_.resize(total);
  for (size_t i = 0; i < total; ++i) codebook_[i] = round_to(codebook[i], plan_.scales_dtype);
  plan_.codebook_is_bfloat16 = std::all_of(codebook_.begin(), codebook_.end(), [](float value) {
    return round_to(value, FDK_BF16) == value;
  });
  plan_.codebook = codebook_.data();
  if (plan_.arithmetic == FDK_EXACT) return;

  levels8_.resize(total);
  levels16_.resize(total);
  levels_.resize(static_cast<size_t>(plan_.num_codebooks));
  for (size_t c = 0; c < levels_.size(); ++c) {
    const size_t first = c * static_cast<size_t>(count);
    if (!is_affine(&codebook_[first], count)) plan_.uniform = false;
    levels_[c].level8 = &levels8_[first];
    levels_[c].level16 = &levels16_[first];
  }
  for (size_t c = 0; c < levels_.size(); ++c) {
    const size_t first = c * static_cast<size_t>(count);
    fill_levels(&codebook_[first], count, &levels8_[first], &levels16_[first], levels_[c]);
  }
  plan_.levels = levels_.data();
}

}  // namespace fdk
