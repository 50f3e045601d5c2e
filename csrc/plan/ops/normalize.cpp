// Layer norm, norm by the root mean square, and softmax: along the rows (channels or keys) of each position, or along the positions of each row.
#include "plan/ops/block_op.h"
#include "plan/ops/row_factories.h"
#include "plan/ops/spec_reader.h"

namespace dynprune {
namespace {

using NormalizeKernel = void (*)(const NormalizeArgs&);

class NormalizeOp final : public BlockOp {
 public:
  // `ns` is the expected time of an element.
  NormalizeOp(StepSpec step, const KernelTable& kernels, int num_threads, NormalizeKernel columns, NormalizeKernel rows, double ns,
              float eps)
      : BlockOp(std::move(step), kernels), eps_(eps) {
    const SpecReader reader(spec_);
    const Rows& out = spec_.output;
    axis_ = reader.integer("axis");
    reader.check(axis_ == 0 || axis_ == 1, "axis must be 0 (rows) or 1 (positions), got " + std::to_string(axis_));
    reader.check(spec_.in_site < 0 && spec_.out_site < 0, "must not be gated");
    reader.check_rows("the input", reader.input(0), out.rows, out.positions);
    kernel_ = axis_ == 0 ? columns : rows;
    weight_ = reader.constant("weight", {length()}, false);
    bias_ = reader.constant("bias", {length()}, false);
    BlockLimits limits;
    limits.split_rows = axis_ == 1;
    limits.unit = axis_ == 0 ? kernels.lanes : out.positions;
    limits.row_multiple = axis_ == 0 ? kernels.lanes : 1;
    limits.max_floats = 2 * kMaxBlockFloats;  // two lines of cache of each of 768 channels still fit
    limits.total_ns = ns * static_cast<double>(out.rows * out.positions);
    if (axis_ == 1) limits.direct = Direct::kAlone;
    cut(limits, -1, num_threads);
  }

 protected:
  void compute_block(const RunView& run, int64_t sample, const Block& block, float* out, float*) const override {
    const Rows& in = spec_.inputs[0];
    kernel_({block.rows.end - block.rows.begin, block.positions.end - block.positions.begin,
             run.row(in, sample, block.rows.begin) + block.positions.begin, in.row_stride, weight_, bias_, eps_, out, block.stride});
  }

 private:
  int64_t length() const { return axis_ == 0 ? spec_.output.rows : spec_.output.positions; }

  int64_t axis_;
  NormalizeKernel kernel_;
  const float* weight_;
  const float* bias_;
  float eps_;
};

float eps_of(const StepSpec& spec) {
  const auto eps = spec.floats.find("eps");
  SpecReader(spec).check(eps != spec.floats.end() && eps->second.size() == 1 && eps->second[0] >= 0.0f,
                         "needs floats 'eps', one value >= 0");
  return eps->second[0];
}

}  // namespace

std::unique_ptr<Op> make_layer_norm(StepSpec spec, const KernelTable& kernels, int num_threads) {
  const float eps = eps_of(spec);
  return std::make_unique<NormalizeOp>(std::move(spec), kernels, num_threads, kernels.layer_norm_columns, kernels.layer_norm_rows, 0.3,
                                       eps);
}

std::unique_ptr<Op> make_rms_norm(StepSpec spec, const KernelTable& kernels, int num_threads) {
  SpecReader(spec).check(spec.constants.find("bias") == spec.constants.end(), "takes no constant 'bias'");
  const float eps = eps_of(spec);
  return std::make_unique<NormalizeOp>(std::move(spec), kernels, num_threads, kernels.rms_norm_columns, kernels.rms_norm_rows, 0.2, eps);
}

std::unique_ptr<Op> make_softmax(StepSpec spec, const KernelTable& kernels, int num_threads) {
  return std::make_unique<NormalizeOp>(std::move(spec), kernels, num_threads, kernels.softmax_columns, kernels.softmax_rows, 0.6, 0.0f);
}

}  // namespace dynprune
