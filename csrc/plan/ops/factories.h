// The operations with weights, and what they share: a place for the compensation of channels that do not run.
#pragma once

#include <memory>
#include <vector>

#include "plan/op.h"

namespace dynprune {

// A consumer of a gated space that can add, for each input channel that does not run, that channel's calibration mean through its weights.
class Compensated {
 public:
  virtual ~Compensated() = default;
  // What compensates, of `compensation_sizes()`, must live as long as the plan; nullptr switches compensation off. It is [C], the means
  // themselves, or [K, C], what each channel adds to each output.
  virtual void set_compensation(const float* compensation) = 0;
  virtual std::vector<int64_t> compensation_sizes() const = 0;
};

std::unique_ptr<Op> make_conv(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_linear(StepSpec spec, const KernelTable& kernels, int num_threads);

}  // namespace dynprune
