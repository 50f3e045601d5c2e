// Depthwise convolution: each channel by its own kernel; a chunk is some channels by a strip of output rows.
#include "plan/ops/block_op.h"
#include "plan/ops/row_factories.h"
#include "plan/ops/window_map.h"

namespace dynprune {
namespace {

class DepthwiseOp final : public BlockOp {
 public:
  DepthwiseOp(StepSpec step, const KernelTable& kernels, int num_threads)
      : BlockOp(std::move(step), kernels), map_(spec_, kernels.lanes), clamp_(SpecReader(spec_).activation()) {
    const SpecReader reader(spec_);
    const ConvShape& shape = map_.shape();
    reader.check(spec_.inputs.size() == 1, "must have 1 input, got " + std::to_string(spec_.inputs.size()));
    weight_ = reader.constant("weight", {shape.in_channels, shape.taps()});
    bias_ = reader.constant("bias", {shape.in_channels});
    const int64_t row_vectors = (shape.out_width + kernels.lanes - 1) / kernels.lanes;
    const auto vectors = static_cast<double>(shape.in_channels * shape.out_height * row_vectors);
    BlockLimits limits;
    limits.unit = shape.out_width;
    limits.total_ns = 0.5 * vectors * static_cast<double>(shape.taps() + 4 * shape.stride_x * shape.stride_y);
    limits.direct = Direct::kAlone;
    cut(limits, spec_.out_site, num_threads);
    zeros_ = (shape.in_width + 15) / 16 * 16;
    reserve_extra(zeros_ + map_.rows_seen(max_block_positions() / shape.out_width) * map_.lines().stride);
  }

 protected:
  void compute_block(const RunView& run, int64_t sample, const Block& block, float* out, float* extra) const override {
    const ConvShape& shape = map_.shape();
    std::fill_n(extra, zeros_, 0.0f);
    const int64_t first_row = block.positions.begin / shape.out_width;
    const int64_t num_rows = block.positions.end / shape.out_width - first_row;
    kernels_.depthwise({&map_.window(), &map_.lines(), block.rows.end - block.rows.begin,
                        run.row(spec_.inputs[0], sample, block.rows.begin), spec_.inputs[0].row_stride, first_row, num_rows, weight_, bias_,
                        block.index != nullptr ? block.index + block.rows.begin : nullptr, block.rows.begin, clamp_.low, clamp_.high, extra,
                        extra + zeros_, out, block.stride});
    clamp_.apply_rest(kernels_, block.rows.end - block.rows.begin, block.positions.end - block.positions.begin, out, block.stride);
  }

 private:
  WindowMap map_;
  FusedClamp clamp_;
  const float* weight_;
  const float* bias_;
  int64_t zeros_;  // floats of the row of zeros at the start of the extra scratch
};

}  // namespace

std::unique_ptr<Op> make_depthwise(StepSpec spec, const KernelTable& kernels, int num_threads) {
  return std::make_unique<DepthwiseOp>(std::move(spec), kernels, num_threads);
}

}  // namespace dynprune
