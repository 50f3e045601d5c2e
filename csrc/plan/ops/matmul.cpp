// Product of two values of a sample: out[b][i][p] = scale * sum_k left[b][i][k] * right[b][k][p], both with any strides.
//
// Lanes run along p. A chunk is one matrix of the batch by one tile of p by a part of the rows: it packs right[.][tile] into a panel and
// multiplies with `left` where it lies.
#include <algorithm>
#include <cstring>
#include <limits>

#include "plan/ops/conv_tiling.h"
#include "plan/ops/row_factories.h"
#include "plan/ops/spec_reader.h"

namespace dynprune {
namespace {

constexpr size_t kMaxBatchRank = 4;
constexpr double kMultiplyAddsPerChunk = 2e6;

// One operand: where matrix b starts, and how far apart its rows and columns are.
struct Matrices {
  std::vector<int64_t> batch_strides;
  int64_t row_stride;
  int64_t column_stride;

  int64_t first(const std::vector<int64_t>& batch, int64_t matrix) const {
    int64_t offset = 0;
    for (size_t d = batch.size(); d-- > 0;) {
      offset += matrix % batch[d] * batch_strides[d];
      matrix /= batch[d];
    }
    return offset;
  }
};

class MatmulOp final : public Op {
 public:
  MatmulOp(StepSpec step, const KernelTable& kernels) : Op(std::move(step)), kernels_(kernels) {
    const SpecReader reader(spec_);
    rows_ = reader.integer("rows");
    inner_ = reader.integer("inner");
    positions_ = reader.integer("positions");
    const auto batch = spec_.ints.find("batch");
    reader.check(batch != spec_.ints.end() && batch->second.size() <= kMaxBatchRank, "needs ints 'batch' of rank 4 or less");
    batch_ = batch->second;
    int64_t matrices = 1;
    for (const int64_t size : batch_) {
      reader.check(size >= 1 && matrices <= (int64_t{1} << 31) / size, "sizes of the batch must be >= 1 and in all below 2^31");
      matrices *= size;
    }
    reader.check(rows_ >= 1 && inner_ >= 1 && positions_ >= 1, "rows, inner and positions must be >= 1");
    reader.check(spec_.in_site < 0 && spec_.out_site < 0, "must not be gated");
    left_ = read_matrices(reader, "left_strides", reader.input(0), rows_, inner_);
    right_ = read_matrices(reader, "right_strides", reader.input(1), inner_, positions_);
    out_ = read_matrices(reader, "out_strides", spec_.output, rows_, positions_);
    reader.check(out_.column_stride == 1 || positions_ == 1, "the output's positions must be contiguous");
    const auto scale = spec_.floats.find("scale");
    if (scale != spec_.floats.end()) {
      reader.check(scale->second.size() == 1, "floats 'scale' must hold 1 value");
      scale_ = scale->second[0];
    }
    reader.check((inner_ - 1) * left_.column_stride <= std::numeric_limits<int32_t>::max(), "the left operand is too large");
    for (int64_t k = 0; k < inner_; ++k) left_offset_.push_back(static_cast<int32_t>(k * left_.column_stride));
    tiles_ = make_tiles(positions_, kernels.lanes, kernels.gemm_max_vectors, 0);
    const double work = static_cast<double>(rows_) * static_cast<double>(inner_) * static_cast<double>(max_width());
    row_parts_ = std::clamp<int64_t>(static_cast<int64_t>(work / kMultiplyAddsPerChunk), 1, rows_);
    matrices_ = matrices;
  }

  int64_t chunks_per_sample() const override { return matrices_ * static_cast<int64_t>(tiles_.size()) * row_parts_; }
  int64_t scratch_floats() const override { return (inner_ + (rows_ + row_parts_ - 1) / row_parts_) * max_width(); }

