// Convolution (and, with one row of tokens as its plane, a linear layer) over any lists of input and output channels.
//
// A chunk is some rows by some tiles of positions. A product (`conv_product.h`) leaves its sums in scratch; commit adds bias and residual,
// activates and stores.
//
// Skipped inputs at their means m: a layer of one tap starts from bias + W m and takes off sum over the active c of w_c m_c, a product
// with one more position, whose weights are at hand. One of several taps adds the columns of a matrix, which is smaller than its weights.
#include <algorithm>
#include <optional>
#include <vector>

#include "plan/ops/conv_product.h"
#include "plan/ops/factories.h"
#include "plan/ops/spec_reader.h"
#include "plan/ops/winograd.h"

namespace dynprune {
namespace {

class ConvOp final : public Op, public Compensated {
 public:
  ConvOp(StepSpec step, const KernelTable& kernels, int num_threads) : Op(std::move(step)), kernels_(kernels), alone_(num_threads == 1) {
    const SpecReader reader(spec_);
    const ConvShape shape = read_conv_shape(spec_);
    const Rows x = reader.input(0);
    reader.check_rows("the input", x, shape.in_channels, shape.in_positions());
    reader.check_rows("the output", spec_.output, shape.out_channels, shape.positions());
    if (spec_.inputs.size() > 1) {
      reader.check(spec_.out_site < 0, "a residual needs an output that is not gated");
      reader.check_rows("the residual", reader.input(1), shape.out_channels, shape.positions());
    }
    weight_ = reader.constant("weight", {shape.out_channels, shape.group_inputs() * shape.taps()});
    bias_ = reader.constant("bias", {shape.out_channels});
    activation_ = reader.activation();
    const bool sparse = reader.integer("sparse", 0) != 0;
    const bool bf16 = reader.integer("bf16", 0) != 0;
    reader.check(!sparse || shape.groups == 1, "'sparse' needs one group");
    constexpr int64_t kMaxWeights = int64_t{1} << 31;  // what an int32 offset into pairs or items reaches
    reader.check(!bf16 || shape.out_channels * shape.group_inputs() * shape.taps() <= kMaxWeights, "'bf16' takes at most 2^31 weights");

    std::vector<PositionTile> tiles = make_conv_tiles(shape, kernels, sparse ? 0 : kernels.gemm_max_tail);
    PatchMap patches = make_patch_map(shape, tiles, kernels.lanes, x);
    const double pack_cycles = patches.cycles_per_k + (bf16 ? rounding_cycles(patches, tiles[0]) : 0.0);
    const ChunkGrid grid = make_chunk_grid(shape, tiles, pack_cycles, num_threads, bf16 ? kernels.bf16_per_item : 1);
    layout_.emplace(ConvLayout{kernels, shape, x, std::move(patches), {shape, std::move(tiles), grid, kernels.lanes}});
    product_ = sparse ? make_sparse_product(*layout_, weight_, spec_.in_site >= 0)
               : bf16 ? make_bf16_product(*layout_, weight_)
                      : make_dense_product(*layout_, weight_, reader.integer("packed", 1) != 0);
    by_means_ = shape.taps() == 1 && shape.groups == 1 && reader.integer("phases", 1) == 1 && product_->takes_means();
  }

  int64_t chunks_per_sample() const override { return layout_->chunks.count(); }

  int64_t scratch_floats() const override { return product_offset() + product_->scratch_floats(); }

  void compute(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const ConvChunk chunk = chunk_of(run, sample, part);
    const int64_t in_channels = layout_->shape.in_channels;
    const int64_t in_count = std::min(run.num_active(spec_.in_site, sample, in_channels), in_channels);
    const int32_t* in_index = spec_.in_site < 0 ? nullptr : run.active(spec_.in_site, sample).index;
    const bool compensated = compensation_ != nullptr && in_count < in_channels;
    float* bias = scratch + bias_offset();
    float* at_means = compensated && by_means_ ? bias : nullptr;
    if (alone_) ask_for_results(run, sample, chunk);
    product_->multiply({run, sample, chunk, in_index, in_count, scratch, compensation_, at_means, scratch + product_offset()});
    const int64_t rows = chunk.rows.end - chunk.rows.begin;
    if (at_means != nullptr) {
      for (int64_t i = 0; i < rows; ++i) bias[i] = bias_at_means_[chunk.channel(chunk.rows.begin + i)] - at_means[i];
    } else if (compensated) {
      kernels_.dot_rows({rows, in_channels, compensation_, in_channels, chunk.index != nullptr ? chunk.index + chunk.rows.begin : nullptr,
                         chunk.rows.begin, run.active(spec_.in_site, sample).inactive, bias_, bias});
    } else {
      for (int64_t i = 0; i < rows; ++i) bias[i] = bias_[chunk.channel(chunk.rows.begin + i)];
    }
  }

