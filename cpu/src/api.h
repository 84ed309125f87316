// fdk_matmul and its kin with a team of the caller's choice (the bindings run on XLA's threads).
#pragma once

#include "fdk.h"
#include "parallel.h"

namespace fdk {

fdk_status matmul(const fdk_weight *weight, const fdk_matmul_args *args, const Team &team);

}  // namespace fdk
