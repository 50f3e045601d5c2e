// Pooling: by a sliding window, to a given size (adaptive), and to one mean per channel.
#include <cmath>
#include <limits>

#include "plan/ops/block_op.h"
#include "plan/ops/row_factories.h"
#include "plan/ops/window_map.h"

namespace dynprune {
namespace {

bool read_average(const SpecReader& reader) {
  const int64_t mode = reader.integer("mode");
  reader.check(mode == 0 || mode == 1, "mode must be 0 (max) or 1 (average), got " + std::to_string(mode));
  return mode == 1;
}

// How many elements the window of each output counts along one axis: those inside the input, or with `include_padding` inside the padded
// input, as PyTorch does.
std::vector<float> window_counts(int64_t outputs, int64_t inputs, int64_t kernel, int64_t stride, int64_t pad_before, int64_t pad_after,
                                 bool include_padding) {
  std::vector<float> counts;
  for (int64_t o = 0; o < outputs; ++o) {
    int64_t begin = o * stride - pad_before;
    int64_t end = std::min(begin + kernel, inputs + pad_after);
    if (!include_padding) {
      begin = std::max<int64_t>(begin, 0);
      end = std::min(end, inputs);
    }
    counts.push_back(static_cast<float>(end - begin));
  }
  return counts;
}

class PoolOp final : public BlockOp {
 public:
  PoolOp(StepSpec step, const KernelTable& kernels, int num_threads) : BlockOp(std::move(step), kernels), map_(spec_, kernels.lanes) {
    const SpecReader reader(spec_);
    const ConvShape& shape = map_.shape();
    if (read_average(reader)) count_windows(reader);
    const int64_t row_vectors = (shape.in_width + kernels.lanes - 1) / kernels.lanes;
    const auto vectors = static_cast<double>(shape.in_channels * shape.in_height * row_vectors);
    BlockLimits limits;
    limits.unit = shape.out_width;
    limits.total_ns = 0.5 * vectors * static_cast<double>(4 + shape.kernel_height + shape.kernel_width);
    limits.direct = Direct::kAlone;
    cut(limits, spec_.out_site, num_threads);
    const int64_t width = (shape.out_width + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
    reserve_extra(map_.lines().stride + map_.rows_seen(max_block_positions() / shape.out_width) * width);
  }

 protected:
  void compute_block(const RunView& run, int64_t sample, const Block& block, float* out, float* packed) const override {
    const int64_t width = map_.shape().out_width;
    const int64_t first_row = block.positions.begin / width;
    const int64_t num_rows = block.positions.end / width - first_row;
    const float* row_count = row_count_.empty() ? nullptr : row_count_.data() + first_row;
    for (int64_t i = block.rows.begin; i < block.rows.end; ++i) {
      kernels_.pool({&map_.window(), &map_.lines(), run.row(spec_.inputs[0], sample, i), first_row, num_rows, row_count,
                     column_count_.data(), packed, out + (i - block.rows.begin) * block.stride});
    }
  }

 private:
  void count_windows(const SpecReader& reader) {
    const ConvShape& shape = map_.shape();
    const int64_t divisor = reader.integer("divisor", 0);
    const int64_t include = reader.integer("count_include_pad", 1);
    reader.check(divisor >= 0, "divisor must be >= 0, got " + std::to_string(divisor));
    reader.check(include == 0 || include == 1, "count_include_pad must be 0 or 1, got " + std::to_string(include));
    reader.check(shape.dilation_y == 1 && shape.dilation_x == 1, "dilation must be [1, 1] for an average");
    if (divisor > 0) {
      row_count_.assign(shape.out_height, static_cast<float>(divisor));
      column_count_.assign(shape.out_width, 1.0f);
      return;
    }
    row_count_ = window_counts(shape.out_height, shape.in_height, shape.kernel_height, shape.stride_y, shape.pad_top, shape.pad_bottom,
                               include == 1);
    column_count_ = window_counts(shape.out_width, shape.in_width, shape.kernel_width, shape.stride_x, shape.pad_left, shape.pad_right,
                                  include == 1);
  }

  WindowMap map_;
  std::vector<float> row_count_;  // empty: maximum
  std::vector<float> column_count_;
};

// Output o sees the inputs from floor(o * inputs / outputs) to ceil((o + 1) * inputs / outputs), as in PyTorch.
class AdaptivePoolOp final : public BlockOp {
 public:
  AdaptivePoolOp(StepSpec step, const KernelTable& kernels, int num_threads)
      : BlockOp(std::move(step), kernels), in_(SpecReader(spec_).ints("in_size", 3)), out_(SpecReader(spec_).ints("out_size", 3)) {
    const SpecReader reader(spec_);
    average_ = read_average(reader);
    for (int axis = 0; axis < 3; ++axis) reader.check(in_[axis] >= 1 && out_[axis] >= 1, "sizes must be >= 1");
    reader.check(in_[0] == out_[0], "in_size and out_size must have the same channels");
    reader.check(spec_.in_site == spec_.out_site, "in_site must equal out_site");
    reader.check_rows("the input", reader.input(0), in_[0], in_[1] * in_[2]);
    reader.check_rows("the output", spec_.output, out_[0], out_[1] * out_[2]);
    BlockLimits limits;
    limits.unit = out_[2];
    limits.total_ns = static_cast<double>(in_[0] * in_[1] * in_[2] + out_[0] * out_[1] * in_[2]);
    limits.direct = Direct::kAlone;
    cut(limits, spec_.out_site, num_threads);
    reserve_extra(in_[2]);
  }

