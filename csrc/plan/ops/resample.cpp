// Resampling of planes along both axes (nearest, bilinear, bicubic, ...): out[c][oy][ox] = sum_ts wy[oy][t] wx[ox][s] in[c][iy[oy][t]][ix[ox][s]].
#include <algorithm>

#include "plan/ops/block_op.h"
#include "plan/ops/row_factories.h"
#include "plan/ops/spec_reader.h"

namespace dynprune {
namespace {

// For each output along one axis, the `count` inputs it reads and their weights.
struct AxisTaps {
  int64_t count = 0;
  std::vector<int64_t> index;
  const float* weight = nullptr;
};

AxisTaps read_taps(const StepSpec& spec, const char* axis, int64_t inputs, int64_t outputs) {
  const SpecReader reader(spec);
  const std::string name(axis);
  AxisTaps taps;
  const auto found = spec.ints.find(name + "_index");
  reader.check(found != spec.ints.end() && !found->second.empty() && static_cast<int64_t>(found->second.size()) % outputs == 0,
               "needs ints '" + name + "_index', the same number of them for each output");
  taps.index = found->second;
  taps.count = static_cast<int64_t>(taps.index.size()) / outputs;
  for (const int64_t i : taps.index) {
    reader.check(i >= 0 && i < inputs, "'" + name + "_index' must lie within 0.." + std::to_string(inputs - 1) + ", got " + std::to_string(i));
  }
  taps.weight = reader.constant(name + "_weight", {outputs, taps.count});
  return taps;
}

class ResampleOp final : public BlockOp {
 public:
  ResampleOp(StepSpec step, const KernelTable& kernels, int num_threads) : BlockOp(std::move(step), kernels) {
    const SpecReader reader(spec_);
    const auto in = reader.ints("in_size", 3);
    const auto out = reader.ints("out_size", 3);
    for (int axis = 0; axis < 3; ++axis) reader.check(in[axis] >= 1 && out[axis] >= 1, "sizes must be >= 1");
    reader.check(in[0] == out[0], "must keep the number of channels");
    reader.check(spec_.in_site == spec_.out_site, "in_site must equal out_site");
    reader.check_rows("the input", reader.input(0), in[0], in[1] * in[2]);
    reader.check_rows("the output", spec_.output, out[0], out[1] * out[2]);
    in_width_ = in[2];
    out_width_ = out[2];
    y_ = read_taps(spec_, "y", in[1], out[1]);
    x_ = read_taps(spec_, "x", in[2], out[2]);
    BlockLimits limits;
    limits.unit = out_width_;
    limits.total_ns = static_cast<double>(out[0] * out[1]) *
                      (0.3 * static_cast<double>(in_width_ * y_.count) + 0.6 * static_cast<double>(out_width_ * x_.count));
    limits.direct = Direct::kAlone;
    cut(limits, spec_.out_site, num_threads);
    reserve_extra(in_width_);
  }

 protected:
  void compute_block(const RunView& run, int64_t sample, const Block& block, float* out, float* line) const override {
    const int64_t first = block.positions.begin / out_width_;
    const int64_t last = block.positions.end / out_width_;
    for (int64_t i = block.rows.begin; i < block.rows.end; ++i) {
      const float* plane = run.row(spec_.inputs[0], sample, i);
      for (int64_t y = first; y < last; ++y) {
        combine_lines(plane, y, line);
        spread(line, out + (i - block.rows.begin) * block.stride + (y - first) * out_width_);
      }
    }
  }

 private:
  void combine_lines(const float* plane, int64_t y, float* line) const {
    for (int64_t t = 0; t < y_.count; ++t) {
      const float weight = y_.weight[y * y_.count + t];
      const float* from = plane + y_.index[y * y_.count + t] * in_width_;
      if (t == 0) {
        for (int64_t x = 0; x < in_width_; ++x) line[x] = weight * from[x];
      } else {
        for (int64_t x = 0; x < in_width_; ++x) line[x] += weight * from[x];
      }
    }
  }

  void spread(const float* line, float* out) const {
    for (int64_t x = 0; x < out_width_; ++x) {
      float sum = 0.0f;
      for (int64_t s = 0; s < x_.count; ++s) sum += x_.weight[x * x_.count + s] * line[x_.index[x * x_.count + s]];
      out[x] = sum;
    }
  }

  int64_t in_width_, out_width_;
  AxisTaps y_, x_;
};

}  // namespace

std::unique_ptr<Op> make_resample(StepSpec spec, const KernelTable& kernels, int num_threads) {
  return std::make_unique<ResampleOp>(std::move(spec), kernels, num_threads);
}

}  // namespace dynprune
