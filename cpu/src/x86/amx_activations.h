// Activations in the shape of matrix registers.
#pragma once

#include <algorithm>
#include <array>

#include "x86/amx_tiles.h"
#include "x86/avx512_outputs.h"

namespace fdk {
namespace {

// Registers that the words of a block fill; the last one ends with zeros, so that what it reads
// after the block meets nothing.
template <typename A>
inline int64_t block_registers(const Block &block) {
  return ceil_div((block.step_end - block.step_begin) * A::kVectors, kMatrixRows);
}

// The most that a block of kMaxBlock columns takes, with the steps that it shares with others.
template <typename A>
inline constexpr int64_t kMaxBlockRegisters =
    ceil_div((ceil_div(kMaxBlock, step_k(A::kBits)) + 1) * A::kVectors, kMatrixRows);

// What a block of a token's int8 activations means: its sums by levels are worth
// sum * scale + offset in steps of the codebook.
struct MatrixFactor {
  float scale, offset;
};

// Each codebook has offsets of its own; more of them take too long to prepare.
inline constexpr int64_t kMatrixCodebooks = 4;

// prepared: factors [codebook][blocks][tokens] (integers only), then words [group of 16
// tokens][register] [16 tokens][16 words]: a register is 1 KiB in one piece.
template <typename A>
struct MatrixPrepared {
  int64_t blocks, tokens, registers, factor_bytes;
  explicit MatrixPrepared(const Plan &plan) {
    blocks = static_cast<int64_t>(plan.blocks.size());
    tokens = ceil_div(plan.m, kMatrixRows) * kMatrixRows;
    registers = 0;
    for (const Block &block : plan.blocks) registers += block_registers<A>(block);
    factor_bytes = A::kInteger ? plan.num_codebooks * blocks * tokens *
                                     static_cast<int64_t>(sizeof(MatrixFactor))
                               : 0;
  }
  size_t bytes() const { return static_cast<size_t>(factor_bytes + tokens * registers * 64); }
  const MatrixFactor *factors(const void *prepared, int64_t codebook, size_t block,
                              int64_t token) const {
    return static_cast<const MatrixFactor *>(prepared) +
           (codebook * blocks + static_cast<int64_t>(block)) * tokens + token;
  }
  // Row `token` of a register.
  const char *words(const void *prepared, int64_t token, int64_t index) const {
    const int64_t row =
        (token / kMatrixRows * registers + index) * kMatrixRows + token % kMatrixRows;
    return static_cast<const char *>(prepared) + factor_bytes + row * 64;
  }
};

template <typename A>
size_t matrix_prepared_bytes(const Plan &plan) {
  return MatrixPrepared<A>(plan).bytes();
}

// What the last group of 16 tokens lacks: zeros, so that whole registers can be loaded.
template <typename A>
void clear_padding(const Plan &plan, const MatrixPrepared<A> &layout, void *prepared) {
  for (int64_t token = plan.m; token < layout.tokens; ++token)
    for (int64_t i = 0; i < layout.registers; ++i)
      _mm512_store_si512(const_cast<char *>(layout.words(prepared, token, i)),
                         _mm512_setzero_si512());
}

template <typename A>
void prepare_matrix(const Plan &plan, void *prepared, int64_t token_begin, int64_t token_end) {
  const MatrixPrepared<A> layout(plan);
  if (token_end == plan.m) clear_padding(plan, layout, prepared);
  std::array<float, kMatrixCodebooks> ratios{};
  for (int64_t c = 0; c < plan.num_codebooks && A::kInteger; ++c)
    ratios[static_cast<size_t>(c)] = Finish<A>(plan, c).ratio;
  for (int64_t token = token_begin; token < token_end; ++token) {
    int64_t index = 0;
    for (size_t b = 0; b < plan.blocks.size(); ++b) {
      const Block &block = plan.blocks[b];
      alignas(64) int32_t words[(kMaxBlockRegisters<A> + 1) * kMatrixRows];
      const BlockFactor factor = prepare_block<A>(plan, token, block, words);
      for (int64_t c = 0; c < plan.num_codebooks && A::kInteger; ++c)
        *const_cast<MatrixFactor *>(layout.factors(prepared, c, b, token)) = {
            factor.scale, factor.sum * ratios[static_cast<size_t>(c)] * factor.scale};
      const int64_t count = (block.step_end - block.step_begin) * A::kVectors;
      const int64_t filled = block_registers<A>(block);
      std::fill(words + count, words + filled * kMatrixRows, 0);
      for (int64_t i = 0; i < filled; ++i, ++index)
        _mm512_store_si512(const_cast<char *>(layout.words(prepared, token, index)),
                           _mm512_load_si512(words + i * kMatrixRows));
    }
  }
}

}  // namespace
}  // namespace fdk
