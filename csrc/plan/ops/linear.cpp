// A linear layer of one position per sample: a matrix-vector product over any lists of inputs and outputs.
//
// Without an input list a weight row is contiguous and each output is a dot product. With one, the weight is kept transposed, so that
// an input that does not run is a row not read.
#include <algorithm>
#include <cstring>

#include "plan/ops/factories.h"
#include "plan/ops/spec_reader.h"

namespace dynprune {
namespace {

class LinearOp final : public Op, public Compensated {
 public:
  LinearOp(StepSpec step, const KernelTable& kernels, int num_threads) : Op(std::move(step)), kernels_(kernels) {
    const SpecReader reader(spec_);
    in_ = reader.integer("in_features");
    out_ = reader.integer("out_features");
    repeat_ = reader.integer("repeat", 1);
    reader.check(in_ >= 1 && out_ >= 1 && repeat_ >= 1, "in_features, out_features and repeat must be >= 1");
    reader.check(in_ % repeat_ == 0, "repeat must divide in_features");
    x_ = reader.input(0);
    reader.check(x_.rows * x_.positions == in_ && (x_.positions == 1 || x_.row_stride == x_.positions),
                 "the input must be " + std::to_string(in_) + " elements in contiguous rows");
    reader.check_rows("the output", spec_.output, out_, 1);
    weight_ = reader.constant("weight", {out_, in_});
    bias_ = reader.constant("bias", {out_});
    activation_ = reader.activation();
    if (spec_.in_site >= 0) transpose();
    // 50 us of a core that streams 10 GB/s of weights.
    constexpr int64_t kChunkWeights = 125'000;
    constexpr int64_t kMinOutputs = 64;
    const int64_t wanted = std::max<int64_t>(1, in_ * out_ / kChunkWeights);
    parts_ = num_threads == 1 ? 1 : std::min(wanted, std::max<int64_t>(1, out_ / kMinOutputs));
    max_outputs_ = (out_ + parts_ - 1) / parts_ + 16;
  }

  int64_t chunks_per_sample() const override { return parts_; }
  int64_t scratch_floats() const override { return max_outputs_ + 16 + in_; }

  void compute(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    float* x = scratch + max_outputs_ + 16;
    const int64_t in_rows = in_ / repeat_;
    const int64_t count = std::min(run.num_active(spec_.in_site, sample, in_rows), in_rows);
    gather_input(run, sample, count, x);
    if (spec_.in_site < 0) {
      const Range rows = active_outputs(run, sample, part);
      const int32_t* index = spec_.out_site < 0 ? nullptr : run.active(spec_.out_site, sample).index + rows.begin;
      kernels_.dot_rows({rows.end - rows.begin, in_, weight_, in_, index, rows.begin, x, bias_, scratch});
      return;
    }
    const Range outputs = part_of(out_, part, parts_);
    const int64_t n = outputs.end - outputs.begin;
    if (repeat_ == 1) {
      kernels_.axpy_rows({n, count, transposed_.data() + outputs.begin, out_, run.active(spec_.in_site, sample).index, x,
                          bias_ + outputs.begin, scratch});
    } else {
      for (int64_t j = 0; j < count; ++j) {
        const int64_t channel = run.active(spec_.in_site, sample).index[j];
        kernels_.axpy_rows({n, repeat_, transposed_.data() + channel * repeat_ * out_ + outputs.begin, out_, nullptr, x + j * repeat_,
                            j == 0 ? bias_ + outputs.begin : scratch, scratch});
      }
      if (count == 0) std::memcpy(scratch, bias_ + outputs.begin, n * sizeof(float));
    }
    if (compensation_ != nullptr) {
      kernels_.axpy_rows({n, in_rows, compensation_ + outputs.begin, out_, nullptr, run.active(spec_.in_site, sample).inactive, scratch,
                          scratch});
    }
  }

  void commit(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    float* out = run.row(spec_.output, sample, 0);
    const int64_t stride = spec_.output.row_stride;
    if (spec_.in_site < 0 || spec_.out_site < 0) {
      const Range rows = spec_.in_site < 0 ? active_outputs(run, sample, part) : part_of(out_, part, parts_);
      activate(scratch, rows.end - rows.begin);
      for (int64_t i = rows.begin; i < rows.end; ++i) out[i * stride] = scratch[i - rows.begin];
      return;
    }
    const Range outputs = part_of(out_, part, parts_);
    activate(scratch, outputs.end - outputs.begin);
    const ActiveList& list = run.active(spec_.out_site, sample);
    const int32_t* end = list.index + list.count;
    const int32_t* first = std::lower_bound(list.index, end, static_cast<int32_t>(outputs.begin));
    for (const int32_t* i = first; i < end && *i < outputs.end; ++i) out[(i - list.index) * stride] = scratch[*i - outputs.begin];
  }

  void set_compensation(const float* matrix) override { compensation_ = matrix; }
  // Transposed: one row per input channel.
  std::vector<int64_t> compensation_sizes() const override {
    return spec_.in_site < 0 ? std::vector<int64_t>{} : std::vector<int64_t>{in_ / repeat_, out_};
  }

 private:
  void transpose() {
    transposed_.resize(in_ * out_);
    for (int64_t o = 0; o < out_; ++o) {
      for (int64_t i = 0; i < in_; ++i) transposed_[i * out_ + o] = weight_[o * in_ + i];
    }
  }

  Range active_outputs(const RunView& run, int64_t sample, int64_t part) const {
    return part_of(std::min(run.num_active(spec_.out_site, sample, out_), out_), part, parts_);
  }

  void gather_input(const RunView& run, int64_t sample, int64_t count, float* x) const {
    const float* in = run.row(x_, sample, 0);
    if (x_.positions > 1 || x_.row_stride == 1) {
      std::memcpy(x, in, count * repeat_ * sizeof(float));
    } else {
      for (int64_t i = 0; i < count * repeat_; ++i) x[i] = in[i * x_.row_stride];
    }
  }

  void activate(float* values, int64_t n) const {
    if (n > 0 && activation_.kind != Activation::kNone) {
      kernels_.epilogue({1, n, values, 0, nullptr, nullptr, 0, values, 0, activation_});
    }
  }

  const KernelTable& kernels_;
  int64_t in_, out_, repeat_;
  Rows x_;
  const float* weight_;
  const float* bias_;
  const float* compensation_ = nullptr;
  ActivationSpec activation_;
  std::vector<float> transposed_;
  int64_t parts_;
  int64_t max_outputs_;
};

}  // namespace

std::unique_ptr<Op> make_linear(StepSpec spec, const KernelTable& kernels, int num_threads) {
  return std::make_unique<LinearOp>(std::move(spec), kernels, num_threads);
}

}  // namespace dynprune
