// Products of bfloat16: packed weight rows and a panel, both as items of 4 bytes, tile by tile as in gather_gemm-inl.h.
//
// Where the instruction set multiplies pairs of bfloat16, an item is a pair along the reduction: the panel's rows are woven by two, and
// so are the columns of the weights that follow each other in the list of those that run. Elsewhere an item is one value, rounded all
// the same, as f32; so every instruction set gives the same result up to the order of sums.
#pragma once

#include <cstdint>

#include "base/bf16.h"
#include "kernels.h"
#include "kernels/activation-inl.h"
#include "kernels/conv_pack-inl.h"
#include "kernels/gemm_tile-inl.h"

namespace dynprune {
namespace {

#if defined(__AVX512BF16__)

constexpr int kBf16PerItem = 2;

inline Vec load_items(const uint32_t* p) { return {_mm512_castsi512_ps(_mm512_loadu_si512(p))}; }
inline Vec broadcast_item(const uint32_t* p) { return {_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(*p)))}; }
inline Vec multiply_items(Vec w, Vec x, Vec sum) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_castps_si512(w.v), (__m512bh)_mm512_castps_si512(x.v))};
}

// Word 2 i of the result is word i, word 2 i + 1 is word 16 + i.
inline __m512i weave(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                         18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

inline void store_pairs(uint32_t* p, Vec low, Vec high) {
  _mm512_storeu_si512(p, weave((__m512i)_mm512_cvtne2ps_pbh(high.v, low.v)));
}

// Which words of two vectors of pairs make an item: of the first the one of a column, even or odd, and of the second likewise.
struct PairOrders {
  alignas(64) uint16_t word[2][2][32];
};
constexpr PairOrders make_pair_orders() {
  PairOrders orders{};
  for (int first = 0; first < 2; ++first) {
    for (int second = 0; second < 2; ++second) {
      for (int i = 0; i < 16; ++i) {
        orders.word[first][second][2 * i] = static_cast<uint16_t>(2 * i + first);
        orders.word[first][second][2 * i + 1] = static_cast<uint16_t>(32 + 2 * i + second);
      }
    }
  }
  return orders;
}
constexpr PairOrders kPairOrders = make_pair_orders();

void bf16_tiles(const Bf16TilesArgs& a) {
  const auto pair_of = [](const uint16_t* tile, uint32_t column) { return tile + column / 2 * (2 * kPackedRows); };
  for (int64_t t = 0; t < a.tiles; ++t) {
    const uint16_t* tile = a.weight + a.tile_index[t] * a.tile_stride;
    const uint16_t* next = a.weight + a.tile_index[t + 1 < a.tiles ? t + 1 : t] * a.tile_stride;
    uint32_t* items = a.items + t * a.item_stride;
    int64_t j = 0;
    for (; j + 1 < a.k; j += 2, items += kPackedRows) {
      const auto first = static_cast<uint32_t>(a.column[j]);
      const auto second = static_cast<uint32_t>(a.column[j + 1]);
      __builtin_prefetch(pair_of(next, first), 0, 2);
      __builtin_prefetch(pair_of(next, second), 0, 2);
      const __m512i order = _mm512_load_si512(kPairOrders.word[first % 2][second % 2]);
      const __m512i low = _mm512_loadu_si512(pair_of(tile, first));
      _mm512_storeu_si512(items, _mm512_permutex2var_epi16(low, order, _mm512_loadu_si512(pair_of(tile, second))));
    }
    if (j < a.k) {
      const auto last = static_cast<uint32_t>(a.column[j]);
      const __m512i order = _mm512_load_si512(kPairOrders.word[last % 2][0]);
      _mm512_storeu_si512(items, _mm512_permutex2var_epi16(_mm512_loadu_si512(pair_of(tile, last)), order, _mm512_setzero_si512()));
    }
  }
}

void bf16_panel(const Bf16PanelArgs& a) {
  uint32_t* panel = a.panel;
  for (int64_t k = 0; k < a.k; k += 2, panel += a.width) {
    const float* low = a.in + k * a.in_stride;
    for (int64_t p = 0; p < a.width; p += Vec::kLanes) {
      store_pairs(panel + p, load(low + p), k + 1 < a.k ? load(low + a.in_stride + p) : zero());
    }
  }
}

void bf16_pack_shifted(const Bf16PackShiftedArgs& a) {
  uint32_t* panel = a.panel;
  for (int64_t k = a.first_k; k < a.first_k + a.num_k; k += 2) {
    const int64_t tap = k % a.taps;
    const bool same_plane = tap + 1 < a.taps;
    const int64_t next_tap = same_plane ? tap + 1 : 0;
    const float* plane = a.planes + k / a.taps * a.plane_stride;
    const float* low = plane + a.shifts[tap];
    const float* high = (same_plane ? plane : plane + a.plane_stride) + a.shifts[next_tap];
    const uint32_t* low_masks = a.masks + tap * a.vectors;
    const uint32_t* high_masks = a.masks + next_tap * a.vectors;
    const bool single = k + 1 == a.first_k + a.num_k;
    for (int64_t v = 0; v < a.vectors; ++v, panel += Vec::kLanes) {
      const int64_t p = v * Vec::kLanes;
      const uint32_t high_mask = single ? 0u : high_masks[v];
      store_pairs(panel, low_masks[v] != 0 ? load_masked(low + p, low_masks[v]) : zero(),
                  high_mask != 0 ? load_masked(high + p, high_mask) : zero());
    }
  }
}

#else

constexpr int kBf16PerItem = 1;

inline Vec load_items(const uint32_t* p) { return load(reinterpret_cast<const float*>(p)); }
inline Vec broadcast_item(const uint32_t* p) { return set1(*reinterpret_cast<const float*>(p)); }
inline Vec multiply_items(Vec w, Vec x, Vec sum) { return fma(w, x, sum); }

void bf16_tiles(const Bf16TilesArgs& a) {
  for (int64_t t = 0; t < a.tiles; ++t) {
    const uint16_t* tile = a.weight + a.tile_index[t] * a.tile_stride;
    auto* items = reinterpret_cast<float*>(a.items + t * a.item_stride);
    for (int64_t j = 0; j < a.k; ++j, items += kPackedRows) {
      for (int64_t row = 0; row < kPackedRows; ++row) items[row] = float_of(tile[a.column[j] * kPackedRows + row]);
    }
  }
}

void bf16_panel(const Bf16PanelArgs& a) {
  for (int64_t k = 0; k < a.k; ++k) {
    const float* in = a.in + k * a.in_stride;
    auto* out = reinterpret_cast<float*>(a.panel + k * a.width);
    for (int64_t p = 0; p < a.width; ++p) out[p] = float_of(bf16_of(in[p]));
  }
}

void bf16_pack_shifted(const Bf16PackShiftedArgs& a) {
  auto* panel = reinterpret_cast<float*>(a.panel);
  const int64_t width = a.vectors * Vec::kLanes;
  pack_shifted({a.planes, a.plane_stride, a.taps, a.first_k, a.num_k, a.shifts, a.masks, panel, a.vectors});
  bf16_panel({a.num_k, width, panel, width, a.panel});
}

#endif

template <int MR, int NV, bool kFinish>
void bf16_tile(const Bf16GemmArgs& a, int64_t first) {
  const uint32_t* weight[MR];
  Vec sum[MR][NV];
  for (int i = 0; i < MR; ++i) weight[i] = a.weight + a.row_offset[first + i];
  // The last row of the next tile: the lines of those before it are this tile's, mostly.
  const uint32_t* next = a.weight + a.row_offset[first + 2 * MR <= a.m ? first + 2 * MR - 1 : a.m - 1];
  if (first + MR >= a.m && a.next != nullptr) next = a.next;
  float* out = a.out + first * a.out_stride;
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      if constexpr (kFinish) {
        sum[i][v] = set1(a.bias[first + i]);
      } else {
        sum[i][v] = a.accumulate ? load(out + i * a.out_stride + v * Vec::kLanes) : zero();
      }
    }
  }
  const uint32_t* panel = a.panel;
  for (int64_t j = 0; j < a.items; ++j, panel += a.panel_stride) {
    const int64_t offset = j * kPackedRows;
    __builtin_prefetch(next + offset, 0, 2);
    Vec x[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) x[v] = load_items(panel + v * Vec::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Vec w = broadcast_item(weight[i] + offset);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sum[i][v] = multiply_items(w, x[v], sum[i][v]);
    }
  }
  const Vec low = set1(a.low);
  const Vec high = set1(a.high);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      store(out + i * a.out_stride + v * Vec::kLanes, kFinish ? clamp(sum[i][v], low, high) : sum[i][v]);
    }
  }
}

