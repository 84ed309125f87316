// What a kernel sees of a multiplication, and what it has to offer.
//
// One translation unit an instruction set (ISA) defines an Isa: its kernels from the most special
// to the most general. dispatch.cpp takes the first kernel that supports a Plan, from the best ISA
// that the machine has down to the scalar twin, which supports everything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "fdk.h"
#include "layout.h"

namespace fdk {

// At most this many activations share a scale in the integer arithmetics; also the length of a
// Block, so that no integer sum over a block can overflow.
inline constexpr int64_t kMaxBlock = 64;

// Columns [k0, k0 + length) of one group: length is a multiple of 8 except at the end of K, and at
// most kMaxBlock. A group of more than 64 columns is cut into blocks of nearly equal length.
// A block touches the steps [step_begin, step_end); where those reach beyond the block, a kernel
// pairs the foreign weights with activations of zero.
struct Block {
  int32_t k0;
  int32_t length;
  int32_t group;
  int32_t step_begin;
  int32_t step_end;
};

// The integer image of a codebook: value = offset + factor * level. Shared by all machines, so
// that integer sums agree everywhere.
struct Levels {
  const uint8_t *level8;   // [2**bits], 0..255; level8[q] = q when the codebook is affine
  float offset8, factor8;  //
  const int16_t *level16;  // [2**bits], signed; affine: q (0..255)
  float offset16, factor16;
  // Largest |int16 activation|: x_limit16 * max |level16| * kMaxBlock fits in int32.
  int32_t x_limit16;
};

struct Plan {
  // The problem. x [m, k], y [m, n], bias [n] or null.
  int64_t m, n, k;
  int bits;
  int64_t group_size;
  bool uniform;  // every codebook is affine in the code (always true at 1 bit)
  fdk_arithmetic arithmetic;
  const void *x;
  fdk_dtype x_dtype;
  void *y;
  fdk_dtype y_dtype;
  const void *bias;
  fdk_dtype bias_dtype;
  const uint8_t *packed;  // [tiles][steps][64]
  const void *scales;     // [tiles][groups][16] of scales_dtype
  fdk_dtype scales_dtype;

  // Derived.
  int64_t tiles, steps, groups;
  std::span<const Block> blocks;  // in the order of k; every column is in exactly one
  int64_t num_codebooks;          // row n uses codebook n / (n_total / num_codebooks)
  const float *codebook;          // [num_codebooks][2**bits], rounded to scales_dtype
  bool codebook_is_bfloat16;      // every value is one, whatever scales_dtype is
  const Levels *levels;           // [num_codebooks]; null for FDK_EXACT

  const uint8_t *tile_packed(int64_t tile) const { return packed + tile * steps * kStepBytes; }
};

// Tokens are divided among pieces of work at multiples of this many.
inline constexpr int64_t kTokenGroup = 16;

// A piece of work: some tokens by whole tiles that use one codebook. Only rows in
// [row_begin, row_end) are stored (a tile may be shared by two codebooks, and the last one may be
// ragged).
struct Range {
  int64_t token_begin, token_end;
  int64_t tile_begin, tile_end;
  int64_t row_begin, row_end;
  int64_t codebook;
};

// prepare() turns the activations into the form that run() reads (quantised, permuted, padded with
// zeros; or tables of their sums) in a buffer of prepared_bytes(plan), aligned to 64 bytes and
// shared by all threads. It is called for disjoint ranges of tokens, possibly in parallel.
// run() then computes y for a Range; scratch is scratch_bytes(plan) for each thread, aligned to 64.
struct Kernel {
  const char *name;
  bool (*supports)(const Plan &plan);
  size_t (*prepared_bytes)(const Plan &plan);
  void (*prepare)(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end);
  size_t (*scratch_bytes)(const Plan &plan);  // null: none
  void (*run)(const Plan &plan, const void *prepared, void *scratch, const Range &range);
  int64_t preferred_tiles;  // run() is at its best on multiples of this many tiles
};

// Rows [row_begin, row_end) of y = x w^T for dense bfloat16 w [n, k], all m tokens.
using DenseRows = void (*)(const fdk_dense_args &args, int64_t row_begin, int64_t row_end);
using ProbeCopy = void (*)(const void *source, void *target, size_t bytes);
using ProbeSum = int64_t (*)(const int32_t *source, size_t count);

// Attention of one new token a sequence, heads [.., head_dim] of one dtype.
struct Attention {
  int64_t batch, heads, kv_heads, head_dim, capacity;
  fdk_dtype dtype;
  const void *qkv;              // [batch, (heads + 2 kv_heads) head_dim]
  const float *cos, *sin;       // [batch, head_dim / 2], of the new tokens' positions
  const int32_t *lengths;       // [batch], tokens in the cache
  void *keys, *values;          // [batch, kv_heads, capacity, head_dim]
  const void *q_norm, *k_norm;  // [head_dim], or null
  float norm_eps;
  void *out;  // [batch, heads head_dim]

