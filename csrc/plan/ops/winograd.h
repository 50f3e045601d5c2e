// 3x3 convolutions by Winograd's minimal filtering: when it pays, and the operation.
#pragma once

#include <cstdint>
#include <memory>

#include "plan/op.h"
#include "plan/ops/conv_tiling.h"

namespace dynprune {

// The output tile a side, 4 or 2, with which this convolution runs by Winograd; 0: directly. ints["winograd"] of the step decides
// where it is given (0, 2 or 4; std::invalid_argument where the shape is not for it), otherwise an estimate of the time does.
int64_t choose_winograd_tile(const StepSpec& spec, const ConvShape& shape, const KernelTable& kernels);

std::unique_ptr<Op> make_winograd(StepSpec spec, const KernelTable& kernels, int num_threads, int64_t tile);

}  // namespace dynprune
