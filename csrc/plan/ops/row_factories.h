// The operations without a weight matrix. The table of steps in csrc/README.md says what each takes.
#pragma once

#include <memory>

#include "plan/op.h"

namespace dynprune {

std::unique_ptr<Op> make_depthwise(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_pool(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_adaptive_pool(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_mean(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_unary(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_affine(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_binary(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_layer_norm(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_rms_norm(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_softmax(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_attention(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_matmul(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_embedding(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_resample(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_copy(StepSpec spec, const KernelTable& kernels, int num_threads);
std::unique_ptr<Op> make_fill(StepSpec spec, const KernelTable& kernels, int num_threads);

}  // namespace dynprune
