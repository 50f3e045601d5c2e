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
