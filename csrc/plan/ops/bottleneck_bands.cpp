#include "plan/ops/bottleneck_bands.h"

#include <algorithm>

#include "plan/op.h"

namespace dynprune {
namespace {

// Cycles of one vector of 16 lanes, measured on AVX-512 cores: a multiply-add of a product, a tap and the rest of the depthwise
// convolution, and writing to or reading from memory that another core read or wrote last, or that left the second-level cache.
constexpr double kProductCycles = 0.62;
constexpr double kTapCycles = 0.6;
constexpr double kDepthwiseCycles = 4.0;
constexpr double kMoveCycles = 7.0;
constexpr double kNearMoveCycles = 3.0;  // the same where one thread finds it in its second-level cache
constexpr int64_t kNearFloats = 128 * 1024;
// The expanded band of all channels; beyond a second-level cache nothing is won by fusing.
constexpr int64_t kMaxBandFloats = 256 * 1024;
// A chunk late by this much is bearable; what a longer one takes beyond it weighs more.
constexpr double kMaxChunkCycles = 400e3;
constexpr double kLateWeight = 0.25;

double vectors(int64_t positions, int lanes) { return static_cast<double>((positions + lanes - 1) / lanes) * lanes / 16.0; }

double product_cycles(const BottleneckSizes& sizes, int64_t rows, int64_t columns, double vectors) {
  return kProductCycles / sizes.speed * static_cast<double>(rows * columns) * vectors;
}

double depthwise_cycles(const BottleneckSizes& sizes, int64_t rows, int lanes) {
  const auto taps = static_cast<double>(sizes.window.kernel_height * sizes.window.kernel_width);
  const double row_vectors = vectors(sizes.window.out_width, lanes);
  return static_cast<double>(sizes.inner_channels * rows) * row_vectors * (kTapCycles * taps + kDepthwiseCycles);
}

double band_cycles(const BottleneckSizes& sizes, const Band& band, int lanes) {
  const double in = vectors(band.window.in_height * sizes.window.in_width, lanes);
  const double out = vectors(band.num_rows * sizes.window.out_width, lanes);
  return product_cycles(sizes, sizes.inner_channels, sizes.in_channels, in) + depthwise_cycles(sizes, band.num_rows, lanes) +
         product_cycles(sizes, sizes.out_channels, sizes.inner_channels, out);
}

// A step of its own multiplies few positions beside whole vectors with rows in the lanes.
double vectors_apart(int64_t positions, const KernelTable& kernels) {
  const int64_t rest = positions % kernels.lanes;
  const bool tail = positions > kernels.lanes && rest <= kernels.gemm_max_tail;
  return tail ? static_cast<double>(positions) / 16.0 : vectors(positions, kernels.lanes);
}

double cycles_apart(const BottleneckSizes& sizes, const KernelTable& kernels, int num_threads) {
  const int lanes = kernels.lanes;
  const int64_t in_positions = sizes.window.in_height * sizes.window.in_width;
  const double in = vectors_apart(in_positions, kernels);
  const double out = vectors_apart(sizes.window.out_height * sizes.window.out_width, kernels);
  const double moved = (sizes.in_channels > 0 ? 2 * in : 0.0) + (sizes.out_channels > 0 ? 2 * out : 0.0);
  const bool near = num_threads == 1 && in_positions * sizes.inner_channels <= kNearFloats;
  const double products = product_cycles(sizes, sizes.inner_channels, sizes.in_channels, in) +
                          product_cycles(sizes, sizes.out_channels, sizes.inner_channels, out);
  return products + depthwise_cycles(sizes, sizes.window.out_height, lanes) +
         (near ? kNearMoveCycles : kMoveCycles) * moved * static_cast<double>(sizes.inner_channels);
}

}  // namespace

std::vector<Band> make_bands(const Window& window, int64_t count) {
  std::vector<Band> bands;
  for (int64_t b = 0; b < count; ++b) {
    const Range rows = part_of(window.out_height, b, count);
    const int64_t top = rows.begin * window.stride_y - window.pad_top;
    const int64_t bottom = (rows.end - 1) * window.stride_y - window.pad_top + (window.kernel_height - 1) * window.dilation_y;
    Band band{rows.begin, rows.end - rows.begin, std::clamp<int64_t>(top, 0, window.in_height - 1), window};
    band.window.in_height = std::clamp<int64_t>(bottom + 1, band.first_in + 1, window.in_height) - band.first_in;
    band.window.out_height = band.num_rows;
    band.window.pad_top = band.first_in - top;
    bands.push_back(band);
  }
  return bands;
}

int64_t choose_bands(const BottleneckSizes& sizes, const KernelTable& kernels, int num_threads) {
  const int lanes = kernels.lanes;
  const double apart = cycles_apart(sizes, kernels, num_threads) / num_threads;
  int64_t best = 0;
  double best_cycles = apart;
  for (int64_t count = 1; count <= sizes.window.out_height; ++count) {
    const std::vector<Band> bands = make_bands(sizes.window, count);
    double longest = 0.0;
    int64_t most_rows = 0;
    for (const Band& band : bands) {
      longest = std::max(longest, band_cycles(sizes, band, lanes));
      most_rows = std::max(most_rows, band.window.in_height);
    }
    if (most_rows * sizes.window.in_width * std::max<int64_t>(sizes.in_channels, 1) > kMaxBandFloats) continue;
    // Without a projection the channels are shared between threads too.
    const int64_t rounds = (count + num_threads - 1) / num_threads;
    const double share = sizes.out_channels > 0 ? static_cast<double>(rounds) : static_cast<double>(count) / num_threads;
    const double late = num_threads > 1 ? kLateWeight * std::max(0.0, longest - kMaxChunkCycles) : 0.0;
    const double cycles = longest * share + (sizes.out_channels > 0 ? late : 0.0);
    if (cycles < best_cycles) {
      best_cycles = cycles;
      best = count;
    }
  }
  return best;
}

}  // namespace dynprune