  // Where a sequence's new token goes; a full cache has its last slot overwritten.
  int64_t slot(int64_t sequence) const {
    const int64_t length = lengths[sequence];
    return length < 0 ? 0 : length < capacity ? length : capacity - 1;
  }
  // Floats that a call of Decoding::attend works in.
  int64_t scratch(int64_t longest) const {
    return (2 * head_dim + longest) * (heads / kv_heads) + head_dim;
  }
};

// Causal attention of `tokens` tokens a sequence over the keys that lie in `slots` slots, their
// own among them.
inline constexpr int64_t kPromptKeys = 128;  // of which all scores exist at a time
struct PromptAttention {
  int64_t batch, tokens, heads, kv_heads, head_dim, slots;
  int64_t key_sequence, key_head,
      key_token;   // elements from one to the next, of keys and of values
  int64_t window;  // keys that a token sees, its own included; 0: all before it
  fdk_dtype dtype;
  const void *q;              // [batch, tokens, heads, head_dim]
  const void *keys, *values;  // [batch, kv_heads, slots, head_dim] in the order of their steps
  const int32_t *starts;      // the slot of each sequence's first token,
  int64_t start_step;         // 0 where all begin at the same
  void *out;                  // like q

  int64_t start(int64_t sequence) const {
    const int64_t at = starts[sequence * start_step];
    return at < 0 ? 0 : at;
  }
  // Tokens of a piece of work: some 256 queries are multiplied by a block of keys.
  int64_t block_tokens() const {
    const int64_t fitting = 256 / (heads / kv_heads);
    return fitting < 1 ? 1 : fitting < tokens ? fitting : tokens;
  }
  // Floats that a call of Decoding::attend_block works in, at most.
  int64_t scratch() const {
    const int64_t queries = block_tokens() * (heads / kv_heads) + 64;
    const int64_t width = head_dim + 64;
    return queries * (head_dim + kPromptKeys + width + 4) + kPromptKeys * (head_dim + width);
  }
};

// y [m, n] = x W^T for W [n, k] (`rows`) or x W for W [k, n], at most kFewTokens tokens.
inline constexpr int64_t kFewTokens = 16;
inline constexpr int64_t kDenseColumns = 256;
struct FewTokens {
  int64_t m, n, k;
  const float *x;
  const void *weight;
  fdk_dtype dtype;  // of the weight
  bool rows;
  void *y;
  fdk_dtype y_dtype;
};

// The loops of decoding.h and prompt_attention.h.
struct Decoding {
  void (*attend)(const Attention &args, int64_t sequence, int64_t kv_head, float *scratch);
  // Outputs [begin, end): at most kDenseColumns unless `rows`.
  void (*dense)(const FewTokens &args, int64_t begin, int64_t end);
  // The block of tokens that begins with `token`.
  void (*attend_block)(const PromptAttention &args, int64_t sequence, int64_t kv_head,
                       int64_t token, float *scratch);
};

struct Isa {
  const char *name;
  bool (*available)();  // may this machine run it?
  std::span<const Kernel> kernels;
  DenseRows dense_rows;  // null: the next ISA's
  ProbeCopy probe_copy;  // likewise
  ProbeSum probe_sum;
  const Decoding *decoding = nullptr;
  bool (*preferred)() = nullptr;  // null: wherever it is available
};

// A build for tests that runs every x86 ISA by emulation (tests/emulated).
#if defined(FDK_EMULATED)
inline constexpr bool kEmulated = true;
#else
inline constexpr bool kEmulated = false;
#endif

// Every ISA in this build, the best first, "scalar" last (dispatch.cpp).
std::span<const Isa *const> all_isas();

}  // namespace fdk
