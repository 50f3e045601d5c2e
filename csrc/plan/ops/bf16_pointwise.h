// The weight of a 1x1 convolution in bfloat16, and what a chunk needs of it for a product.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "plan/ops/bf16_weight.h"

namespace dynprune {

class Bf16Pointwise {
 public:
  // `max_columns`: of one product.
  Bf16Pointwise(const float* weight, int64_t outputs, int64_t inputs, int64_t max_columns, const KernelTable& kernels)
      : kernels_(kernels),
        weight_(weight, outputs, inputs, 1, kernels.bf16_per_item),
        num_tiles_(PackedGroups{outputs}.tiles()),
        max_rows_((outputs + kPackedRows - 1) / kPackedRows * kPackedRows),
        item_stride_(items_of(max_columns) * kPackedRows) {}

  int64_t scratch_floats() const { return 2 * max_rows_ + num_tiles_ * item_stride_; }

  int64_t items_of(int64_t columns) const { return (columns + kernels_.bf16_per_item - 1) / kernels_.bf16_per_item; }

  // The product of some rows of `index` (nullptr: each row is itself) and `count` columns, without panel and output. It points into
  // `scratch`, of `scratch_floats()`. `first`: the first of columns that follow each other; -1 for a list.
  Bf16GemmArgs select(const int32_t* index, Range rows, const int32_t* columns, int64_t count, int64_t first, float* scratch) const {
    auto* row_offset = reinterpret_cast<int32_t*>(scratch);
    int32_t* tile_index = row_offset + max_rows_;
    auto* items = reinterpret_cast<uint32_t*>(scratch + 2 * max_rows_);
    const bool in_weight = first >= 0 && weight_.has_items(first, count);
    const int64_t tiles = weight_.place_rows(index, rows, in_weight, item_stride_, num_tiles_, row_offset, tile_index);
    Bf16GemmArgs product{};
    product.m = rows.end - rows.begin;
    product.items = items_of(count);
    product.row_offset = row_offset;
    product.weight = in_weight ? weight_.items(first) : items;
    if (!in_weight) {
      kernels_.bf16_tiles({tiles, count, weight_.values(), weight_.tile_stride(), tile_index, columns, items, item_stride_});
    }
    return product;
  }

 private:
  const KernelTable& kernels_;
  Bf16Weight weight_;
  int64_t num_tiles_, max_rows_;
  int64_t item_stride_;  // of one tile to the next
};

}  // namespace dynprune