template <int NV, bool kFinish>
void bf16_width(const Bf16GemmArgs& a, int64_t begin, int64_t end) {
  if constexpr (NV > 0) {
    if (a.width != NV * Vec::kLanes) return bf16_width<NV - 1, kFinish>(a, begin, end);
    in_tiles_of_rows<NV>(begin, end, [&a](int64_t first, auto rows) { bf16_tile<decltype(rows)::value, NV, kFinish>(a, first); });
  }
}

// The positions beside whole vectors of the rows [begin, end), which lie in one packed tile: rows in the lanes, two sums in turn, so
// that one does not wait for the other.
template <int kTail>
void bf16_tail(const Bf16GemmArgs& a, int64_t begin, int64_t end) {
  constexpr int kVectors = static_cast<int>(kPackedRows) / Vec::kLanes;
  const uint32_t* weight = a.weight + (a.row_offset[begin] - a.row_offset[begin] % kPackedRows);
  Vec sum[2][kVectors][kTail];
#pragma GCC unroll 2
  for (int s = 0; s < 2; ++s) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
      for (int p = 0; p < kTail; ++p) sum[s][v][p] = zero();
    }
  }
  const auto add_item = [&](int64_t j, Vec (&to)[kVectors][kTail]) {
    const uint32_t* x = a.panel + j * a.panel_stride + a.width;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const Vec w = load_items(weight + j * kPackedRows + v * Vec::kLanes);
#pragma GCC unroll 8
      for (int p = 0; p < kTail; ++p) to[v][p] = multiply_items(w, broadcast_item(x + p), to[v][p]);
    }
  };
  int64_t j = 0;
  for (; j + 1 < a.items; j += 2) {
    add_item(j, sum[0]);
    add_item(j + 1, sum[1]);
  }
  if (j < a.items) add_item(j, sum[0]);
  float rows[kTail][kPackedRows];
  for (int p = 0; p < kTail; ++p) {
    for (int v = 0; v < kVectors; ++v) store(rows[p] + v * Vec::kLanes, add(sum[0][v][p], sum[1][v][p]));
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t lane = a.row_offset[i] % kPackedRows;
    float* out = a.out + i * a.out_stride + a.width;
    for (int p = 0; p < kTail; ++p) out[p] = rows[p][lane] + (a.accumulate ? out[p] : 0.0f);
  }
}

