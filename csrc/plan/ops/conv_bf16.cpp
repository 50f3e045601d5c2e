// The product in bfloat16: patches are rounded on their way to the panel, and of inputs in lists the weights of a block are woven first.
#include <numeric>
#include <vector>

#include "plan/ops/bf16_weight.h"
#include "plan/ops/conv_product.h"

namespace dynprune {
namespace {

// Length of a block of the reduction, and how much of it is packed as f32 at a time, to be rounded while it is in the first level.
constexpr int64_t kBlock = 512;
constexpr int64_t kStage = 64;

class Bf16Product final : public ConvProduct {
 public:
  Bf16Product(const ConvLayout& layout, const float* weight)
      : ConvProduct(layout),
        weight_(weight, layout.shape.out_channels, layout.columns(), layout.shape.groups, layout.kernels.bf16_per_item),
        columns_(layout.columns()) {
    std::iota(columns_.begin(), columns_.end(), 0);
  }

  int64_t scratch_floats() const override { return stage_offset() + kStage * max_width(); }
  bool takes_means() const override { return true; }
  float kept(float value) const override { return float_of(bf16_of(value)); }

  void multiply(const ConvTask& task) const override {
    in_groups(task, [&](Range rows, Range inputs, int64_t group) { multiply_group(task, rows, inputs, group); });
  }

 private:
  // Of the scratch: the offsets of columns, of rows and of tiles, the weights woven for a block, the panel, and what is not rounded yet.
  int64_t rows_offset() const { return align(kBlock); }
  int64_t items_offset() const { return rows_offset() + align(2 * layout_.chunks.max_rows()); }
  int64_t panel_offset() const { return items_offset() + max_tiles() * item_stride(); }
  int64_t stage_offset() const { return panel_offset() + kBlock * max_width(); }
  int64_t max_width() const { return (layout_.kernels.gemm_max_vectors + 1) * layout_.kernels.lanes; }
  int64_t max_tiles() const { return std::min(layout_.chunks.max_rows(), layout_.shape.groups * packed_groups().tiles()); }
  int64_t item_stride() const { return kBlock / layout_.kernels.bf16_per_item * kPackedRows; }

  void multiply_group(const ConvTask& task, Range rows, Range inputs, int64_t group) const {
    const KernelTable& kernels = layout_.kernels;
    const ConvChunk& chunk = task.chunk;
    const int64_t per_item = kernels.bf16_per_item;
    const int64_t reduction = (inputs.end - inputs.begin) * layout_.shape.taps();
    const int64_t blocks = std::max<int64_t>(1, (reduction + kBlock - 1) / kBlock);
    const float* planes = task.run.row(layout_.x, task.sample, inputs.begin);
    auto* row_offset = reinterpret_cast<int32_t*>(task.scratch + rows_offset());
    int32_t* tile_index = row_offset + layout_.chunks.max_rows();
    auto* items = reinterpret_cast<uint32_t*>(task.scratch + items_offset());
    auto* panel = reinterpret_cast<uint32_t*>(task.scratch + panel_offset());
    float* stage = task.scratch + stage_offset();
    Bf16GemmArgs product{};
    product.m = rows.end - rows.begin;
    product.row_offset = row_offset;
    product.panel = panel;
    product.out_stride = chunk.width;
    const bool in_weight = task.in_count == layout_.shape.in_channels && weight_.has_items(0, layout_.columns());
    const int64_t num_tiles = weight_.place_rows(chunk.index, rows, in_weight, item_stride(), max_tiles(), row_offset, tile_index);
    for (int64_t block = 0; block < blocks; ++block) {
      const Range pairs = part_of((reduction + 1) / 2, block, blocks);
      const Range k{2 * pairs.begin, std::min(2 * pairs.end, reduction)};
      product.items = (k.end - k.begin + per_item - 1) / per_item;
      product.accumulate = block > 0;
      product.out = task.sums + (rows.begin - chunk.rows.begin) * chunk.width;
      if (in_weight) {
        product.weight = weight_.items(k.begin);
      } else {
        const int32_t* columns = columns_.data() + k.begin;
        if (task.in_index != nullptr) {
          auto* offsets = reinterpret_cast<int32_t*>(task.scratch);
          layout_.fill_offsets(task.in_index + inputs.begin, group * layout_.shape.group_inputs(), k, 1, offsets);
          columns = offsets;
        }
        kernels.bf16_tiles({num_tiles, k.end - k.begin, weight_.values(), weight_.tile_stride(), tile_index, columns, items, item_stride()});
        product.weight = items;
      }
      for (int64_t t = chunk.tiles.begin; t < chunk.tiles.end; ++t) {
        const PositionTile& tile = layout_.chunks.tile(t);
        product.width = tile.vectors * kernels.lanes;
        product.tail = tile.tail;
        product.panel_stride = tile.packed_vectors() * kernels.lanes;
        pack(planes, t, k, panel, stage);
        if (t + 1 == chunk.tiles.end && in_weight) product.next = next_of(chunk, rows, 2 * pairs.end < reduction ? pairs.end : 0);
        kernels.bf16_gemm(product);
        product.out += product.panel_stride;
      }
      if (task.at_means == nullptr) continue;
      gather_means(task, k, stage);
      round_to_items(stage, k.end - k.begin, panel);
      Bf16GemmArgs one = product;
      as_one_position(one, task.at_means);
      kernels.bf16_gemm(one);
    }
  }

