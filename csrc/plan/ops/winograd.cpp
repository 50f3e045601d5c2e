// A chunk is a group of tiles by a part of the active rows. It transforms the tiles of every active input channel, then, a block of
// rows at a time, multiplies (one product per element of a tile, with the same index lists) and transforms back; the plane rows that
// come out stay in scratch, and commit adds bias and residual, activates and stores.
#include "plan/ops/winograd.h"

#include <algorithm>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "plan/ops/factories.h"
#include "plan/ops/spec_reader.h"

namespace dynprune {
namespace {

constexpr int64_t kUnit = 8;  // output columns of a unit
// Rows whose products lie in scratch before they are transformed back: 36 x 32 x 32 floats stay in a second-level cache.
constexpr int64_t kBlockRows = 2 * kPackedRows;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// A stride of an odd number of cache lines, so that rows a power of two apart do not fall into one set of the cache.
int64_t odd_lines(int64_t floats) { return (divide_up(floats, 16) | 1) * 16; }

bool is_candidate(const ConvShape& s) {
  return s.kernel_height == 3 && s.kernel_width == 3 && s.stride_y == 1 && s.stride_x == 1 && s.dilation_y == 1 && s.dilation_x == 1 &&
         s.groups == 1;
}

// How the units of a plane fall into groups of lanes.
struct Grouping {
  int64_t units_per_row;  // of a tile row
  int64_t units;
  int64_t quantum;  // lanes are added in steps of a vector, or of a unit where that is more
  int64_t quanta;

  Grouping(const ConvShape& shape, int64_t tile, int lanes)
      : units_per_row(divide_up(shape.out_width, kUnit)),
        units(divide_up(shape.out_height, tile) * units_per_row),
        quantum(std::max<int64_t>(lanes, kUnit / tile)),
        quanta(divide_up(units, quantum * tile / kUnit)) {}
};

struct Run {  // positions [first, first + count) of the output plane, at `source` in a row of results
  int64_t first, source, count;
};

struct Group {
  std::vector<WinogradUnit> units;
  std::vector<WinogradBand> bands;
  std::vector<Run> runs;
  int64_t width;
  int64_t line_floats;
  int64_t result_floats;
};

// The units [first, last) of the plane as one group of `width` lanes.
Group make_group(const ConvShape& shape, int64_t tile, int64_t units_per_row, Range range, int64_t width) {
  Group group{{}, {}, {}, width, 0, 0};
  const int64_t origin = (range.begin / units_per_row) * tile * shape.out_width + (range.begin % units_per_row) * kUnit;
  for (int64_t u = range.begin; u < range.end;) {
    const int64_t row = u / units_per_row;
    const int64_t end = std::min(range.end, (row + 1) * units_per_row);
    const int64_t x = (u % units_per_row) * kUnit;
    const int64_t y = row * tile;
    const int64_t rows = std::min(tile, shape.out_height - y);
    const int64_t columns = std::min((end - u) * kUnit, shape.out_width - x);
    const int64_t in_columns = (end - u) * kUnit + 2;
    group.bands.push_back({static_cast<int32_t>(y - shape.pad_top), static_cast<int32_t>(x - shape.pad_left),
                           static_cast<int32_t>(in_columns), static_cast<int32_t>(group.line_floats)});
    for (int64_t i = 0; u < end; ++u, ++i) {
      group.units.push_back({static_cast<int32_t>(group.line_floats + i * kUnit),
                             static_cast<int32_t>(y * shape.out_width + x + i * kUnit - origin),
                             static_cast<int32_t>(std::min(kUnit, columns - i * kUnit)), static_cast<int32_t>(rows)});
    }
    group.line_floats += align(in_columns);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = (y + r) * shape.out_width + x;
      if (!group.runs.empty() && group.runs.back().first + group.runs.back().count == first) {
        group.runs.back().count += columns;
      } else {
        group.runs.push_back({first, first - origin, columns});
      }
    }
  }
  group.units.resize(divide_up(width * tile, kUnit), WinogradUnit{0, 0, 0, 0});
  const Run& last = group.runs.back();
  group.result_floats = last.source + last.count;
  return group;
}

// What the steps of a convolution cost, in multiply-adds of one vector. Every weight costs another one for being read: from memory, for
// the weights of a model do not stay in a cache. With one vector of tiles each broadcast serves one multiply-add only: 0.7 of the rate.
// Pairs of bfloat16 take half of both; Winograd stays in f32, as its transforms would lose too many of the few bits.
double direct_cost(const ConvShape& shape, const KernelTable& kernels, bool bf16) {
  const auto weights = static_cast<double>(shape.out_channels * shape.in_channels * 9);
  const auto tiles = make_conv_tiles(shape, kernels, kernels.gemm_max_tail);
  const double tail = static_cast<double>(tiles.back().tail) / kernels.lanes;
  double vectors = tail;
  for (const PositionTile& tile : tiles) vectors += static_cast<double>(tile.vectors);
  return weights * (vectors + 1) / (bf16 ? kernels.bf16_per_item : 1);
}

double winograd_cost(const ConvShape& shape, int64_t tile, int lanes) {
  const double input_transform = tile == 2 ? 150 : 400;  // of one channel and one vector of tiles
  const double output_transform = tile == 2 ? 80 : 280;
  const Grouping grouping(shape, tile, lanes);
  const double vectors = static_cast<double>(grouping.quanta * grouping.quantum) / lanes;
  const auto weights = static_cast<double>(shape.out_channels * shape.in_channels * (tile + 2) * (tile + 2));
  return weights * (std::max(vectors, 1.4) + 1) +
         vectors * (static_cast<double>(shape.in_channels) * input_transform + static_cast<double>(shape.out_channels) * output_transform);
}

// G of kernels/winograd-inl.h: side x 3; the row of a point p is 1, p, p^2 divided by the product of p's distances to the other points.
class WeightTransform {
 public:
  explicit WeightTransform(int64_t tile) : side_(tile + 2) {
    const std::vector<double> points = tile == 2 ? std::vector<double>{0, 1, -1} : std::vector<double>{0, 0.75, -0.75, 1.5, -1.5};
    for (size_t i = 0; i < points.size(); ++i) {
      double distances = 1;
      for (size_t j = 0; j < points.size(); ++j) distances *= i == j ? 1 : points[i] - points[j];
      for (int s = 0; s < 3; ++s) matrix_[i][s] = (s == 0 ? 1 : s == 1 ? points[i] : points[i] * points[i]) / distances;
    }
    matrix_[points.size()][2] = 1;
  }