 protected:
  void compute_block(const RunView& run, int64_t sample, const Block& block, float* out, float* line) const override {
    const int64_t first = block.positions.begin / out_[2];
    const int64_t last = block.positions.end / out_[2];
    for (int64_t i = block.rows.begin; i < block.rows.end; ++i) {
      const float* plane = run.row(spec_.inputs[0], sample, i);
      float* target = out + (i - block.rows.begin) * block.stride;
      for (int64_t y = first; y < last; ++y) {
        const Range rows = window(y, in_[1], out_[1]);
        std::copy_n(plane + rows.begin * in_[2], in_[2], line);
        for (int64_t r = rows.begin + 1; r < rows.end; ++r) {
          for (int64_t x = 0; x < in_[2]; ++x) line[x] = combine(line[x], plane[r * in_[2] + x]);
        }
        for (int64_t x = 0; x < out_[2]; ++x) {
          const Range columns = window(x, in_[2], out_[2]);
          float value = line[columns.begin];
          for (int64_t s = columns.begin + 1; s < columns.end; ++s) value = combine(value, line[s]);
          const int64_t count = (rows.end - rows.begin) * (columns.end - columns.begin);
          *target++ = average_ ? value / static_cast<float>(count) : value;
        }
      }
    }
  }

 private:
  static Range window(int64_t output, int64_t inputs, int64_t outputs) {
    return {output * inputs / outputs, ((output + 1) * inputs + outputs - 1) / outputs};
  }
  float combine(float a, float b) const {
    if (average_) return a + b;
    return std::isnan(a) || a > b ? a : b;
  }

  std::vector<int64_t> in_, out_;
  bool average_;
};

// Mean over the positions of each row. With `scatter` every channel of the input's site has an output; those that do not run get 0.
class MeanOp final : public BlockOp {
 public:
  MeanOp(StepSpec step, const KernelTable& kernels, int num_threads) : BlockOp(std::move(step), kernels) {
    const SpecReader reader(spec_);
    const Rows& in = reader.input(0);
    scatter_ = reader.integer("scatter", 0) != 0;
    reader.check(in.positions >= 1, "the input must have positions");
    reader.check_rows("the output", spec_.output, in.rows, 1);
    if (scatter_) {
      reader.check(spec_.out_site < 0, "out_site must be -1 with scatter, got " + std::to_string(spec_.out_site));
    } else {
      reader.check(spec_.in_site == spec_.out_site, "in_site must equal out_site without scatter");
    }
    BlockLimits limits;
    limits.unit = 1;
    limits.total_ns = static_cast<double>(in.rows * (in.positions + 100)) * 0.1;
    cut(limits, spec_.out_site, num_threads);
  }

 protected:
  void compute_block(const RunView& run, int64_t sample, const Block& block, float* out, float*) const override {
    const Rows& in = spec_.inputs[0];
    if (!scatter_ || spec_.in_site < 0) {
      kernels_.row_means({block.rows.end - block.rows.begin, in.positions, run.row(in, sample, block.rows.begin), in.row_stride, out});
      return;
    }
    std::fill(out, out + (block.rows.end - block.rows.begin), 0.0f);
    const ActiveList& list = run.active(spec_.in_site, sample);
    const int32_t* index = list.index;
    const int32_t* end = index + std::min(list.count, in.rows);
    for (const int32_t* i = std::lower_bound(index, end, static_cast<int32_t>(block.rows.begin)); i < end; ++i) {
      const int64_t channel = *i;
      if (channel < block.rows.begin || channel >= block.rows.end) break;
      kernels_.row_means({1, in.positions, run.row(in, sample, i - index), in.row_stride, out + channel - block.rows.begin});
    }
  }

 private:
  bool scatter_;
};

}  // namespace

std::unique_ptr<Op> make_pool(StepSpec spec, const KernelTable& kernels, int num_threads) {
  return std::make_unique<PoolOp>(std::move(spec), kernels, num_threads);
}
std::unique_ptr<Op> make_adaptive_pool(StepSpec spec, const KernelTable& kernels, int num_threads) {
  return std::make_unique<AdaptivePoolOp>(std::move(spec), kernels, num_threads);
}
std::unique_ptr<Op> make_mean(StepSpec spec, const KernelTable& kernels, int num_threads) {
  return std::make_unique<MeanOp>(std::move(spec), kernels, num_threads);
}

}  // namespace dynprune
