// How a convolution is cut up, worked out once per plan: tiles of positions, the patch segments of each tile, and the grid of chunks.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "plan/op.h"

namespace dynprune {

struct ConvShape {
  int64_t in_channels, in_height, in_width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_y, stride_x;
  int64_t pad_top, pad_left, pad_bottom, pad_right;
  int64_t dilation_y, dilation_x;
  int64_t groups;

  int64_t taps() const { return kernel_height * kernel_width; }
  int64_t positions() const { return out_height * out_width; }
  int64_t in_positions() const { return in_height * in_width; }
  int64_t group_inputs() const { return in_channels / groups; }
  int64_t group_outputs() const { return out_channels / groups; }
};

// Reads and checks the sizes of a conv, depthwise or pool step.
ConvShape read_conv_shape(const StepSpec& spec);

// Positions [first, first + count) of the output plane: `vectors` whole vectors, and beside them `tail` positions.
struct PositionTile {
  int64_t first;
  int64_t count;
  int64_t vectors;
  int64_t tail;

  int64_t packed_vectors() const { return vectors + (tail > 0 ? 1 : 0); }
};

// Cuts `positions` into tiles of at most `max_vectors` vectors whose widths differ by one vector at most. What a last vector would hold
// becomes the tail of the last tile where it is `max_tail` positions or less.
std::vector<PositionTile> make_tiles(int64_t positions, int lanes, int max_vectors, int max_tail);

// The tiles of a convolution run directly.
std::vector<PositionTile> make_conv_tiles(const ConvShape& shape, const KernelTable& kernels, int max_tail);

// How patches come to the product.
enum class Packing {
  kDirect,    // 1x1 over small planes: the planes themselves are the panel
  kShifted,   // output as wide as the input, stride 1: a tap is the plane moved by a constant, masked at the border
  kGathered,  // the elements of every vector lie in one or two places that a few permutations of registers reach
  kSegments,  // anything: runs of each image row, one by one
};

// Where the patches of every tap of every tile lie in a plane.
struct PatchMap {
  Packing packing = Packing::kSegments;
  std::vector<int32_t> shifts;        // kShifted: [tap]
  std::vector<uint32_t> masks;        // kShifted: [tile][tap][vector]
  std::vector<int64_t> first_vector;  // kShifted, kGathered: [tile] where its masks or vectors begin
  int64_t parts = 1;                  // kGathered: of a vector
  std::vector<PatchVector> vectors;   // kGathered: [tile][tap][vector][part]
  std::vector<int32_t> patterns;      // kGathered: [pattern][lane]
  std::vector<Segment> segments;      // kSegments
  std::vector<TapSegments> taps;      // kSegments: [tile][tap]
  double cycles_per_k = 0.0;          // estimated cost of one panel row of a tile, in cycles
};
PatchMap make_patch_map(const ConvShape& shape, const std::vector<PositionTile>& tiles, int lanes, const Rows& x);

// Packed rows of a weight: each group of `group_rows` rows begins a tile of kPackedRows of its own.
struct PackedGroups {
  int64_t group_rows;

  int64_t tiles() const { return (group_rows + kPackedRows - 1) / kPackedRows; }  // of one group
  int64_t padding() const { return tiles() * kPackedRows - group_rows; }          // of one group
  int64_t packed_row(int64_t row) const { return row + row / group_rows * padding(); }
};

// The chunks of one sample: `position_parts` x `row_parts`, those of one part of the rows or of one part of the positions in turn.
struct ChunkGrid {
  int64_t position_parts;
  int64_t row_parts;
  int64_t least_row_parts;  // that share the work evenly when few rows are active
  bool rows_first;          // the parts of the rows vary first

  int64_t position_part(int64_t part) const { return rows_first ? part / row_parts : part % position_parts; }
  int64_t row_part(int64_t part) const { return rows_first ? part % row_parts : part / position_parts; }
};
// `speed`: multiply-adds at a time, in those of f32.
ChunkGrid make_chunk_grid(const ConvShape& shape, const std::vector<PositionTile>& tiles, double pack_cycles_per_k, int num_threads,
                          int speed = 1);

}  // namespace dynprune