  // The weights of what is multiplied after a block of the reduction: the next one, or the next chunk. `next_pair` is 0 after the last.
  const uint32_t* next_of(const ConvChunk& chunk, Range rows, int64_t next_pair) const {
    const int64_t row = next_pair > 0 || !layout_.chunks.rows_first() ? rows.begin : rows.end;
    if (row >= chunk.all_rows) return nullptr;
    return weight_.items(2 * next_pair) + weight_.first_item(packed_groups().packed_row(chunk.channel(row)));
  }

  // items[j] = item j of a panel of one position.
  void round_to_items(const float* values, int64_t count, uint32_t* items) const {
    if (layout_.kernels.bf16_per_item == 1) {
      for (int64_t i = 0; i < count; ++i) reinterpret_cast<float*>(items)[i] = kept(values[i]);
      return;
    }
    for (int64_t i = 0; i < count; i += 2) {
      items[i / 2] = bf16_of(values[i]) | (i + 1 < count ? static_cast<uint32_t>(bf16_of(values[i + 1])) << 16 : 0u);
    }
  }

  // The patches of tile t in items of bfloat16; `stage` holds some of them as f32 on the way.
  void pack(const float* planes, int64_t t, Range k, uint32_t* panel, float* stage) const {
    const KernelTable& kernels = layout_.kernels;
    const PatchMap& patches = layout_.patches;
    const int64_t vectors = layout_.chunks.tile(t).packed_vectors();
    const int64_t width = vectors * kernels.lanes;
    if (patches.packing == Packing::kShifted) {
      kernels.bf16_pack_shifted({planes + layout_.chunks.tile(t).first, layout_.x.row_stride, layout_.shape.taps(), k.begin, k.end - k.begin,
                                 patches.shifts.data(), patches.masks.data() + patches.first_vector[t], panel, vectors});
      return;
    }
    for (int64_t first = k.begin; first < k.end; first += kStage) {
      const Range some{first, std::min(first + kStage, k.end)};
      const Panel rows = layout_.pack(planes, t, some, stage);
      kernels.bf16_panel({some.end - some.begin, width, rows.data, rows.stride, panel});
      panel += kStage / kernels.bf16_per_item * width;
    }
  }

  Bf16Weight weight_;
  std::vector<int32_t> columns_;  // of a whole input
};

}  // namespace

std::unique_ptr<ConvProduct> make_bf16_product(const ConvLayout& layout, const float* weight) {
  return std::make_unique<Bf16Product>(layout, weight);
}

}  // namespace dynprune