  void commit(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const ConvChunk chunk = chunk_of(run, sample, part);
    const int64_t rows = chunk.rows.end - chunk.rows.begin;
    if (rows == 0) return;
    const bool has_residual = spec_.inputs.size() > 1;
    const float* residual = has_residual ? run.row(spec_.inputs[1], sample, chunk.rows.begin) + chunk.positions.begin : nullptr;
    kernels_.epilogue({rows, chunk.positions.end - chunk.positions.begin, scratch, chunk.width, scratch + bias_offset(), residual,
                       has_residual ? spec_.inputs[1].row_stride : 0, run.row(spec_.output, sample, chunk.rows.begin) + chunk.positions.begin,
                       spec_.output.row_stride, activation_});
  }

  void skip(const RunView& run, int64_t sample, int64_t part) const override {
    if (spec_.inputs.size() < 2) return;
    const ConvChunk chunk = chunk_of(run, sample, part);
    const Rows& residual = spec_.inputs[1];
    for (int64_t row = chunk.rows.begin; row < chunk.rows.end; ++row) {
      kernels_.epilogue({1, chunk.positions.end - chunk.positions.begin, run.row(residual, sample, row) + chunk.positions.begin, 0, nullptr,
                         nullptr, 0, run.row(spec_.output, sample, row) + chunk.positions.begin, 0, activation_});
    }
  }

  bool hands_over() const override { return spec_.inputs.size() > 1; }

  void set_compensation(const float* compensation) override {
    compensation_ = compensation;
    if (compensation == nullptr || !by_means_) return;
    const ConvShape& shape = layout_->shape;
    bias_at_means_.assign(bias_, bias_ + shape.out_channels);
    for (int64_t o = 0; o < shape.out_channels; ++o) {
      double sum = 0.0;
      for (int64_t c = 0; c < shape.in_channels; ++c) {
        const float weight = weight_[o * shape.in_channels + c];
        sum += static_cast<double>(product_->kept(weight)) * product_->kept(compensation[c]);
      }
      bias_at_means_[o] += static_cast<float>(sum);
    }
  }
  std::vector<int64_t> compensation_sizes() const override {
    const ConvShape& shape = layout_->shape;
    return by_means_ ? std::vector<int64_t>{shape.in_channels} : std::vector<int64_t>{shape.out_channels, shape.in_channels};
  }

 private:
  // Of one panel row of a tile, beside packing it. Both in one pass cost less than one.
  static double rounding_cycles(const PatchMap& patches, const PositionTile& tile) {
    return (patches.packing == Packing::kShifted ? -1.0 : 1.5) * static_cast<double>(tile.packed_vectors());
  }

  ConvChunk chunk_of(const RunView& run, int64_t sample, int64_t part) const {
    const int64_t rows = std::min(run.num_active(spec_.out_site, sample, layout_->shape.out_channels), layout_->shape.out_channels);
    return layout_->chunks.at(part, rows, spec_.out_site < 0 ? nullptr : run.active(spec_.out_site, sample).index);
  }

  // Asks for what commit reads and writes, so that it comes while the chunk multiplies. Not where another thread may hold those lines:
  // then taking them over this early is slower.
  void ask_for_results(const RunView& run, int64_t sample, const ConvChunk& chunk) const {
    constexpr int64_t kLine = 16;
    for (int64_t row = chunk.rows.begin; row < chunk.rows.end; ++row) {
      const float* out = run.row(spec_.output, sample, row);
      const float* residual = spec_.inputs.size() > 1 ? run.row(spec_.inputs[1], sample, row) : out;
      for (int64_t p = chunk.positions.begin; p < chunk.positions.end; p += kLine) {
        __builtin_prefetch(out + p, 1, 2);
        __builtin_prefetch(residual + p, 0, 2);
      }
    }
  }

  // Of the scratch: the sums, the bias of each row, and what the product needs.
  int64_t bias_offset() const { return align(layout_->chunks.max_rows() * layout_->chunks.max_width()); }
  int64_t product_offset() const { return bias_offset() + align(layout_->chunks.max_rows()); }

  const KernelTable& kernels_;
  bool alone_;           // one thread runs the plan
  const float* weight_;  // [out_channels][group_inputs * taps]
  const float* bias_;
  ActivationSpec activation_;
  std::optional<ConvLayout> layout_;
  std::unique_ptr<ConvProduct> product_;
  bool by_means_ = false;                // what compensates inputs is their means rather than a matrix
  const float* compensation_ = nullptr;  // [in_channels] or [out_channels][in_channels]
  std::vector<float> bias_at_means_;     // what the layer gives when all inputs are at their means
};

}  // namespace

std::unique_ptr<Op> make_conv(StepSpec spec, const KernelTable& kernels, int num_threads) {
  const SpecReader reader(spec);
  const bool sparse = reader.integer("sparse", 0) != 0;
  reader.check(!sparse || reader.integer("winograd", 0) == 0, "'sparse' and 'winograd' exclude each other");
  reader.check(!sparse || reader.integer("bf16", 0) == 0, "'sparse' and 'bf16' exclude each other");
  const int64_t tile = sparse ? 0 : choose_winograd_tile(spec, read_conv_shape(spec), kernels);
  if (tile != 0) {
    return make_winograd(std::move(spec), kernels, num_threads, tile);
  }
  return std::make_unique<ConvOp>(std::move(spec), kernels, num_threads);
}

}  // namespace dynprune