  // u[e * stride] = (G g G')[e] for the 3 x 3 weights g, in double precision.
  void apply(const float* g, float* u, int64_t stride) const {
    for (int64_t i = 0; i < side_; ++i) {
      double row[3];
      for (int s = 0; s < 3; ++s) row[s] = matrix_[i][0] * g[s] + matrix_[i][1] * g[3 + s] + matrix_[i][2] * g[6 + s];
      for (int64_t j = 0; j < side_; ++j, u += stride) {
        *u = static_cast<float>(row[0] * matrix_[j][0] + row[1] * matrix_[j][1] + row[2] * matrix_[j][2]);
      }
    }
  }

 private:
  int64_t side_;
  double matrix_[6][3] = {};
};

class WinogradOp final : public Op, public Compensated {
 public:
  WinogradOp(StepSpec step, const KernelTable& kernels, int num_threads, int64_t tile)
      : Op(std::move(step)), kernels_(kernels), shape_(read_conv_shape(spec_)), tile_(tile), products_((tile + 2) * (tile + 2)) {
    const SpecReader reader(spec_);
    x_ = reader.input(0);
    reader.check_rows("the input", x_, shape_.in_channels, shape_.in_positions());
    reader.check_rows("the output", spec_.output, shape_.out_channels, shape_.positions());
    reader.check(shape_.out_height + 2 == shape_.in_height + shape_.pad_top + shape_.pad_bottom &&
                     shape_.out_width + 2 == shape_.in_width + shape_.pad_left + shape_.pad_right,
                 "'out_size' must be 'in_size' plus padding less 2 for a 3x3 kernel");
    if (spec_.inputs.size() > 1) {
      reader.check(spec_.out_site < 0, "a residual needs an output that is not gated");
      reader.check_rows("the residual", reader.input(1), shape_.out_channels, shape_.positions());
    }
    bias_ = reader.constant("bias", {shape_.out_channels});
    activation_ = reader.activation();
    make_weights(reader.constant("weight", {shape_.out_channels, shape_.in_channels * 9}));
    make_groups(num_threads);
  }

