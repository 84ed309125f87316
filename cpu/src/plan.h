// Builds a Plan: checks what the caller gave and derives what every kernel needs.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "kernel.h"

namespace fdk {

// Carries an fdk_status to the C boundary (api.cpp).
struct Error : std::runtime_error {
  fdk_status status;
  Error(fdk_status status_, const std::string &message)
      : std::runtime_error(message), status(status_) {}
};

[[noreturn]] void invalid(const std::string &message);
void require(bool condition, const char *message);

void check_bits(int bits);
void check_dtype(const fdk_dtype &dtype, const char *name);
void check_group_size(int64_t group_size);
// a * b * c with a check for overflow; the factors must not be negative.
size_t checked_product(int64_t a, int64_t b, int64_t c = 1);
// A buffer that is there, has the expected size, and is aligned to its elements.
void check_buffer(const char *name, const void *data, size_t given, size_t expected,
                  size_t element);
// Refuses a result that lies over something that is read while it is written.
void check_apart(const char *name, const void *data, size_t bytes, const void *result,
                 size_t result_bytes);

// A Plan with the storage of what it points to.
class OwnedPlan {
 public:
  OwnedPlan(const fdk_weight &weight, const fdk_matmul_args &args);
  OwnedPlan(const OwnedPlan &) = delete;
  OwnedPlan &operator=(const OwnedPlan &) = delete;

  const Plan &get() const { return plan_; }

 private:
  void build_blocks();
  void build_codebooks(const float *codebook);
  bool is_affine(const float *codebook, int count) const;
  void fill_levels(const float *codebook, int count, uint8_t *levels8, int16_t *levels16,
                   Levels &out) const;

  Plan plan_{};
  std::vector<Block> blocks_;
  std::vector<float> codebook_;
  std::vector<uint8_t> levels8_;
  std::vector<int16_t> levels16_;
  std::vector<Levels> levels_;
};

}  // namespace fdk
