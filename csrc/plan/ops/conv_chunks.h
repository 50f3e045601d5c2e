// The chunks of a convolution: each some of its active rows by some tiles of its positions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "plan/op.h"
#include "plan/ops/conv_tiling.h"

namespace dynprune {

struct ConvChunk {
  Range tiles;
  Range positions;
  Range rows;            // among the active rows
  const int32_t* index;  // of all active rows; nullptr: row i is channel i
  int64_t all_rows;      // that are active
  int64_t width;         // lanes of its tiles

  int64_t channel(int64_t row) const { return index != nullptr ? index[row] : row; }
};

class ConvChunks {
 public:
  ConvChunks(const ConvShape& shape, std::vector<PositionTile> tiles, const ChunkGrid& grid, int lanes)
      : shape_(shape), tiles_(std::move(tiles)), grid_(grid), lanes_(lanes) {
    for (int64_t part = 0; part < grid_.position_parts; ++part) max_width_ = std::max(max_width_, width_of(tiles_of_part(part)));
  }

  int64_t count() const { return grid_.position_parts * grid_.row_parts; }
  int64_t max_rows() const { return (shape_.out_channels + grid_.row_parts - 1) / grid_.row_parts + 2 * kPackedRows; }
  int64_t max_width() const { return max_width_; }
  const PositionTile& tile(int64_t t) const { return tiles_[t]; }
  // Whether the chunk after one has the rows that follow, at the same positions.
  bool rows_first() const { return grid_.rows_first; }

  // `index`: of the `all_rows` active rows; nullptr: row i is channel i.
  ConvChunk at(int64_t part, int64_t all_rows, const int32_t* index) const {
    const Range tiles = tiles_of_part(grid_.position_part(part));
    const PositionTile& last = tiles_[tiles.end - 1];
    const Range positions{tiles_[tiles.begin].first, last.first + last.count};
    return {tiles, positions, rows_of_part(all_rows, grid_.row_part(part)), index, all_rows, width_of(tiles)};
  }

  // Where the rows of a chunk that belong to a group end.
  int64_t end_of_group(const ConvChunk& chunk, int64_t row, int64_t group) const {
    if (shape_.groups == 1) return chunk.rows.end;
    const int64_t first_of_next = (group + 1) * shape_.group_outputs();
    if (chunk.index == nullptr) return std::min(chunk.rows.end, first_of_next);
    const int32_t* found = std::lower_bound(chunk.index + row, chunk.index + chunk.rows.end, static_cast<int32_t>(first_of_next));
    return std::max<int64_t>(row + 1, found - chunk.index);  // a late reader's list may be out of order; always move on
  }

  // Which of the compact input rows belong to a group.
  Range inputs_of_group(const int32_t* index, int64_t count, int64_t group) const {
    const int64_t first = group * shape_.group_inputs();
    const int64_t end = first + shape_.group_inputs();
    if (index == nullptr) return {first, end};
    if (shape_.groups == 1) return {0, count};
    const int64_t begin = std::lower_bound(index, index + count, static_cast<int32_t>(first)) - index;
    const int64_t stop = std::lower_bound(index + begin, index + count, static_cast<int32_t>(end)) - index;
    return {begin, std::min(stop, begin + shape_.group_inputs())};
  }

 private:
  Range tiles_of_part(int64_t part) const { return part_of(static_cast<int64_t>(tiles_.size()), part, grid_.position_parts); }

  int64_t width_of(Range tiles) const {
    int64_t vectors = 0;
    for (int64_t t = tiles.begin; t < tiles.end; ++t) vectors += tiles_[t].packed_vectors();
    return vectors * lanes_;
  }

  // Few active rows make fewer parts, as each part packs its patches anew; the parts behind those are empty. Parts begin with a packed tile
  // of all rows, or a tile of a product's, where they can.
  Range rows_of_part(int64_t count, int64_t part) const {
    const int64_t parts = parts_of_some(count, shape_.out_channels, grid_.row_parts, grid_.least_row_parts);
    if (part >= parts) return {count, count};
    const int64_t tile = count == shape_.out_channels ? kPackedRows : kTileRows;
    if (count < parts * tile) return part_of(count, part, parts);
    const Range tiles = part_of(count / tile, part, parts);
    return {tiles.begin * tile, part + 1 == parts ? count : tiles.end * tile};
  }

  static constexpr int64_t kTileRows = 8;  // of most products

  ConvShape shape_;
  std::vector<PositionTile> tiles_;
  ChunkGrid grid_;
  int64_t lanes_;
  int64_t max_width_ = 0;
};

}  // namespace dynprune
