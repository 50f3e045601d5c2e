// Winograd's minimal filtering F(m x m, 3 x 3), m = 2 or 4: a tile of m x m outputs from t x t inputs, t = m + 2, by t * t products.
//
//   out = A' [ (G g G') . (B' d B) ] A      (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015)
//
// Lanes are tiles, so a channel stays a row in the transformed domain and any lists of rows and columns can be multiplied.
// The points are 0, +-1, inf for m = 2 and 0, +-3/4, +-3/2, inf for m = 4. With 256 input channels of normal data the largest error,
// relative to the largest output, is then 6e-7 and 3e-6; the customary +-1, +-2 give 2e-5.
//
// A unit is 8 output columns of one tile row (8 / m tiles). Its input columns are transformed along y first, on plain rows of the
// plane; only the result is taken apart into tiles, so that nothing is gathered element by element.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "kernels/gather_gemm-inl.h"

namespace dynprune {
namespace {

inline Vec scaled_sub(Vec a, float scale, Vec b) { return fma(set1(-scale), b, a); }  // a - scale * b

template <int kTile>
struct Winograd;

template <>
struct Winograd<2> {
  static void input(const Vec (&d)[4], Vec (&v)[4]) {
    v[0] = sub(d[2], d[0]);
    v[1] = add(d[2], d[1]);
    v[2] = sub(d[2], d[1]);
    v[3] = sub(d[3], d[1]);
  }
  static void output(const Vec (&m)[4], Vec (&y)[2]) {
    y[0] = add(m[0], add(m[1], m[2]));
    y[1] = add(m[3], sub(m[1], m[2]));
  }
};

template <>
struct Winograd<4> {
  static constexpr float kA = 0.75f, kB = 1.5f;  // the points are +-kA and +-kB
  static constexpr float kAA = kA * kA, kBB = kB * kB;

  static void input(const Vec (&d)[6], Vec (&v)[6]) {
    const Vec even_a = scaled_sub(d[4], kBB, d[2]);
    const Vec odd_a = mul(set1(kA), scaled_sub(d[3], kBB, d[1]));
    const Vec even_b = scaled_sub(d[4], kAA, d[2]);
    const Vec odd_b = mul(set1(kB), scaled_sub(d[3], kAA, d[1]));
    v[0] = fma(set1(kAA * kBB), d[0], scaled_sub(d[4], kAA + kBB, d[2]));
    v[1] = add(even_a, odd_a);
    v[2] = sub(even_a, odd_a);
    v[3] = add(even_b, odd_b);
    v[4] = sub(even_b, odd_b);
    v[5] = fma(set1(kAA * kBB), d[1], scaled_sub(d[5], kAA + kBB, d[3]));
  }
  static void output(const Vec (&m)[6], Vec (&y)[4]) {
    const Vec sum_a = add(m[1], m[2]);
    const Vec difference_a = sub(m[1], m[2]);
    const Vec sum_b = add(m[3], m[4]);
    const Vec difference_b = sub(m[3], m[4]);
    y[0] = add(m[0], add(sum_a, sum_b));
    y[1] = fma(set1(kA), difference_a, mul(set1(kB), difference_b));
    y[2] = fma(set1(kAA), sum_a, mul(set1(kBB), sum_b));
    y[3] = fma(set1(kAA * kA), difference_a, fma(set1(kBB * kB), difference_b, m[5]));
  }
};

// Columns [column, column + lanes) of the units one after the other; column is a multiple of the lanes.
inline Vec load_columns(const float* line, const WinogradUnit* units, int64_t column) {
#if defined(__AVX512F__)
  const WinogradUnit* unit = units + column / 8;
  const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(line + unit[0].line));
  return {_mm512_mask_broadcast_f32x8(low, 0xFF00, _mm256_loadu_ps(line + unit[1].line))};
#else
  return load(line + units[column / 8].line + column % 8);
#endif
}

// Stores the same columns of output row y of their tile row, where the plane has them.
inline void store_columns(float* out, int64_t y, int64_t row_stride, const WinogradUnit* units, int64_t column, Vec value) {
  const WinogradUnit* unit = units + column / 8;
#if defined(__AVX512F__)
  const __m256 halves[2] = {_mm512_castps512_ps256(value.v), _mm512_extractf32x8_ps(value.v, 1)};
  for (int h = 0; h < 2; ++h) {
    if (y >= unit[h].rows) continue;
    float* target = out + unit[h].out + y * row_stride;
    if (unit[h].columns == 8) {
      _mm256_storeu_ps(target, halves[h]);
    } else {
      _mm256_mask_storeu_ps(target, static_cast<__mmask8>(first_lanes(unit[h].columns)), halves[h]);
    }
  }
#else
  const int64_t first = column % 8;
  if (y >= unit->rows || first >= unit->columns) return;
  float* target = out + unit->out + first + y * row_stride;
  if (unit->columns - first >= Vec::kLanes) {
    store(target, value);
  } else {
    store_partial(target, value, static_cast<int>(unit->columns - first));
  }
#endif
}

// a0 b0 a1 b1 ...: the first and the second half of a and b interleaved.
inline void interleave(Vec a, Vec b, Vec* low, Vec* high) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  low->v = _mm512_permutex2var_ps(a.v, first, b.v);
  high->v = _mm512_permutex2var_ps(a.v, second, b.v);
#elif defined(__AVX2__)
  const __m256 first = _mm256_unpacklo_ps(a.v, b.v);
  const __m256 second = _mm256_unpackhi_ps(a.v, b.v);
  low->v = _mm256_permute2f128_ps(first, second, 0x20);
  high->v = _mm256_permute2f128_ps(first, second, 0x31);
#else
  static_assert(Vec::kLanes == 1, "an instruction set with more than one lane needs an interleave of its own");
  *low = a;
  *high = b;
#endif
}

