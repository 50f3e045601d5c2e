// Rows by vectors of a register tile: accumulators, one row of the panel and a broadcast weight fill the register file.
#pragma once

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

}  // namespace
}  // namespace dynprune
