// fdk_matmul and its kin with a team of the caller's choice (the bindings run on XLA's threads).
#pragma once

#include "fdk.h"
#include "kernel.h"
#include "parallel.h"

namespace fdk {

fdk_status matmul(const fdk_weight *weight, const fdk_matmul_args *args, const Team &team);

// What models need besides (see kernel.h). The caller has checked the sizes of all buffers.
fdk_status attention(const Attention &args, const Team &team);
fdk_status prompt_attention(const PromptAttention &args, const Team &team);
// x [m, k] is of x_dtype and widened here; args.x is ignored.
fdk_status few_tokens(FewTokens args, const void *x, fdk_dtype x_dtype, const Team &team);

}  // namespace fdk
