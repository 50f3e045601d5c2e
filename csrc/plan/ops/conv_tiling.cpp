#include "plan/ops/conv_tiling.h"

#include <algorithm>
#include <map>
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

std::vector<PositionTile> make_tiles(int64_t positions, int lanes, int max_vectors, int max_tail) {
  const int64_t rest = positions % lanes;
  const bool has_tail = rest > 0 && rest <= max_tail && positions > lanes;
  const int64_t vectors = positions / lanes + (rest > 0 && !has_tail ? 1 : 0);
  const int64_t num_tiles = (vectors + max_vectors - 1) / max_vectors;
  std::vector<PositionTile> tiles;
  tiles.reserve(num_tiles);
  for (int64_t t = 0; t < num_tiles; ++t) {
    const Range range = part_of(vectors, t, num_tiles);
    const int64_t first = range.begin * lanes;
    tiles.push_back({first, std::min(positions, range.end * lanes) - first, range.end - range.begin, 0});
  }
  if (has_tail) {
    tiles.back().count += rest;
    tiles.back().tail = rest;
  }
  return tiles;
}

std::vector<PositionTile> make_conv_tiles(const ConvShape& shape, const KernelTable& kernels, int max_tail) {
  // Larger planes do not stay in a second-level cache: the more of a row is packed at a time, the better it comes from beyond.
  constexpr int64_t kNearPositions = 1024;
  const int vectors = shape.positions() <= kNearPositions ? kernels.gemm_vectors : kernels.gemm_max_vectors;
  return make_tiles(shape.positions(), kernels.lanes, vectors, max_tail);
}

namespace {

void add_segments(const ConvShape& shape, const std::vector<PositionTile>& tiles, int lanes, PatchMap& map) {
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
        map.taps.push_back({first_segment, static_cast<int32_t>(map.segments.size()), covered < tile.packed_vectors() * lanes});
      }
    }
  }
}

void add_shifts(const ConvShape& shape, const std::vector<PositionTile>& tiles, int lanes, PatchMap& map) {
  for (int64_t r = 0; r < shape.kernel_height; ++r) {
    for (int64_t s = 0; s < shape.kernel_width; ++s) {
      const int64_t shift = (r * shape.dilation_y - shape.pad_top) * shape.in_width + s * shape.dilation_x - shape.pad_left;
      map.shifts.push_back(static_cast<int32_t>(shift));
    }
  }
  for (const PositionTile& tile : tiles) {
    map.first_vector.push_back(static_cast<int64_t>(map.masks.size()));
    for (int64_t r = 0; r < shape.kernel_height; ++r) {
      for (int64_t s = 0; s < shape.kernel_width; ++s) {
        for (int64_t v = 0; v < tile.packed_vectors(); ++v) {
          uint32_t mask = 0;
          for (int64_t lane = 0; lane < lanes; ++lane) {
            const int64_t p = tile.first + v * lanes + lane;
            const int64_t y = p / shape.out_width + r * shape.dilation_y - shape.pad_top;
            const int64_t x = p % shape.out_width + s * shape.dilation_x - shape.pad_left;
            const bool inside = p < tile.first + tile.count && y >= 0 && y < shape.in_height && x >= 0 && x < shape.in_width;
            mask |= inside ? uint32_t{1} << lane : 0;
          }
          map.masks.push_back(mask);
        }
      }
    }
  }
}

// Fills the map for kGathered with vectors of `parts` parts; false where that is too few for some vector.
bool add_vectors(const ConvShape& shape, const std::vector<PositionTile>& tiles, int lanes, int64_t parts, PatchMap& map) {
  std::map<std::vector<int32_t>, int32_t> known;
  map.packing = Packing::kGathered;
  map.parts = parts;
  for (const PositionTile& tile : tiles) {
    map.first_vector.push_back(static_cast<int64_t>(map.vectors.size()));
    for (int64_t tap = 0; tap < shape.taps(); ++tap) {
      const int64_t shift_y = tap / shape.kernel_width * shape.dilation_y - shape.pad_top;
      const int64_t shift_x = tap % shape.kernel_width * shape.dilation_x - shape.pad_left;
      for (int64_t v = 0; v < tile.packed_vectors(); ++v) {
        int64_t lane = 0;
        for (int64_t part = 0; part < parts; ++part) {
          PatchVector vector{0, 0, 0, 0};
          std::vector<int32_t> pattern(lanes, 0);
          for (; lane < lanes; ++lane) {
            const int64_t p = tile.first + v * lanes + lane;
            const int64_t y = p / shape.out_width * shape.stride_y + shift_y;
            const int64_t x = p % shape.out_width * shape.stride_x + shift_x;
            if (p >= tile.first + tile.count || y < 0 || y >= shape.in_height || x < 0 || x >= shape.in_width) continue;
            const auto source = static_cast<int32_t>(y * shape.in_width + x);
            if (vector.lanes == 0) vector.base = source;  // sources ascend with the lanes
            if (source - vector.base >= kPatternReach) break;
            pattern[lane] = source - vector.base;
            vector.lanes |= uint32_t{1} << lane;
            if (pattern[lane] >= kPatternReach / 2) vector.upper |= uint32_t{1} << lane;
          }
          const auto [found, is_new] = known.emplace(pattern, static_cast<int32_t>(known.size()));
          if (is_new) map.patterns.insert(map.patterns.end(), pattern.begin(), pattern.end());
          vector.pattern = found->second;
          map.vectors.push_back(vector);
        }
        if (lane < lanes) return false;
      }
    }
  }
  return true;
}

}  // namespace