template <int kTail>
void bf16_tails(const Bf16GemmArgs& a, int64_t begin, int64_t end) {
  if constexpr (kTail > 0) {
    if (a.tail != kTail) return bf16_tails<kTail - 1>(a, begin, end);
    for (int64_t i = begin, next; i < end; i = next) {
      const int32_t tile = a.row_offset[i] / static_cast<int32_t>(kPackedRows);
      for (next = i + 1; next < end && a.row_offset[next] / static_cast<int32_t>(kPackedRows) == tile;) ++next;
      bf16_tail<kTail>(a, i, next);
    }
  }
}

void bf16_gemm(const Bf16GemmArgs& a) {
  if (a.bias != nullptr) return bf16_width<kGemmMaxVectors, true>(a, 0, a.m);
  if (a.tail == 0) return bf16_width<kGemmMaxVectors, false>(a, 0, a.m);
  constexpr int64_t kBlockRows = 4 * kPackedRows;  // whose weights are still near when the tail reads them again
  for (int64_t begin = 0; begin < a.m; begin += kBlockRows) {
    const int64_t end = begin + kBlockRows < a.m ? begin + kBlockRows : a.m;
    bf16_width<kGemmMaxVectors, false>(a, begin, end);
    bf16_tails<kGemmMaxTail>(a, begin, end);
  }
}

}  // namespace
}  // namespace dynprune
