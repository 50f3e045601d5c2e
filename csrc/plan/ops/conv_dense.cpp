// The product in f32: for each block of the reduction a tile's patches make a panel, which the chosen weight rows are multiplied with.
#include <vector>

#include "base/aligned_buffer.h"
#include "plan/ops/conv_product.h"

namespace dynprune {
namespace {

// Length of a block of the reduction: a panel of 384 x 64 floats fits a second-level cache several times.
constexpr int64_t kBlock = 384;

class DenseProduct final : public ConvProduct {
 public:
  DenseProduct(const ConvLayout& layout, const float* weight, bool packed) : ConvProduct(layout), weight_(weight) {
    if (packed) pack_weights();
    for (int64_t i = 0; i < layout.columns() + kColumnsAhead; ++i) {
      offsets_.push_back(static_cast<int32_t>(i));
      packed_offsets_.push_back(static_cast<int32_t>(i * kPackedRows));
    }
  }

  int64_t scratch_floats() const override {
    return panel_offset() + kBlock * (layout_.kernels.gemm_max_vectors + 1) * layout_.kernels.lanes;
  }

  bool takes_means() const override { return weights_.size() > 0; }

  void multiply(const ConvTask& task) const override {
    in_groups(task, [&](Range rows, Range inputs, int64_t group) { multiply_group(task, rows, inputs, group); });
  }

 private:
  int64_t panel_offset() const { return align(layout_.columns() + kColumnsAhead); }
  int64_t tile_stride() const { return layout_.columns() * kPackedRows; }

  void pack_weights() {
    const int64_t columns = layout_.columns();
    weights_ = AlignedBuffer<float>(layout_.shape.groups * packed_groups().tiles() * tile_stride());
    std::fill_n(weights_.data(), weights_.size(), 0.0f);
    for (int64_t channel = 0; channel < layout_.shape.out_channels; ++channel) {
      const int64_t row = packed_groups().packed_row(channel);
      float* packed = weights_.data() + row / kPackedRows * tile_stride() + row % kPackedRows;
      for (int64_t k = 0; k < columns; ++k) packed[k * kPackedRows] = weight_[channel * columns + k];
    }
  }

  // A line of packed weights holds 16 rows, active or not. With few of them active, rows by themselves are less to read.
  bool reads_packed(const ConvChunk& chunk) const { return weights_.size() > 0 && 2 * chunk.all_rows >= layout_.shape.out_channels; }

  void multiply_group(const ConvTask& task, Range rows, Range inputs, int64_t group) const {
    const KernelTable& kernels = layout_.kernels;
    const ConvShape& shape = layout_.shape;
    const ConvChunk& chunk = task.chunk;
    const int64_t reduction = (inputs.end - inputs.begin) * shape.taps();
    const int64_t blocks = std::max<int64_t>(1, (reduction + kBlock - 1) / kBlock);
    const float* planes = task.run.row(layout_.x, task.sample, inputs.begin);
    float* panel = task.scratch + panel_offset();
    const bool packed = reads_packed(chunk);
    const int32_t* weight_offset = (packed ? packed_offsets_ : offsets_).data();
    if (task.in_index != nullptr) {
      auto* offsets = reinterpret_cast<int32_t*>(task.scratch);
      layout_.fill_offsets(task.in_index + inputs.begin, group * shape.group_inputs(), {0, reduction}, packed ? kPackedRows : 1, offsets);
      std::fill_n(offsets + reduction, kColumnsAhead, 0);
      weight_offset = offsets;
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const Range k = part_of(reduction, block, blocks);
      GatherGemmArgs product{};
      product.m = rows.end - rows.begin;
      product.k = k.end - k.begin;
      product.weight = packed ? weights_.data() : weight_;
      product.weight_stride = packed ? tile_stride() : layout_.columns();
      product.packed = packed;
      product.row_index = chunk.index != nullptr ? chunk.index + rows.begin : nullptr;
      product.row_shift = (packed ? group * packed_groups().padding() : 0) + (chunk.index != nullptr ? 0 : rows.begin);
      product.weight_offset = weight_offset + k.begin;
      product.out = task.sums + (rows.begin - chunk.rows.begin) * chunk.width;
      product.out_stride = chunk.width;
      product.accumulate = block > 0;
      for (int64_t t = chunk.tiles.begin; t < chunk.tiles.end; ++t) {
        const PositionTile& tile = layout_.chunks.tile(t);
        const Panel patches = layout_.pack(planes, t, k, panel);
        product.panel = patches.data;
        product.panel_stride = patches.stride;
        product.width = tile.vectors * kernels.lanes;
        product.tail = packed ? tile.tail : 0;
        if (t + 1 == chunk.tiles.end) set_next(product, chunk, rows, k, reduction);
        int64_t rest = packed ? 0 : tile.packed_vectors() - tile.vectors;  // vectors still to come
        if (tile.packed_vectors() <= kernels.gemm_max_vectors) {
          product.width += rest * kernels.lanes;
          rest = 0;
        }
        kernels.gather_gemm(product);
        if (rest > 0) {
          product.panel += product.width;
          product.out += product.width;
          product.width = rest * kernels.lanes;
          kernels.gather_gemm(product);
          product.out -= tile.vectors * kernels.lanes;
        }
        product.out += tile.packed_vectors() * kernels.lanes;
      }
      if (task.at_means != nullptr) multiply_means(task, product, packed, k, panel);
    }
  }

  // The same rows and columns with the means of the inputs.
  void multiply_means(const ConvTask& task, GatherGemmArgs product, bool packed, Range k, float* panel) const {
    gather_means(task, k, panel);
    if (!packed) {
      auto* packed_offsets = reinterpret_cast<int32_t*>(panel + kBlock);
      layout_.fill_offsets(task.in_index, 0, k, kPackedRows, packed_offsets);
      std::fill_n(packed_offsets + (k.end - k.begin), kColumnsAhead, 0);
      product.weight_offset = packed_offsets;
    }
    product.weight = weights_.data();
    product.weight_stride = tile_stride();
    product.packed = true;
    product.panel = panel;
    product.next_rows = 0;
    as_one_position(product, task.at_means);
    layout_.kernels.gather_gemm(product);
  }

  // After a block k of the reduction comes the next one, after the last the next chunk, which has the rows after these or the same.
  void set_next(GatherGemmArgs& product, const ConvChunk& chunk, Range rows, Range k, int64_t reduction) const {
    const bool is_last = k.end == reduction;
    product.next_row = is_last && layout_.chunks.rows_first() ? product.m : 0;
    product.next_rows = is_last && layout_.chunks.rows_first() ? chunk.all_rows - rows.end : product.m;
    product.next_k = (is_last ? 0 : k.end) - k.begin;
  }

  const float* weight_;
  AlignedBuffer<float> weights_;         // [group][group_outputs / kPackedRows][columns][kPackedRows]
  std::vector<int32_t> offsets_;         // the weight offsets of a whole input
  std::vector<int32_t> packed_offsets_;  // and in packed weights
};

}  // namespace

std::unique_ptr<ConvProduct> make_dense_product(const ConvLayout& layout, const float* weight, bool packed) {
  return std::make_unique<DenseProduct>(layout, weight, packed);
}

}  // namespace dynprune
