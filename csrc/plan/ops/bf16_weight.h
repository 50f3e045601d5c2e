// A weight rounded to bfloat16 and packed by tiles of kPackedRows rows, once when a plan is built. Where an item is a pair of values, it
// lies ready for a product of all its columns; of columns in lists the kernel `bf16_tiles` makes the items first.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/aligned_buffer.h"
#include "base/bf16.h"
#include "plan/ops/conv_tiling.h"

namespace dynprune {

class Bf16Weight {
 public:
  // `per_item`: values in an item.
  Bf16Weight(const float* weight, int64_t rows, int64_t columns, int64_t groups, int per_item)
      : groups_{rows / groups}, columns_(columns), stride_((columns + per_item - 1) / per_item * per_item * kPackedRows), pairs_(per_item == 2) {
    values_ = AlignedBuffer<uint16_t>(static_cast<size_t>(groups * groups_.tiles() * stride_));
    std::fill_n(values_.data(), values_.size(), uint16_t{0});
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = groups_.packed_row(r);
      uint16_t* tile = values_.data() + row / kPackedRows * stride_;
      for (int64_t c = 0; c < columns; ++c) tile[place(row % kPackedRows, c)] = bf16_of(weight[r * columns + c]);
    }
  }

  // Whether the weight holds the items of `count` columns from `first` on.
  bool has_items(int64_t first, int64_t count) const {
    return pairs_ && first % 2 == 0 && (count % 2 == 0 || first + count == columns_);
  }

  // Where the items of some rows of `index` (nullptr: each row is itself) begin: `in_weight`, or in what `bf16_tiles` makes, `item_stride`
  // apart, of the tiles written to `tile_index`; returns how many. A late reader's rows may be out of order, with more changes of tile
  // than the `max_tiles` that there are.
  int64_t place_rows(const int32_t* index, Range rows, bool in_weight, int64_t item_stride, int64_t max_tiles, int32_t* row_offset,
                     int32_t* tile_index) const {
    int64_t count = 0;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t row = groups_.packed_row(index != nullptr ? index[i] : i);
      const auto tile = static_cast<int32_t>(row / kPackedRows);
      if (count == 0 || (tile_index[count - 1] != tile && count < max_tiles)) tile_index[count++] = tile;
      const int64_t first = (count - 1) * item_stride + row % kPackedRows;
      row_offset[i - rows.begin] = static_cast<int32_t>(in_weight ? first_item(row) : first);
    }
    return count;
  }

  // Where the pairs of a packed row begin.
  int64_t first_item(int64_t row) const { return row / kPackedRows * (stride_ / 2) + row % kPackedRows; }

  int64_t tile_stride() const { return stride_; }  // in values
  const uint16_t* values() const { return values_.data(); }
  // The pairs of the columns from `first`, an even one, on.
  const uint32_t* items(int64_t first) const { return reinterpret_cast<const uint32_t*>(values_.data()) + first / 2 * kPackedRows; }

 private:
  int64_t place(int64_t lane, int64_t column) const {
    return pairs_ ? (column / 2 * kPackedRows + lane) * 2 + column % 2 : column * kPackedRows + lane;
  }

  PackedGroups groups_;
  int64_t columns_, stride_;
  bool pairs_;
  AlignedBuffer<uint16_t> values_;
};

}  // namespace dynprune
