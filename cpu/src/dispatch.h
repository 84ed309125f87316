// Chooses the level and the kernel, and drives a multiplication over a team.
#pragma once

#include "kernel.h"
#include "parallel.h"

namespace fdk {

// The best level in use: forced by set_level or FDK_CPU_LEVEL, else the best available.
const Level &current_level();
// Throws Error for an unknown or unavailable name; nullptr removes the force.
void set_level(const char *name);
const Level *find_level(const char *name);

// The first kernel that supports the plan, from the current level down.
const Kernel &choose_kernel(const Plan &plan);

void run_plan(const Plan &plan, const Team &team, int threads);
void run_dense(const fdk_dense_args &args, const Team &team, int threads);
// Floats of scratch are one allocation; throws std::bad_alloc.
void run_attention(const Attention &args, const Team &team, int threads);
void run_few_tokens(const FewTokens &args, const Team &team, int threads);
void run_probe_copy(const void *source, void *target, size_t bytes, const Team &team, int threads);
int64_t run_probe_sum(const int32_t *source, size_t count, const Team &team, int threads);

}  // namespace fdk
