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

// Positions [first, first + count) of the output plane, computed `vectors` vectors wide.
struct PositionTile {
  int64_t first;
  int64_t count;
  int64_t vectors;
};

// Cuts `positions` into tiles of at most `max_vectors` vectors whose widths differ by one vector at most.
std::vector<PositionTile> make_tiles(int64_t positions, int lanes, int max_vectors);

// The segments of every tap of every tile.
struct PatchMap {
  std::vector<Segment> segments;
  std::vector<TapSegments> taps;  // [tile][tap]
};
PatchMap make_patch_map(const ConvShape& shape, const std::vector<PositionTile>& tiles, int lanes);

// The chunks of one sample: `position_parts` x `row_parts`.
struct ChunkGrid {
  int64_t position_parts;
  int64_t row_parts;
};
ChunkGrid make_chunk_grid(const ConvShape& shape, int64_t tiles, int lanes, int num_threads);

}  // namespace dynprune
