// A weight rounded to bfloat16 and packed by tiles of kPackedRows rows, once when a plan is built.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/aligned_buffer.h"
#include "base/bf16.h"
#include "plan/ops/conv_tiling.h"

namespace dynprune {

class Bf16Weight {
 public:
  // `pairs`: [tile][pair of columns][kPackedRows] items, ready for the product of whole inputs; otherwise [tile][column][kPackedRows].
  Bf16Weight(const float* weight, int64_t rows, int64_t columns, int64_t groups, bool pairs)
      : groups_{rows / groups}, stride_((pairs ? (columns + 1) / 2 * 2 : columns) * kPackedRows), pairs_(pairs) {
    values_ = AlignedBuffer<uint16_t>(static_cast<size_t>(groups * groups_.tiles() * stride_));
    std::fill_n(values_.data(), values_.size(), uint16_t{0});
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = groups_.packed_row(r);
      uint16_t* tile = values_.data() + row / kPackedRows * stride_;
      for (int64_t c = 0; c < columns; ++c) tile[place(row % kPackedRows, c)] = bf16_of(weight[r * columns + c]);
    }
  }

  // Where the items of some rows of `index` (nullptr: each row is itself) begin: in the weight where it holds pairs, otherwise in what
  // `bf16_tiles` makes, `item_stride` apart, of the tiles written to `tile_index`; returns how many. A late reader's rows may be out of
  // order, with more changes of tile than the `max_tiles` that there are.
  int64_t place_rows(const int32_t* index, Range rows, int64_t item_stride, int64_t max_tiles, int32_t* row_offset, int32_t* tile_index) const {
    int64_t count = 0;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t row = groups_.packed_row(index != nullptr ? index[i] : i);
      const auto tile = static_cast<int32_t>(row / kPackedRows);
      if (count == 0 || (tile_index[count - 1] != tile && count < max_tiles)) tile_index[count++] = tile;
      const int64_t first = (count - 1) * item_stride + row % kPackedRows;
      row_offset[i - rows.begin] = static_cast<int32_t>(pairs_ ? first_item(row) : first);
    }
    return count;
  }

  // Where the pairs of a packed row begin.
  int64_t first_item(int64_t row) const { return row / kPackedRows * (stride_ / 2) + row % kPackedRows; }

  bool pairs() const { return pairs_; }
  int64_t tile_stride() const { return stride_; }  // in values
  const uint16_t* values() const { return values_.data(); }
  const uint32_t* items() const { return reinterpret_cast<const uint32_t*>(values_.data()); }

 private:
  int64_t place(int64_t lane, int64_t column) const {
    return pairs_ ? (column / 2 * kPackedRows + lane) * 2 + column % 2 : column * kPackedRows + lane;
  }

  PackedGroups groups_;
  int64_t stride_;
  bool pairs_;
  AlignedBuffer<uint16_t> values_;
};

}  // namespace dynprune
