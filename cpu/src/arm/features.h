// The machine's optional instructions, asked for once. An ISA needs everything that the ISAs
// below it need, since dispatch goes down the list without asking again.
#pragma once

#include <cstdint>

namespace fdk {

struct ArmFeatures {
  bool dotprod;
  bool i8mm;
  bool bf16;
  bool sve2;
};

const ArmFeatures &arm_features();

}  // namespace fdk