PatchMap make_patch_map(const ConvShape& shape, const std::vector<PositionTile>& tiles, int lanes, const Rows& x) {
  // Wider rows than this lie on a page each, and packing them once costs less than the translations of every pass.
  constexpr int64_t kMaxDirectPositions = 1024;
  // Lanes of a cache line: rows that begin elsewhere take two accesses for most loads, in every pass over them.
  constexpr int64_t kLine = 16;
  PatchMap map;
  const bool stride_1 = shape.stride_x == 1 && shape.stride_y == 1;
  const auto rows = static_cast<double>(shape.taps()) * static_cast<double>(tiles.size());
  if (shape.taps() == 1 && stride_1 && shape.in_positions() == shape.positions() && x.readable_past_end &&
      x.row_stride % kLine == 0 && x.offset % kLine == 0 && shape.positions() <= kMaxDirectPositions && shape.pad_top == 0 &&
      shape.pad_left == 0) {
    map.packing = Packing::kDirect;
    return map;
  }
  if (stride_1 && shape.in_width == shape.out_width && lanes <= 32) {
    map.packing = Packing::kShifted;
    add_shifts(shape, tiles, lanes, map);
    map.cycles_per_k = 2.5 * static_cast<double>(map.masks.size()) / rows;
    return map;
  }
  if (!stride_1 && x.readable_past_end && lanes <= 32) {
    for (int64_t parts = 1; parts <= 2; ++parts) {
      map = PatchMap();
      if (!add_vectors(shape, tiles, lanes, parts, map)) continue;
      map.cycles_per_k = 5.0 * static_cast<double>(map.vectors.size()) / rows;
      return map;
    }
    map = PatchMap();
  }
  add_segments(shape, tiles, lanes, map);
  map.cycles_per_k = 10.0 * static_cast<double>(map.segments.size()) / rows;
  return map;
}

namespace {

// Which order of the chunks reads less from beyond a second-level cache. Weights come in long streams that are asked for ahead, so each
// of their bytes counts half.
bool reads_less_rows_first(const ConvShape& shape, const ChunkGrid& grid) {
  constexpr double kNearFloats = 256 * 1024;
  const auto weights = static_cast<double>(shape.out_channels * shape.group_inputs() * shape.taps());
  const auto inputs = static_cast<double>(shape.in_channels * shape.in_positions());
  const auto row_parts = static_cast<double>(grid.row_parts);
  const auto position_parts = static_cast<double>(grid.position_parts);
  const double inputs_again = inputs > kNearFloats ? row_parts : 1;
  const double inputs_again_rows_first = inputs / position_parts > kNearFloats ? row_parts : 1;
  const double weights_again = weights / row_parts > kNearFloats ? position_parts : 1;
  const double weights_again_rows_first = weights > kNearFloats ? position_parts : 1;
  const double positions_first = inputs * inputs_again + weights / 2 * weights_again;
  const double rows_first = inputs * inputs_again_rows_first + weights / 2 * weights_again_rows_first;
  return rows_first < positions_first;
}

}  // namespace

ChunkGrid make_chunk_grid(const ConvShape& shape, const std::vector<PositionTile>& tiles, double pack_cycles_per_k, int num_threads,
                          int speed) {
  // A chunk of about 3 million multiply-adds takes 50 us at 60 G multiply-adds a second; a chunk late by that much is bearable. Large
  // steps bear more, and are packed fewer times.
  constexpr int64_t kMinChunkMacs = 3'000'000;
  constexpr int64_t kMaxChunkMacs = 8'000'000;
  // The results of a chunk lie in scratch until they are committed; this many vectors of 16 stay in a second-level cache.
  constexpr int64_t kMaxResultVectors = 2 * 1024;
  // Each part of the rows packs the patches again; that may take this share of its time, and rows come in tiles.
  constexpr double kPackShare = 0.03;
  constexpr double kMinRows = 24.0;
  const auto num_tiles = static_cast<int64_t>(tiles.size());
  const int64_t macs = shape.out_channels * shape.group_inputs() * shape.taps() * shape.positions() / speed;
  const int64_t kChunkMacs = std::clamp(macs / (16 * num_threads), kMinChunkMacs, kMaxChunkMacs);
  int64_t wanted = std::max<int64_t>(1, macs / kChunkMacs);
  const bool shared = num_threads > 1 && macs > kChunkMacs / 4;
  if (shared) wanted = std::max<int64_t>(wanted, 4 * num_threads);
  int64_t vectors = 0;
  for (const PositionTile& tile : tiles) vectors += tile.vectors;
  wanted = std::max(wanted, (shape.out_channels * vectors + kMaxResultVectors - 1) / kMaxResultVectors);
  ChunkGrid grid{std::min(num_tiles, wanted), 1, 1, false};
  const double pack_cycles = speed * pack_cycles_per_k * static_cast<double>(num_tiles) / static_cast<double>(vectors);
  const double rows_worth = std::max(kMinRows, pack_cycles / kPackShare);
  auto max_row_parts = static_cast<int64_t>(static_cast<double>(shape.out_channels) / rows_worth);
  if (shared) max_row_parts = std::max(max_row_parts, (2 * num_threads + grid.position_parts - 1) / grid.position_parts);
  max_row_parts = std::clamp<int64_t>(max_row_parts, 1, shape.out_channels);
  grid.row_parts = std::min(max_row_parts, (wanted + grid.position_parts - 1) / grid.position_parts);
  const int64_t shares = shared ? 4 * num_threads : 1;
  const int64_t least = pack_cycles > 0.0 ? (shares + grid.position_parts - 1) / grid.position_parts : grid.row_parts;
  grid.least_row_parts = std::min(grid.row_parts, least);
  grid.rows_first = reads_less_rows_first(shape, grid);
  return grid;
}

}  // namespace dynprune
