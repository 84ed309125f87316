// Chooses the ISA and the kernel, and drives a multiplication over a team.
#pragma once

#include "kernel.h"
#include "parallel.h"

namespace fdk {

// The best ISA in use: forced by set_isa or FDK_CPU_ISA, else the best available.
const Isa &current_isa();
// Throws Error for an unknown or unavailable name; nullptr removes the force.
void set_isa(const char *name);
const Isa *find_isa(const char *name);

// The first kernel that supports the plan, from the current ISA down.
const Kernel &choose_kernel(const Plan &plan);

void run_plan(const Plan &plan, const Team &team, int threads);
void run_dense(const fdk_dense_args &args, const Team &team, int threads);
// Floats of scratch are one allocation; throws std::bad_alloc.
void run_attention(const Attention &args, const Team &team, int threads);
void run_prompt_attention(const PromptAttention &args, const Team &team, int threads);
void run_few_tokens(const FewTokens &args, const Team &team, int threads);
void run_probe_copy(const void *source, void *target, size_t bytes, const Team &team, int threads);
int64_t run_probe_sum(const int32_t *source, size_t count, const Team &team, int threads);

}  // namespace fdk
