// Two or three steps run as one: a 1x1 convolution that expands, a depthwise convolution, a 1x1 convolution that projects.
#pragma once

#include <memory>
#include <vector>

#include "plan/op.h"

namespace dynprune {

// `parts` in their order: expand and depthwise, depthwise and project, or all three; nothing but the next part reads what a part but
// the last writes, and none of that is written. Throws std::invalid_argument where they do not fit each other. Returns nullptr where
// the steps one by one are expected to take less time.
std::unique_ptr<Op> make_bottleneck(const std::vector<StepSpec>& parts, const KernelTable& kernels, int num_threads);

// What stands in a plan for a step that a later one, made by make_bottleneck, has taken over and that lives as long: no chunks.
std::unique_ptr<Op> make_absorbed(StepSpec spec, Op& taker);

}  // namespace dynprune
