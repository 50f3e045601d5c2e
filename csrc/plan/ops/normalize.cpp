// Layer norm, norm by the root mean square, and softmax: along the rows (channels or keys) of each position, or along the positions of each row.
#include <algorithm>

#include "plan/ops/block_op.h"
#include "plan/ops/row_factories.h"
#include "plan/ops/spec_reader.h"

namespace dynprune {
namespace {

using NormalizeKernel = void (*)(const NormalizeArgs&);
using ColumnNormKernel = void (*)(const ColumnNormArgs&);

// Norms along the rows: a chunk is some positions. `compute` takes their statistics; `commit` reads the rows once more and writes them,
// which costs no more than copying them from scratch would.
class ColumnNormOp final : public Op {
 public:
  // `ns` is the expected time of an element.
  ColumnNormOp(StepSpec step, const KernelTable& kernels, int num_threads, ColumnNormKernel statistics, double ns, float eps)
      : Op(std::move(step)), kernels_(kernels), statistics_(statistics), eps_(eps) {
    const SpecReader reader(spec_);
    const Rows& out = spec_.output;
    reader.check(spec_.in_site < 0 && spec_.out_site < 0, "must not be gated");
    reader.check_rows("the input", reader.input(0), out.rows, out.positions);
    weight_ = reader.constant("weight", {out.rows}, false);
    bias_ = reader.constant("bias", {out.rows}, false);
    units_ = std::max<int64_t>(1, (out.positions + kernels.lanes - 1) / kernels.lanes);
    parts_ = std::min(units_, wanted_chunks(ns * static_cast<double>(out.rows * out.positions), num_threads));
    most_ = (units_ + parts_ - 1) / parts_ * kernels.lanes;
  }

  int64_t chunks_per_sample() const override { return parts_; }
  int64_t scratch_floats() const override { return 2 * most_; }
  void compute(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    statistics_(arguments(run, sample, part, scratch));
  }
  void commit(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    kernels_.apply_column_norm(arguments(run, sample, part, scratch));
  }

 private:
  ColumnNormArgs arguments(const RunView& run, int64_t sample, int64_t part, float* scratch) const {
    const Rows& in = spec_.inputs[0];
    const Rows& out = spec_.output;
    const Range units = part_of(units_, part, parts_);
    const int64_t first = units.begin * kernels_.lanes;
    const int64_t last = std::min(units.end * kernels_.lanes, out.positions);
    return {out.rows, last - first, run.row(in, sample, 0) + first, in.row_stride, scratch, scratch + most_, weight_, bias_, eps_,
            run.row(out, sample, 0) + first, out.row_stride};
  }

  const KernelTable& kernels_;
  ColumnNormKernel statistics_;
  const float* weight_;
  const float* bias_;
  float eps_;
  int64_t units_;
  int64_t parts_;
  int64_t most_;  // positions of a chunk
};

class NormalizeOp final : public BlockOp {
 public:
  // `ns` is the expected time of an element.
  NormalizeOp(StepSpec step, const KernelTable& kernels, int num_threads, int64_t axis, NormalizeKernel kernel, double ns, float eps)
      : BlockOp(std::move(step), kernels), axis_(axis), kernel_(kernel), eps_(eps) {
    const SpecReader reader(spec_);
    const Rows& out = spec_.output;
    reader.check(spec_.in_site < 0 && spec_.out_site < 0, "must not be gated");
    reader.check_rows("the input", reader.input(0), out.rows, out.positions);
    weight_ = reader.constant("weight", {length()}, false);
    bias_ = reader.constant("bias", {length()}, false);
    BlockLimits limits;
    limits.split_rows = axis_ == 1;
    limits.unit = axis_ == 0 ? kernels.lanes : out.positions;
    limits.row_multiple = axis_ == 0 ? kernels.lanes : 1;
    limits.max_floats = 2 * kMaxBlockFloats;  // two lines of cache of each of 768 keys still fit
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

// 0: along the rows of each position; 1: along the positions of each row.
int64_t axis_of(const StepSpec& spec) {
  const SpecReader reader(spec);
  const int64_t axis = reader.integer("axis");
  reader.check(axis == 0 || axis == 1, "axis must be 0 (rows) or 1 (positions), got " + std::to_string(axis));
  return axis;
}

float eps_of(const StepSpec& spec) {
  const auto eps = spec.floats.find("eps");
  SpecReader(spec).check(eps != spec.floats.end() && eps->second.size() == 1 && eps->second[0] >= 0.0f,
                         "needs floats 'eps', one value >= 0");
  return eps->second[0];
}

// `ns` is the expected time of an element.
std::unique_ptr<Op> make_norm(StepSpec spec, const KernelTable& kernels, int num_threads, ColumnNormKernel statistics,
                              NormalizeKernel rows, double ns) {
  const int64_t axis = axis_of(spec);
  const float eps = eps_of(spec);
  if (axis == 0) return std::make_unique<ColumnNormOp>(std::move(spec), kernels, num_threads, statistics, ns, eps);
  return std::make_unique<NormalizeOp>(std::move(spec), kernels, num_threads, axis, rows, ns, eps);
}

}  // namespace

std::unique_ptr<Op> make_layer_norm(StepSpec spec, const KernelTable& kernels, int num_threads) {
  return make_norm(std::move(spec), kernels, num_threads, kernels.layer_norm_statistics, kernels.layer_norm_rows, 0.3);
}

std::unique_ptr<Op> make_rms_norm(StepSpec spec, const KernelTable& kernels, int num_threads) {
  SpecReader(spec).check(spec.constants.find("bias") == spec.constants.end(), "takes no constant 'bias'");
  return make_norm(std::move(spec), kernels, num_threads, kernels.rms_norm_statistics, kernels.rms_norm_rows, 0.2);
}

std::unique_ptr<Op> make_softmax(StepSpec spec, const KernelTable& kernels, int num_threads) {
  const int64_t axis = axis_of(spec);
  const NormalizeKernel kernel = axis == 0 ? kernels.softmax_columns : kernels.softmax_rows;
  return std::make_unique<NormalizeOp>(std::move(spec), kernels, num_threads, axis, kernel, 0.6, 0.0f);
}

}  // namespace dynprune
