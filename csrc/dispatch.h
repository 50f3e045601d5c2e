// Picks the kernel table of an instruction set.
#pragma once

#include <string>

#include "kernels.h"

namespace dynprune {

// Throws std::invalid_argument where the instruction set is unknown, not built in, or not runnable here.
const KernelTable& kernels_for(const std::string& isa);

}  // namespace dynprune