  void compute(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const Chunk chunk = chunk_of(part);
    const int64_t width = chunk.tile->vectors * kernels_.lanes;
    const int64_t rows = chunk.rows.end - chunk.rows.begin;
    float* out = scratch;
    float* panel = out + rows * width;
    pack(run.row(spec_.inputs[1], sample, 0) + right_.first(batch_, chunk.matrix), *chunk.tile, width, panel);
    const float* left = run.row(spec_.inputs[0], sample, 0) + left_.first(batch_, chunk.matrix) + chunk.rows.begin * left_.row_stride;
    kernels_.gather_gemm({rows, inner_, width, 0, left, left_.row_stride, false, nullptr, 0, left_offset_.data(), panel, width, out, width,
                          false});
  }

  void commit(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const Chunk chunk = chunk_of(part);
    const int64_t width = chunk.tile->vectors * kernels_.lanes;
    float* out = run.row(spec_.output, sample, 0) + out_.first(batch_, chunk.matrix) + chunk.tile->first;
    for (int64_t i = chunk.rows.begin; i < chunk.rows.end; ++i) {
      std::memcpy(out + i * out_.row_stride, scratch + (i - chunk.rows.begin) * width, chunk.tile->count * sizeof(float));
    }
  }

 private:
  struct Chunk {
    int64_t matrix;
    const PositionTile* tile;
    Range rows;
  };

  Chunk chunk_of(int64_t part) const {
    const auto tiles = static_cast<int64_t>(tiles_.size());
    const Range rows = part_of(rows_, part % row_parts_, row_parts_);
    part /= row_parts_;
    return {part / tiles, &tiles_[part % tiles], rows};
  }

  int64_t max_width() const { return static_cast<int64_t>(kernels_.gemm_max_vectors) * kernels_.lanes; }

  // Batch strides, row stride and column stride; everything they reach must lie in the operand, one row of so many positions.
  Matrices read_matrices(const SpecReader& reader, const char* name, const Rows& operand, int64_t rows, int64_t columns) const {
    std::vector<int64_t> strides = reader.ints(name, batch_.size() + 2);
    Matrices result;
    int64_t last = 0;
    const auto reach = [&](int64_t size, int64_t stride) {
      reader.check(stride >= 0, std::string(name) + " must be >= 0");
      reader.check(size == 1 || stride <= operand.positions / (size - 1), std::string(name) + " reach beyond the operand");
      last += (size - 1) * stride;
    };
    reach(rows, strides[batch_.size()]);
    reach(columns, strides[batch_.size() + 1]);
    for (size_t d = 0; d < batch_.size(); ++d) reach(batch_[d], strides[d]);
    reader.check(operand.rows == 1 && last < operand.positions, std::string(name) + " reach beyond the operand");
    result.column_stride = strides.back();
    strides.pop_back();
    result.row_stride = strides.back();
    strides.pop_back();
    result.batch_strides = std::move(strides);
    return result;
  }

  // panel[k][lane] = scale * right[k][tile.first + lane]; lanes past the tile are zero.
  void pack(const float* right, const PositionTile& tile, int64_t width, float* panel) const {
    right += tile.first * right_.column_stride;
    for (int64_t k = 0; k < inner_; ++k) {
      const float* from = right + k * right_.row_stride;
      float* line = panel + k * width;
      if (right_.column_stride == 1) {
        for (int64_t p = 0; p < tile.count; ++p) line[p] = from[p] * scale_;
      } else {
        for (int64_t p = 0; p < tile.count; ++p) line[p] = from[p * right_.column_stride] * scale_;
      }
      std::fill(line + tile.count, line + width, 0.0f);
    }
  }

  const KernelTable& kernels_;
  int64_t rows_, inner_, positions_;
  std::vector<int64_t> batch_;
  int64_t matrices_;
  Matrices left_, right_, out_;
  float scale_ = 1.0f;
  std::vector<int32_t> left_offset_;
  std::vector<PositionTile> tiles_;
  int64_t row_parts_;
};

}  // namespace

std::unique_ptr<Op> make_matmul(StepSpec spec, const KernelTable& kernels, int /*num_threads*/) {
  return std::make_unique<MatmulOp>(std::move(spec), kernels);
}

}  // namespace dynprune