  int64_t chunks_per_sample() const override { return static_cast<int64_t>(groups_.size()) * row_parts_; }

  int64_t scratch_floats() const override { return lines_offset() + (tile_ + 2) * line_stride_; }

  void compute(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const Chunk chunk = chunk_of(run, sample, part);
    if (chunk.rows.begin == chunk.rows.end) return;
    const Group& group = *chunk.group;
    const int64_t count = std::min(run.num_active(spec_.in_site, sample, shape_.in_channels), shape_.in_channels);
    float* inputs = scratch + inputs_offset();
    const int64_t input_stride = odd_lines(count * group.width);
    kernels_.winograd_input({tile_, count, run.row(x_, sample, 0), x_.row_stride, shape_.in_height, shape_.in_width, group.bands.data(),
                             static_cast<int64_t>(group.bands.size()), group.units.data(), group.width, scratch + lines_offset(),
                             line_stride_, inputs, input_stride});
    const int32_t* column_offsets = all_columns_.data();
    if (spec_.in_site >= 0) {
      auto* offsets = reinterpret_cast<int32_t*>(scratch + column_offsets_offset());
      const int32_t* index = run.active(spec_.in_site, sample).index;
      for (int64_t c = 0; c < count; ++c) offsets[c] = all_columns_[index[c]];
      std::fill_n(offsets + count, kColumnsAhead, 0);
      column_offsets = offsets;
    }
    float* sums = scratch + sums_offset();
    const int64_t rows = chunk.rows.end - chunk.rows.begin;
    const int64_t blocks = divide_up(rows, kBlockRows);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kBlockRows;
      const int64_t block_rows = std::min(kBlockRows, rows - first);
      const int64_t sum_stride = odd_lines(block_rows * group.width);
      kernels_.winograd_products({products_, block_rows, count, group.width, weights_.data(), weight_stride_, tile_stride(),
                                  chunk.index != nullptr ? chunk.index + chunk.rows.begin + first : nullptr, chunk.rows.begin + first,
                                  column_offsets, inputs, input_stride, sums, sum_stride});
      kernels_.winograd_output({tile_, block_rows, sums, sum_stride, group.units.data(), group.width, scratch + first * result_stride_,
                                result_stride_, shape_.out_width});
    }
    float* bias = scratch + bias_offset();
    if (compensation_ != nullptr && count < shape_.in_channels) {
      kernels_.dot_rows({rows, shape_.in_channels, compensation_, shape_.in_channels,
                         chunk.index != nullptr ? chunk.index + chunk.rows.begin : nullptr, chunk.rows.begin,
                         run.active(spec_.in_site, sample).inactive, bias_, bias});
    } else {
      for (int64_t i = 0; i < rows; ++i) bias[i] = bias_[chunk.channel(chunk.rows.begin + i)];
    }
  }

  void commit(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const Chunk chunk = chunk_of(run, sample, part);
    const int64_t rows = chunk.rows.end - chunk.rows.begin;
    if (rows == 0) return;
    const bool has_residual = spec_.inputs.size() > 1;
    for (const Run& out : chunk.group->runs) {
      const float* residual = has_residual ? run.row(spec_.inputs[1], sample, chunk.rows.begin) + out.first : nullptr;
      kernels_.epilogue({rows, out.count, scratch + out.source, result_stride_, scratch + bias_offset(), residual,
                         has_residual ? spec_.inputs[1].row_stride : 0, run.row(spec_.output, sample, chunk.rows.begin) + out.first,
                         spec_.output.row_stride, activation_});
    }
  }

