#include "plan/ops/conv_tiling.h"

#include <algorithm>
#include <stdexcept>

#include "plan/ops/spec_reader.h"

namespace dynprune {

ConvShape read_conv_shape(const StepSpec& spec) {
  const SpecReader reader(spec);
  const auto in = reader.ints("in_size", 3);
  const auto out = reader.ints("out_size", 3);
  const auto kernel = reader.ints("kernel", 2);
  const auto stride = reader.ints("stride", 2, {1, 1});
  const auto padding = reader.ints("padding", 4, {0, 0, 0, 0});
  const auto dilation = reader.ints("dilation", 2, {1, 1});
  const auto groups = reader.ints("groups", 1, {1});
  const ConvShape shape{in[0],      in[1],      in[2],      out[0],     out[1],      out[2],      kernel[0], kernel[1], stride[0],
                        stride[1],  padding[0], padding[1], padding[2], padding[3],  dilation[0], dilation[1], groups[0]};
  for (const int64_t size : {in[0], in[1], in[2], out[0], out[1], out[2], kernel[0], kernel[1], stride[0], stride[1], dilation[0],
                             dilation[1], groups[0]}) {
    reader.check(size >= 1, "sizes, strides, dilations and groups must be >= 1");
  }
  reader.check(*std::min_element(padding.begin(), padding.end()) >= 0, "padding must be >= 0");
  reader.check(shape.in_channels % shape.groups == 0 && shape.out_channels % shape.groups == 0,
               "groups must divide the input and output channels");
  return shape;
}

std::vector<PositionTile> make_tiles(int64_t positions, int lanes, int max_vectors) {
  const int64_t vectors = (positions + lanes - 1) / lanes;
  const int64_t num_tiles = (vectors + max_vectors - 1) / max_vectors;
  std::vector<PositionTile> tiles;
  tiles.reserve(num_tiles);
  for (int64_t t = 0; t < num_tiles; ++t) {
    const Range range = part_of(vectors, t, num_tiles);
    const int64_t first = range.begin * lanes;
    tiles.push_back({first, std::min(positions, range.end * lanes) - first, range.end - range.begin});
  }
  return tiles;
}

PatchMap make_patch_map(const ConvShape& shape, const std::vector<PositionTile>& tiles, int lanes) {
  PatchMap map;
  map.taps.reserve(tiles.size() * shape.taps());
  for (const PositionTile& tile : tiles) {
    for (int64_t r = 0; r < shape.kernel_height; ++r) {
      for (int64_t s = 0; s < shape.kernel_width; ++s) {
        const auto first_segment = static_cast<int32_t>(map.segments.size());
        // Output columns whose input column x * stride + shift lies inside the plane.
        const int64_t shift = s * shape.dilation_x - shape.pad_left;
        const int64_t first_x = shift >= 0 ? 0 : (-shift + shape.stride_x - 1) / shape.stride_x;
        const int64_t last_x = shift >= shape.in_width ? 0 : std::min(shape.out_width, (shape.in_width - 1 - shift) / shape.stride_x + 1);
        int64_t covered = 0;
        const int64_t end = tile.first + tile.count;
        for (int64_t y = tile.first / shape.out_width; y * shape.out_width < end; ++y) {
          const int64_t in_y = y * shape.stride_y + r * shape.dilation_y - shape.pad_top;
          if (in_y < 0 || in_y >= shape.in_height) continue;
          const int64_t row = y * shape.out_width;
          const int64_t begin = std::max(row + first_x, tile.first);
          const int64_t stop = std::min(row + last_x, end);
          if (begin >= stop) continue;
          const int64_t source = in_y * shape.in_width + (begin - row) * shape.stride_x + shift;
          Segment* previous = map.segments.size() > static_cast<size_t>(first_segment) ? &map.segments.back() : nullptr;
          if (previous != nullptr && shape.stride_x == 1 && previous->source + previous->length == source &&
              previous->target + previous->length == begin - tile.first) {
            previous->length += static_cast<int32_t>(stop - begin);
          } else {
            map.segments.push_back({static_cast<int32_t>(source), static_cast<int32_t>(begin - tile.first),
                                    static_cast<int32_t>(stop - begin)});
          }
          covered += stop - begin;
        }
        map.taps.push_back({first_segment, static_cast<int32_t>(map.segments.size()), covered < tile.vectors * lanes});
      }
    }
  }
  return map;
}

ChunkGrid make_chunk_grid(const ConvShape& shape, int64_t tiles, int lanes, int num_threads) {
  // A chunk of about 3 million multiply-adds takes 50 us at 60 G multiply-adds a second; a chunk late by that much is bearable.
  constexpr int64_t kChunkMacs = 3'000'000;
  // Fewer rows than this and packing the patches again for each part of the rows costs more than the part saves.
  constexpr int64_t kMinRows = 32;
  // The results of a chunk lie in scratch until they are committed; this many floats stay in a second-level cache.
  constexpr int64_t kMaxResults = 48 * 1024;
  const int64_t macs = shape.out_channels * shape.group_inputs() * shape.taps() * shape.positions();
  int64_t wanted = std::max<int64_t>(1, macs / kChunkMacs);
  if (num_threads > 1 && macs > kChunkMacs / 4) wanted = std::max<int64_t>(wanted, 4 * num_threads);
  const int64_t by_results = (shape.out_channels * tiles * 4 * lanes + kMaxResults - 1) / kMaxResults;
  wanted = std::max(wanted, by_results);
  ChunkGrid grid{std::min(tiles, wanted), 1};
  const int64_t max_row_parts = std::max<int64_t>(1, shape.out_channels / kMinRows);
  grid.row_parts = std::min(max_row_parts, (wanted + grid.position_parts - 1) / grid.position_parts);
  return grid;
}

}  // namespace dynprune