// d[j] = column j of each tile of one vector of tiles, j < t, from the transformed line that holds their columns.
template <int kTile>
inline void split_tiles(const float* line, const WinogradUnit* units, int64_t column, Vec (&d)[kTile + 2]) {
  if constexpr (kTile == 2) {
    for (int j = 0; j < 4; j += 2) {
      const Vec a = load_columns(line + j, units, column);
      const Vec b = load_columns(line + j, units, column + Vec::kLanes);
      d[j] = even_lanes(a, b);
      d[j + 1] = odd_lanes(a, b);
    }
  } else {
    for (int j = 0; j < 6; j += 4) {
      Vec c[4];
      for (int i = 0; i < 4; ++i) c[i] = load_columns(line + j, units, column + i * Vec::kLanes);
      const Vec even_low = even_lanes(c[0], c[1]), even_high = even_lanes(c[2], c[3]);
      const Vec odd_low = odd_lanes(c[0], c[1]), odd_high = odd_lanes(c[2], c[3]);
      d[j] = even_lanes(even_low, even_high);
      d[j + 1] = even_lanes(odd_low, odd_high);
      if (j == 0) {
        d[2] = odd_lanes(even_low, even_high);
        d[3] = odd_lanes(odd_low, odd_high);
      }
    }
  }
}

// Transforms along y: line i of the band = sum over r of B'[i][r] times input row in_y + r.
template <int kTile>
inline void transform_rows(const WinogradInputArgs& a, const float* plane, const WinogradBand& band) {
  constexpr int kSide = kTile + 2;
  const int64_t in_width = a.in_width, line_stride = a.line_stride;
  const int64_t top = -band.in_y, bottom = a.in_height - band.in_y;  // the rows [top, bottom) of the kSide are in the plane
  const bool all_rows = top <= 0 && bottom >= kSide;
  const float* source = plane + band.in_y * in_width + band.in_x;
  float* line = a.lines + band.line;
  for (int64_t column = 0; column < band.columns; column += Vec::kLanes, source += Vec::kLanes, line += Vec::kLanes) {
    const int64_t x = band.in_x + column;
    const Mask inside = lane_range(-x, in_width - x);
    Vec d[kSide], v[kSide];
    if (x + Vec::kLanes <= 0 || x >= in_width) {
      for (int i = 0; i < kSide; ++i) v[i] = zero();
    } else {
#pragma GCC unroll 6
      for (int r = 0; r < kSide; ++r) {
        d[r] = all_rows || (r >= top && r < bottom) ? load_masked(source + r * in_width, inside) : zero();
      }
      Winograd<kTile>::input(d, v);
    }
#pragma GCC unroll 6
    for (int i = 0; i < kSide; ++i) store(line + i * line_stride, v[i]);
  }
}

