// Register-tiled product of chosen weight rows and columns with a packed panel of patches.
//
//   out[i][p] = (accumulate ? out[i][p] : 0) + sum_k row_i[weight_offset[k]] * panel[k][p]
//
// Lanes are positions, a weight is broadcast, so a row or a column that is not in its list costs nothing. The tile is MR rows by NV
// vectors; its accumulators, one row of the panel and the broadcast fill the register file (AVX-512: 8x3; AVX2: 6x2).
// Positions that would fill only a few lanes of a vector (49 = 3 x 16 + 1) are multiplied the other way, with packed rows in the lanes.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "kernels/gemm_tile-inl.h"

namespace dynprune {
namespace {

inline int64_t row_of(const GatherGemmArgs& a, int64_t i) { return (a.row_index != nullptr ? int64_t{a.row_index[i]} : i) + a.row_shift; }

inline const float* row_begin(const GatherGemmArgs& a, int64_t i) {
  const int64_t row = row_of(a, i);
  return a.packed ? a.weight + row / kPackedRows * a.weight_stride + row % kPackedRows : a.weight + row * a.weight_stride;
}

// Of rows by themselves a line is asked for every so many columns: it holds twice as many, but half of them may not run.
constexpr int64_t kColumnsAsked = 8;

// The weights of the tile after the one at hand, which are asked of the memory while that is multiplied: the hardware foresees neither rows
// of a list nor columns with gaps.
struct TileAhead {
  int64_t row;   // the first
  int64_t last;  // the last that there is
  int64_t k;     // how much further in the list of columns
};

inline TileAhead tile_ahead(const GatherGemmArgs& a, int64_t first, int64_t rows) {
  if (first + rows < a.m) return {first + rows, a.m - 1, 0};
  if (a.next_rows > 0) return {a.next_row, a.next_row + a.next_rows - 1, a.next_k};
  return {first, a.m - 1, 0};
}

template <int MR, int NV, bool kPacked>
void gemm_tile(const GatherGemmArgs& a, int64_t first) {
  const float* weight[MR];
  const float* next[kPacked ? 1 : MR];
  Vec sum[MR][NV];
  for (int i = 0; i < MR; ++i) weight[i] = row_begin(a, first + i);
  const TileAhead ahead = tile_ahead(a, first, MR);
  for (int i = 0; i < (kPacked ? 1 : MR); ++i) {
    const int64_t row = ahead.row + (kPacked ? MR - 1 : i);  // the lines of packed rows before the last are those of this tile, mostly
    next[i] = row_begin(a, row < ahead.last ? row : ahead.last);
  }
  float* out = a.out + first * a.out_stride;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[i][v] = a.accumulate ? load(out + i * a.out_stride + v * Vec::kLanes) : zero();
  }
  const float* panel = a.panel;
  const int32_t* const end = a.weight_offset + a.k;
  for (const int32_t* column = a.weight_offset; column < end;) {
    // Packed rows: a line of each column, and the lines that this tile comes to soon, which only lie in the second level if columns have
    // gaps. Others: a line of each row, which holds the next columns.
    const int32_t* stop = column + 1;
    if constexpr (kPacked) {
      __builtin_prefetch(next[0] + column[ahead.k], 0, 2);
      __builtin_prefetch(weight[0] + column[kColumnsAhead], 0, 3);
      __builtin_prefetch(weight[MR - 1] + column[kColumnsAhead], 0, 3);
    } else {
      const int64_t offset = column[ahead.k];
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) __builtin_prefetch(next[i] + offset, 0, 2);
      stop = end - column < kColumnsAsked ? end : column + kColumnsAsked;
    }
    for (; column < stop; ++column, panel += a.panel_stride) {
      const int64_t offset = *column;
      Vec x[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) x[v] = load(panel + v * Vec::kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const Vec w = set1(weight[i][offset]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[i][v] = fma(w, x[v], sum[i][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(out + i * a.out_stride + v * Vec::kLanes, sum[i][v]);
  }
}

template <int NV, bool kPacked>
void gemm_rows(const GatherGemmArgs& a, int64_t begin, int64_t end) {
  in_tiles_of_rows<NV>(begin, end, [&a](int64_t first, auto rows) { gemm_tile<decltype(rows)::value, NV, kPacked>(a, first); });
}

template <int NV>
void gemm_width(const GatherGemmArgs& a, int64_t begin, int64_t end) {
  if constexpr (NV > 0) {
    if (a.width == NV * Vec::kLanes) {
      return a.packed ? gemm_rows<NV, true>(a, begin, end) : gemm_rows<NV, false>(a, begin, end);
    }
    gemm_width<NV - 1>(a, begin, end);
  }
}

// The rows [begin, end) of one packed tile.
struct TailRows {
  const float* weight;
  int64_t begin, end;
};

constexpr int kTailTiles = Vec::kRegisters / 8;  // so many tiles at once, so that sums do not wait for each other

template <int kTail, int kTiles>
void tail_tiles(const GatherGemmArgs& a, const TailRows* tiles) {
  constexpr int kVectors = static_cast<int>(kPackedRows) / Vec::kLanes;
  Vec sum[kTiles][kVectors][kTail];
#pragma GCC unroll 8
  for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
      for (int p = 0; p < kTail; ++p) sum[t][v][p] = zero();
    }
  }
  const float* panel = a.panel + a.width;
  for (int64_t k = 0; k < a.k; ++k, panel += a.panel_stride) {
    const int64_t offset = a.weight_offset[k];
    Vec x[kTail];
#pragma GCC unroll 8
    for (int p = 0; p < kTail; ++p) x[p] = set1(panel[p]);
#pragma GCC unroll 8
    for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const Vec w = load(tiles[t].weight + offset + v * Vec::kLanes);
#pragma GCC unroll 8
        for (int p = 0; p < kTail; ++p) sum[t][v][p] = fma(w, x[p], sum[t][v][p]);
      }
    }
  }
  for (int t = 0; t < kTiles; ++t) {
    float rows[kTail][kPackedRows];
    for (int p = 0; p < kTail; ++p) {
      for (int v = 0; v < kVectors; ++v) store(rows[p] + v * Vec::kLanes, sum[t][v][p]);
    }
    for (int64_t i = tiles[t].begin; i < tiles[t].end; ++i) {
      const int64_t lane = row_of(a, i) % kPackedRows;
      float* out = a.out + i * a.out_stride + a.width;
      for (int p = 0; p < kTail; ++p) out[p] = rows[p][lane] + (a.accumulate ? out[p] : 0.0f);
    }
  }
}

template <int kTail>
void tail_rows(const GatherGemmArgs& a, int64_t begin, int64_t end) {
  if constexpr (kTail > 0) {
    if (a.tail != kTail) return tail_rows<kTail - 1>(a, begin, end);
    TailRows tiles[kTailTiles];
    int count = 0;
    for (int64_t i = begin, next; i < end; i = next) {
      const int64_t tile = row_of(a, i) / kPackedRows;
      for (next = i + 1; next < end && row_of(a, next) / kPackedRows == tile;) ++next;
      tiles[count++] = {a.weight + tile * a.weight_stride, i, next};
      if (count == kTailTiles) {
        tail_tiles<kTail, kTailTiles>(a, tiles);
        count = 0;
      }
    }
    for (int t = 0; t < count; ++t) tail_tiles<kTail, 1>(a, tiles + t);
  }
}

void gather_gemm(const GatherGemmArgs& a) {
  if (a.tail == 0) return gemm_width<kGemmMaxVectors>(a, 0, a.m);
  constexpr int64_t kBlockRows = kTailTiles * kPackedRows;  // whose weights are still near when the tail reads them again
  for (int64_t begin = 0; begin < a.m; begin += kBlockRows) {
    const int64_t end = begin + kBlockRows < a.m ? begin + kBlockRows : a.m;
    gemm_width<kGemmMaxVectors>(a, begin, end);
    tail_rows<kGemmMaxTail>(a, begin, end);
  }
}

}  // namespace
}  // namespace dynprune
