// The registry of operations: from the name of a step to the Op that runs it.
#pragma once

#include <memory>

#include "plan/op.h"

namespace dynprune {

// Throws std::invalid_argument for an unknown operation, or where the step's factory finds it inconsistent.
std::unique_ptr<Op> make_op(StepSpec spec, const KernelTable& kernels, int num_threads);

}  // namespace dynprune