template <int kTile>
void winograd_input_tiles(const WinogradInputArgs& a) {
  constexpr int kSide = kTile + 2;
  for (int64_t row = 0; row < a.rows; ++row) {
    const float* plane = a.planes + row * a.plane_stride;
    for (int64_t b = 0; b < a.num_bands; ++b) transform_rows<kTile>(a, plane, a.bands[b]);
    float* out = a.out + row * a.width;
    for (int i = 0; i < kSide; ++i) {
      const float* line = a.lines + i * a.line_stride;
      for (int64_t lane = 0; lane < a.width; lane += Vec::kLanes) {
        Vec d[kSide], v[kSide];
        split_tiles<kTile>(line, a.units, lane * kTile, d);
        Winograd<kTile>::input(d, v);
#pragma GCC unroll 6
        for (int j = 0; j < kSide; ++j) store(out + (i * kSide + j) * a.out_stride + lane, v[j]);
      }
    }
  }
}

void winograd_input(const WinogradInputArgs& a) { a.tile == 2 ? winograd_input_tiles<2>(a) : winograd_input_tiles<4>(a); }

// out[i][lane] = sum_k weight[lane_of_row[i] + column_offset[k]] * in[k][lane] for kRows rows of one packed tile. Asks for the same
// columns of the tile that comes next, early enough for memory, and for its own soon to come: the hardware could not foresee gaps.
// Neighbours have constant distances, so that the weights are operands of the multiply-adds: 0.94 of peak with one vector, 0.69 without.
template <int kRows, int kVectors, bool kNeighbours>
void multiply_rows(const WinogradProductArgs& a, const float* weight, const int32_t* lane_of_row, const float* in, float* out,
                   const float* next) {
  constexpr int64_t kWidth = kVectors * Vec::kLanes;
  int64_t lanes[kRows];
  Vec sum[kRows][kVectors];
  if constexpr (kNeighbours) weight += lane_of_row[0];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    lanes[i] = kNeighbours ? i : lane_of_row[i];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[i][v] = zero();
  }
  for (int64_t k = 0; k < a.k; ++k, in += kWidth) {
    const int64_t offset = a.column_offset[k];
    const float* column = weight + offset;
    __builtin_prefetch(next + offset, 0, 2);
    __builtin_prefetch(weight + a.column_offset[k + kColumnsAhead], 0, 3);
    Vec x[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) x[v] = load(in + v * Vec::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec broadcast = set1(column[lanes[i]]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[i][v] = fma(broadcast, x[v], sum[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(out + i * kWidth + v * Vec::kLanes, sum[i][v]);
  }
}

// How many rows of a packed tile go at once: as many as the registers hold, in even parts of a tile.
template <int kVectors>
constexpr int max_product_rows() {
  constexpr int fit = (Vec::kRegisters - kVectors - 1) / kVectors;
  return fit >= kPackedRows ? kPackedRows : fit >= 8 ? 8 : fit >= 1 ? fit : 1;
}

template <int kRows, int kVectors>
void multiply_some(const WinogradProductArgs& a, int64_t rows, const float* weight, const int32_t* lane_of_row, const float* in, float* out,
                   const float* next) {
  if constexpr (kRows > 0) {
    if (rows != kRows) return multiply_some<kRows - 1, kVectors>(a, rows, weight, lane_of_row, in, out, next);
    if (lane_of_row[rows - 1] - lane_of_row[0] == rows - 1) {
      multiply_rows<kRows, kVectors, true>(a, weight, lane_of_row, in, out, next);
    } else {
      multiply_rows<kRows, kVectors, false>(a, weight, lane_of_row, in, out, next);
    }
  }
}

// Walks the rows packed tile by packed tile, so that each line of weights is touched once.
template <int kVectors>
void multiply_products(const WinogradProductArgs& a) {
  constexpr int64_t kMaxRows = max_product_rows<kVectors>();
  constexpr int64_t kWidth = kVectors * Vec::kLanes;
  const auto row_of = [&a](int64_t i) { return a.row_index != nullptr ? int64_t{a.row_index[i]} : a.first_row + i; };
  for (int64_t e = 0; e < a.products; ++e) {
    const float* weight = a.weight + e * a.weight_stride;
    const float* in = a.in + e * a.in_stride;
    float* out = a.out + e * a.out_stride;
    for (int64_t begin = 0, end; begin < a.m; begin = end) {
      const int64_t tile = row_of(begin) / kPackedRows;
      int32_t lane_of_row[kPackedRows] = {static_cast<int32_t>(row_of(begin) % kPackedRows)};
      for (end = begin + 1; end < a.m && end - begin < kPackedRows; ++end) {
        const int64_t row = row_of(end);
        if (row / kPackedRows != tile) break;
        lane_of_row[end - begin] = static_cast<int32_t>(row % kPackedRows);
      }
      const float* next = end < a.m ? weight + row_of(end) / kPackedRows * a.tile_stride
                                    : weight + (e + 1 < a.products ? a.weight_stride : 0) + row_of(0) / kPackedRows * a.tile_stride;
      const int64_t parts = (end - begin + kMaxRows - 1) / kMaxRows;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = (end - begin) * part / parts;
        const int64_t last = (end - begin) * (part + 1) / parts;
        multiply_some<kMaxRows, kVectors>(a, last - first, weight + tile * a.tile_stride, lane_of_row + first, in,
                                          out + (begin + first) * kWidth, next);
      }
    }
  }
}

template <int kVectors>
void multiply_width(const WinogradProductArgs& a) {
  if constexpr (kVectors > 0) {
    if (a.width == kVectors * Vec::kLanes) return multiply_products<kVectors>(a);
    multiply_width<kVectors - 1>(a);
  }
}

void winograd_products(const WinogradProductArgs& a) { multiply_width<kGemmMaxVectors>(a); }

template <int kTile>
void winograd_output_tiles(const WinogradOutputArgs& a) {
  constexpr int kSide = kTile + 2;
  for (int64_t row = 0; row < a.rows; ++row) {
    const float* in = a.in + row * a.width;
    float* out = a.out + row * a.out_stride;
    for (int64_t lane = 0; lane < a.width; lane += Vec::kLanes) {
      Vec half[kTile][kSide];
#pragma GCC unroll 6
      for (int j = 0; j < kSide; ++j) {
        Vec m[kSide], y[kTile];
#pragma GCC unroll 6
        for (int i = 0; i < kSide; ++i) m[i] = load(in + (i * kSide + j) * a.in_stride + lane);
        Winograd<kTile>::output(m, y);
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i) half[i][j] = y[i];
      }
#pragma GCC unroll 4
      for (int i = 0; i < kTile; ++i) {
        Vec y[kTile], columns[kTile];
        Winograd<kTile>::output(half[i], y);
        if constexpr (kTile == 2) {
          interleave(y[0], y[1], &columns[0], &columns[1]);
        } else {
          Vec even_low, even_high, odd_low, odd_high;
          interleave(y[0], y[2], &even_low, &even_high);
          interleave(y[1], y[3], &odd_low, &odd_high);
          interleave(even_low, odd_low, &columns[0], &columns[1]);
          interleave(even_high, odd_high, &columns[2], &columns[3]);
        }
#pragma GCC unroll 4
        for (int c = 0; c < kTile; ++c) store_columns(out, i, a.row_stride, a.units, lane * kTile + c * Vec::kLanes, columns[c]);
      }
    }
  }
}

void winograd_output(const WinogradOutputArgs& a) { a.tile == 2 ? winograd_output_tiles<2>(a) : winograd_output_tiles<4>(a); }

}  // namespace
}  // namespace dynprune
