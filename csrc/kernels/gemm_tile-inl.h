// Rows by vectors of a register tile: accumulators, one row of the panel and a broadcast weight fill the register file.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dynprune {
namespace {

template <int NV>
constexpr int max_tile_rows() {
  constexpr int fit = (Vec::kRegisters - NV - 1) / NV;
  return fit < 1 ? 1 : fit > 8 ? 8 : fit;
}

// 8x3 reads 16 bytes of the panel a cycle where 6x4 reads 21: with two multiply-adds a cycle 155 against 145 GFLOP/s. Eight rows, not
// the nine that fit: nine would begin in one packed tile and end in the next, and read the lines of both (100 against 130 from memory).
#if defined(__AVX512F__)
constexpr int kGemmMaxVectors = 4;
constexpr int kGemmVectors = 3;
#elif defined(__AVX2__)
constexpr int kGemmMaxVectors = 2;
constexpr int kGemmVectors = 2;
#else
constexpr int kGemmMaxVectors = 8;
constexpr int kGemmVectors = 8;
#endif
// More positions than this in the last vector are cheaper as a vector.
constexpr int kGemmMaxTail = Vec::kLanes == 1 ? 0 : Vec::kLanes / 4 + 1;

template <int MR, class Tile>
void tile_of_rows(int64_t first, int64_t rows, const Tile& tile) {
  if constexpr (MR > 0) {
    if (rows == MR) return tile(first, std::integral_constant<int, MR>());
    tile_of_rows<MR - 1>(first, rows, tile);
  }
}

// Calls tile(first, count) for the rows [begin, end) in tiles of NV vectors, the last two even: a tile of one or two rows would wait for
// its few sums. `count` is an integral_constant.
template <int NV, class Tile>
void in_tiles_of_rows(int64_t begin, int64_t end, const Tile& tile) {
  constexpr int kRows = max_tile_rows<NV>();
  for (; end - begin >= 2 * kRows; begin += kRows) tile(begin, std::integral_constant<int, kRows>());
  const int64_t rest = end - begin;
  const int64_t first = rest <= kRows ? rest : rest == kRows + kRows / 2 ? kRows : (rest + 1) / 2;
  tile_of_rows<kRows>(begin, first, tile);
  tile_of_rows<kRows>(begin + first, rest - first, tile);
}

}  // namespace
}  // namespace dynprune