  void skip(const RunView& run, int64_t sample, int64_t part) const override {
    if (spec_.inputs.size() < 2) return;
    const Chunk chunk = chunk_of(run, sample, part);
    const Rows& residual = spec_.inputs[1];
    for (const Run& out : chunk.group->runs) {
      kernels_.epilogue({chunk.rows.end - chunk.rows.begin, out.count, run.row(residual, sample, chunk.rows.begin) + out.first,
                         residual.row_stride, nullptr, nullptr, 0, run.row(spec_.output, sample, chunk.rows.begin) + out.first,
                         spec_.output.row_stride, activation_});
    }
  }

  bool hands_over() const override { return spec_.inputs.size() > 1; }

  void set_compensation(const float* compensation) override { compensation_ = compensation; }
  std::vector<int64_t> compensation_sizes() const override { return {shape_.out_channels, shape_.in_channels}; }

 private:
  struct Chunk {
    const Group* group;
    Range rows;            // among the active rows
    const int32_t* index;  // of all active rows; nullptr: row i is channel i

    int64_t channel(int64_t row) const { return index != nullptr ? index[row] : row; }
  };

  Chunk chunk_of(const RunView& run, int64_t sample, int64_t part) const {
    const auto groups = static_cast<int64_t>(groups_.size());
    const int64_t count = std::min(run.num_active(spec_.out_site, sample, shape_.out_channels), shape_.out_channels);
    const int64_t parts = parts_of_some(count, shape_.out_channels, row_parts_, least_row_parts_);
    const Range rows = part / groups < parts ? part_of(count, part / groups, parts) : Range{count, count};
    return {&groups_[part % groups], rows, spec_.out_site < 0 ? nullptr : run.active(spec_.out_site, sample).index};
  }

  int64_t tile_stride() const { return shape_.in_channels * kPackedRows; }

  void make_weights(const float* weight) {
    const int64_t channels = shape_.in_channels;
    weight_stride_ = odd_lines(divide_up(shape_.out_channels, kPackedRows) * tile_stride());
    weights_ = AlignedBuffer<float>(products_ * weight_stride_);
    const WeightTransform transform(tile_);
    for (int64_t c = 0; c < channels + kColumnsAhead; ++c) all_columns_.push_back(static_cast<int32_t>(c * kPackedRows));
    for (int64_t first = 0; first < shape_.out_channels; first += kPackedRows) {
      for (int64_t c = 0; c < channels; ++c) {
        float* column = weights_.data() + first / kPackedRows * tile_stride() + all_columns_[c];
        const int64_t last = std::min(first + kPackedRows, shape_.out_channels);
        for (int64_t k = first; k < last; ++k) transform.apply(weight + (k * channels + c) * 9, column + k - first, weight_stride_);
      }
    }
  }

