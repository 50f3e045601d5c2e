// The product of the nonzeros of a weight alone.
#include "plan/ops/conv_product.h"
#include "plan/ops/sparse_weight.h"

namespace dynprune {
namespace {

class SparseProduct final : public ConvProduct {
 public:
  SparseProduct(const ConvLayout& layout, const float* weight, bool gated)
      : ConvProduct(layout), weight_(weight, layout.shape.out_channels, layout.shape.in_channels, layout.shape.taps()), gated_(gated) {}

  int64_t scratch_floats() const override {
    return panel_offset() + weight_.max_block() * layout_.kernels.gemm_max_vectors * layout_.kernels.lanes;
  }

  void multiply(const ConvTask& task) const override {
    const ConvChunk& chunk = task.chunk;
    const int64_t taps = layout_.shape.taps();
    const SparseWeight::Request request{chunk.rows, chunk.index, task.in_index, task.in_count};
    const float* planes = task.run.row(layout_.x, task.sample, 0);
    const int64_t blocks = weight_.blocks(task.in_count);
    weight_.prepare(request, task.scratch);
    for (int64_t block = 0; block < blocks; ++block) {
      const Range channels = part_of(task.in_count, block, blocks);
      SparseGemmArgs product = weight_.select(request, block, layout_.chunks.max_rows(), task.scratch);
      product.out_stride = chunk.width;
      product.out = task.sums;
      for (int64_t t = chunk.tiles.begin; t < chunk.tiles.end; ++t) {
        product.width = layout_.chunks.tile(t).vectors * layout_.kernels.lanes;
        const Panel patches = layout_.pack(planes, t, {channels.begin * taps, channels.end * taps}, task.scratch + panel_offset());
        product.panel = patches.data;
        product.panel_stride = patches.stride;
        layout_.kernels.sparse_gemm(product);
        product.out += product.width;
      }
    }
  }

 private:
  int64_t panel_offset() const { return align(weight_.scratch_floats(layout_.chunks.max_rows(), gated_)); }

  SparseWeight weight_;
  bool gated_;
};

}  // namespace

std::unique_ptr<ConvProduct> make_sparse_product(const ConvLayout& layout, const float* weight, bool gated) {
  return std::make_unique<SparseProduct>(layout, weight, gated);
}

}  // namespace dynprune
