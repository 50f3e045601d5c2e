// A linear layer of one position per sample: a matrix-vector product over any lists of inputs and outputs.
//
// Without an input list a weight row is contiguous and each output is a dot product. With one, the weight is kept transposed in panels
// of some outputs, so that an input that does not run is a row not read and the rows that are read follow each other in memory.
// With "whole_input" all inputs are there and the list alone says which of them count; otherwise only those that run are stored.
// A sparse weight multiplies the whole input, with zeros where it does not run.
//
// Weights are kept as f32 or as bfloat16, which halves what is read; input and sums are f32 in both.
//
// Skipped channels at their means m: y = bias + W m + sum over the active c of w_c (x_c - m_c), which costs no more than without.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "base/aligned_buffer.h"
#include "base/bf16.h"
#include "plan/ops/factories.h"
#include "plan/ops/sparse_weight.h"
#include "plan/ops/spec_reader.h"

namespace dynprune {
namespace {

// A weight as it is kept, and what is kept of it.
template <class Weight>
Weight keep(float value) {
  if constexpr (std::is_same_v<Weight, float>) return value;
  else return bf16_of(value);
}
template <class Weight>
float kept(float value) {
  if constexpr (std::is_same_v<Weight, float>) return value;
  else return float_of(bf16_of(value));
}

// Weight: float, or uint16_t for bfloat16.
template <class Weight>
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
    const float* weight = reader.constant("weight", {out_, in_});
    bias_ = reader.constant("bias", {out_});
    activation_ = reader.activation();
    sparse_ = reader.integer("sparse", 0) != 0;
    whole_input_ = reader.integer("whole_input", 0) != 0;
    reader.check(!whole_input_ || (spec_.in_site >= 0 && repeat_ == 1), "whole_input needs a gated input without repeats");
    // 50 us of a core that streams 10 GB/s of weights.
    constexpr int64_t kChunkWeights = 125'000;
    constexpr int64_t kMinOutputs = 64;
    // A panel's row is long enough for the memory's bursts, and there are enough panels for the threads.
    panel_ = out_ >= 4096 ? 1024 : out_ >= 1024 ? 256 : kMinOutputs;
    const int64_t wanted = std::max<int64_t>(1, in_ * out_ / kChunkWeights);
    const int64_t units = spec_.in_site >= 0 ? num_panels() : std::max<int64_t>(1, out_ / kMinOutputs);
    parts_ = num_threads == 1 ? 1 : std::min(wanted, units);
    max_outputs_ = (spec_.in_site >= 0 ? (num_panels() + parts_ - 1) / parts_ * panel_ : (out_ + parts_ - 1) / parts_) + 16;
    if (sparse_) {
      nonzeros_ = make_csr(weight, out_, in_);
    } else if (spec_.in_site >= 0) {
      transpose(weight);
    } else if constexpr (std::is_same_v<Weight, float>) {
      weight_ = weight;
    } else {
      rounded_ = AlignedBuffer<Weight>(in_ * out_);
      for (int64_t i = 0; i < in_ * out_; ++i) rounded_.data()[i] = keep<Weight>(weight[i]);
      weight_ = rounded_.data();
    }
    given_ = weight;
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
      if (sparse_) {
        multiply_sparse(rows, index, x, bias_, scratch);
      } else {
        multiply(DotRows<Weight>{rows.end - rows.begin, in_, weight_, in_, index, rows.begin, x, bias_, scratch});
      }
      return;
    }
    const int32_t* active = run.active(spec_.in_site, sample).index;
    const bool compensated = means_ != nullptr && count < in_rows;
    if (compensated) {
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t i = 0; i < repeat_; ++i) x[j * repeat_ + i] -= means_[active[j]];
      }
    }
    const float* start = compensated ? bias_at_means_.data() : bias_;
    const Range outputs = panel_outputs(part);
    if (sparse_) {
      spread_input(active, count, x);
      multiply_sparse(outputs, nullptr, x, start, scratch);
      return;
    }
    for (int64_t first = outputs.begin; first < outputs.end; first += panel_) {
      sum_panel(first, active, count, x, start + first, scratch + first - outputs.begin);
    }
  }

  void commit(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    float* out = run.row(spec_.output, sample, 0);
    const int64_t stride = spec_.output.row_stride;
    if (spec_.in_site < 0 || spec_.out_site < 0) {
      const Range rows = spec_.in_site < 0 ? active_outputs(run, sample, part) : panel_outputs(part);
      activate(scratch, rows.end - rows.begin);
      for (int64_t i = rows.begin; i < rows.end; ++i) out[i * stride] = scratch[i - rows.begin];
      return;
    }
    const Range outputs = panel_outputs(part);
    activate(scratch, outputs.end - outputs.begin);
    const ActiveList& list = run.active(spec_.out_site, sample);
    const int32_t* end = list.index + list.count;
    const int32_t* first = std::lower_bound(list.index, end, static_cast<int32_t>(outputs.begin));
    for (const int32_t* i = first; i < end && *i < outputs.end; ++i) out[(i - list.index) * stride] = scratch[*i - outputs.begin];
  }

  void set_compensation(const float* means) override {
    means_ = means;
    if (means == nullptr) return;
    bias_at_means_.assign(bias_, bias_ + out_);
    for (int64_t o = 0; o < out_; ++o) {
      double sum = 0.0;
      for (int64_t i = 0; i < in_; ++i) sum += static_cast<double>(kept<Weight>(given_[o * in_ + i])) * means[i / repeat_];
      bias_at_means_[o] += static_cast<float>(sum);
    }
  }
  // The mean of each input channel.
  std::vector<int64_t> compensation_sizes() const override {
    return spec_.in_site < 0 ? std::vector<int64_t>{} : std::vector<int64_t>{in_ / repeat_};
  }

 private:
  int64_t num_panels() const { return (out_ + panel_ - 1) / panel_; }
  int64_t panel_width(int64_t first) const { return std::min(panel_, out_ - first); }

  // The outputs of the panels of a chunk.
  Range panel_outputs(int64_t part) const {
    const Range panels = part_of(num_panels(), part, parts_);
    return {panels.begin * panel_, std::min(panels.end * panel_, out_)};
  }

  void transpose(const float* weight) {
    transposed_ = AlignedBuffer<Weight>(in_ * out_);
    for (int64_t first = 0; first < out_; first += panel_) {
      const int64_t width = panel_width(first);
      Weight* panel = transposed_.data() + first * in_;
      for (int64_t o = 0; o < width; ++o) {
        for (int64_t i = 0; i < in_; ++i) panel[i * width + o] = keep<Weight>(weight[(first + o) * in_ + i]);
      }
    }
  }

  // out = start + the active inputs times their rows in the panel that begins at output `first`.
  void sum_panel(int64_t first, const int32_t* active, int64_t count, const float* x, const float* start, float* out) const {
    const int64_t width = panel_width(first);
    const Weight* panel = transposed_.data() + first * in_;
    if (repeat_ == 1) {
      multiply(AxpyRows<Weight>{width, count, panel, width, active, x, start, out});
      return;
    }
    std::memcpy(out, start, width * sizeof(float));
    for (int64_t j = 0; j < count; ++j) {
      multiply(AxpyRows<Weight>{width, repeat_, panel + active[j] * repeat_ * width, width, nullptr, x + j * repeat_, out, out});
    }
  }

  Range active_outputs(const RunView& run, int64_t sample, int64_t part) const {
    return part_of(std::min(run.num_active(spec_.out_site, sample, out_), out_), part, parts_);
  }

  void gather_input(const RunView& run, int64_t sample, int64_t count, float* x) const {
    const float* in = run.row(x_, sample, 0);
    if (whole_input_) {
      const int32_t* active = run.active(spec_.in_site, sample).index;
      const int64_t stride = x_.positions > 1 ? 1 : x_.row_stride;
      for (int64_t j = 0; j < count; ++j) x[j] = in[active[j] * stride];
    } else if (x_.positions > 1 || x_.row_stride == 1) {
      std::memcpy(x, in, count * repeat_ * sizeof(float));
    } else {
      for (int64_t i = 0; i < count * repeat_; ++i) x[i] = in[i * x_.row_stride];
    }
  }

  void multiply(const DotRowsArgs& args) const { kernels_.dot_rows(args); }
  void multiply(const Bf16DotRowsArgs& args) const { kernels_.bf16_dot_rows(args); }
  void multiply(const AxpyRowsArgs& args) const { kernels_.axpy_rows(args); }
  void multiply(const Bf16AxpyRowsArgs& args) const { kernels_.bf16_axpy_rows(args); }

  void multiply_sparse(Range rows, const int32_t* index, const float* x, const float* start, float* out) const {
    kernels_.sparse_dot({rows.end - rows.begin, nonzeros_.row_start.data(), nonzeros_.column.data(), nonzeros_.value.data(), index,
                         rows.begin, x, start, out});
  }

  // Moves the compact input to its true places, from the last one on, as each lies at or behind where it came from; zeros between them.
  void spread_input(const int32_t* index, int64_t count, float* x) const {
    int64_t end = in_ / repeat_;  // of the channels not yet written
    for (int64_t j = count - 1; j >= 0; --j) {
      const int64_t channel = std::clamp<int64_t>(index[j], j, end - 1);  // a late reader's list may be out of order
      std::memmove(x + channel * repeat_, x + j * repeat_, repeat_ * sizeof(float));
      std::memset(x + (channel + 1) * repeat_, 0, (end - channel - 1) * repeat_ * sizeof(float));
      end = channel;
    }
    std::memset(x, 0, end * repeat_ * sizeof(float));
  }

  void activate(float* values, int64_t n) const {
    if (n > 0 && activation_.kind != Activation::kNone) {
      kernels_.epilogue({1, n, values, 0, nullptr, nullptr, 0, values, 0, activation_});
    }
  }

  const KernelTable& kernels_;
  int64_t in_, out_, repeat_;
  Rows x_;
  const float* given_;               // [out_][in_]
  const Weight* weight_ = nullptr;   // the same as it is multiplied; inputs that are not gated only
  AlignedBuffer<Weight> rounded_;    // what weight_ points to, unless that is given_
  const float* bias_;
  const float* means_ = nullptr;
  std::vector<float> bias_at_means_;
  ActivationSpec activation_;
  AlignedBuffer<Weight> transposed_;  // [panel][in_][outputs of the panel]; gated inputs only
  bool sparse_ = false;
  bool whole_input_ = false;
  CsrWeight nonzeros_;
  int64_t panel_;
  int64_t parts_;
  int64_t max_outputs_;
};

}  // namespace

std::unique_ptr<Op> make_linear(StepSpec spec, const KernelTable& kernels, int num_threads) {
  const SpecReader reader(spec);
  const bool bf16 = reader.integer("bf16", 0) != 0;
  reader.check(!bf16 || reader.integer("sparse", 0) == 0, "'sparse' and 'bf16' exclude each other");
  if (bf16) return std::make_unique<LinearOp<uint16_t>>(std::move(spec), kernels, num_threads);
  return std::make_unique<LinearOp<float>>(std::move(spec), kernels, num_threads);
}

}  // namespace dynprune