  void make_groups(int num_threads) {
    // A chunk of this many vector multiply-adds takes some 50 microseconds.
    constexpr int64_t kChunkWork = 200'000;
    // Groups of one vector read each weight for one multiply-add: only weights that a second-level cache holds come that fast, and with
    // half of the rows and columns one vector reaches 0.67 of peak, two 0.80. Weights that no cache keeps from one group to the next
    // are read as few times as can be.
    constexpr int64_t kNearWeights = 256 * 1024;
    constexpr int64_t kFarWeights = 4 * 1024 * 1024;
    // A part of the rows transforms the inputs again, which costs as much as 11 rows do.
    constexpr int64_t kMinRows = 64;
    const Grouping grouping(shape_, tile_, kernels_.lanes);
    const int64_t weights = products_ * shape_.out_channels * shape_.in_channels;
    const int64_t vectors = divide_up(grouping.quanta * grouping.quantum, kernels_.lanes);
    const int64_t wanted = std::max<int64_t>(1, weights * vectors / kChunkWork);
    const bool gated = spec_.in_site >= 0 || spec_.out_site >= 0;
    const int64_t least = weights > kFarWeights ? kernels_.gemm_max_vectors : weights > kNearWeights || gated ? 2 : 1;
    const int64_t vectors_per_group = std::clamp<int64_t>(vectors / wanted, least, kernels_.gemm_max_vectors);
    const int64_t quanta_per_group = std::max<int64_t>(1, vectors_per_group * kernels_.lanes / grouping.quantum);
    const int64_t num_groups = divide_up(grouping.quanta, quanta_per_group);
    const int64_t units_per_quantum = grouping.quantum * tile_ / kUnit;
    for (int64_t g = 0; g < num_groups; ++g) {
      const Range quanta = part_of(grouping.quanta, g, num_groups);
      groups_.push_back(make_group(shape_, tile_, grouping.units_per_row,
                                   {quanta.begin * units_per_quantum, std::min(grouping.units, quanta.end * units_per_quantum)},
                                   (quanta.end - quanta.begin) * grouping.quantum));
      max_width_ = std::max(max_width_, groups_.back().width);
      line_stride_ = std::max(line_stride_, odd_lines(groups_.back().line_floats));
      result_stride_ = std::max(result_stride_, odd_lines(groups_.back().result_floats));
    }
    if (num_threads > 1) {
      const int64_t parts = divide_up(std::min<int64_t>(wanted, 2 * num_threads), num_groups);
      row_parts_ = std::clamp<int64_t>(parts, 1, std::max<int64_t>(1, shape_.out_channels / kMinRows));
      least_row_parts_ = std::min(row_parts_, divide_up(num_threads, num_groups));
    }
    max_rows_ = divide_up(shape_.out_channels, row_parts_);
  }

  // Scratch: results, bias, offsets of columns, sums of a block of rows, transformed inputs, lines.
  int64_t bias_offset() const { return max_rows_ * result_stride_; }
  int64_t column_offsets_offset() const { return bias_offset() + align(max_rows_); }
  int64_t sums_offset() const { return column_offsets_offset() + align(shape_.in_channels + kColumnsAhead); }
  int64_t inputs_offset() const { return sums_offset() + products_ * odd_lines(kBlockRows * max_width_); }
  int64_t lines_offset() const { return inputs_offset() + products_ * odd_lines(shape_.in_channels * max_width_); }

  const KernelTable& kernels_;
  ConvShape shape_;
  int64_t tile_;
  int64_t products_;
  Rows x_;
  const float* bias_;
  const float* compensation_ = nullptr;
  ActivationSpec activation_;
  AlignedBuffer<float> weights_;  // [product][out_channels / kPackedRows][in_channels][kPackedRows]
  int64_t weight_stride_ = 0;
  std::vector<Group> groups_;
  std::vector<int32_t> all_columns_;  // where each input channel's weights stand in a packed tile of rows
  int64_t row_parts_ = 1;
  int64_t least_row_parts_ = 1;  // that give every thread a part of few rows
  int64_t max_rows_ = 0;
  int64_t max_width_ = 0;
  int64_t line_stride_ = 0;
  int64_t result_stride_ = 0;
};

}  // namespace

int64_t choose_winograd_tile(const StepSpec& spec, const ConvShape& shape, const KernelTable& kernels) {
  const SpecReader reader(spec);
  const int64_t asked = reader.integer("winograd", -1);
  if (asked >= 0) {
    reader.check(asked == 0 || asked == 2 || asked == 4, "'winograd' must be 0, 2 or 4, got " + std::to_string(asked));
    reader.check(asked == 0 || is_candidate(shape), "'winograd' needs a 3x3 kernel of stride 1 and dilation 1 in one group");
    return asked;
  }
  if (!is_candidate(shape)) return 0;
  const int64_t best = winograd_cost(shape, 4, kernels.lanes) < winograd_cost(shape, 2, kernels.lanes) ? 4 : 2;
  const bool bf16 = reader.integer("bf16", 0) != 0;
  return winograd_cost(shape, best, kernels.lanes) < 0.9 * direct_cost(shape, kernels, bf16) ? best : 0;
}

std::unique_ptr<Op> make_winograd(StepSpec spec, const KernelTable& kernels, int num_threads, int64_t tile) {
  return std::make_unique<WinogradOp>(std::move(spec), kernels, num_threads, tile);
}

}  // namespace dynprune
