// How a fused expand - depthwise - project is cut: bands of output rows, and for each band what it reads of the expanded planes.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "plan/ops/conv_tiling.h"

namespace dynprune {

// Output rows [first_row, first_row + num_rows). The expanded rows that they see are [first_in, first_in + window.in_height); `window`
// slides over those alone.
struct Band {
  int64_t first_row;
  int64_t num_rows;
  int64_t first_in;
  Window window;
};

// What fusing has to weigh. Channels that are not there (no expansion, no projection) are 0.
struct BottleneckSizes {
  int64_t in_channels;     // of the expansion
  int64_t inner_channels;  // of the depthwise convolution
  int64_t out_channels;    // of the projection
  Window window;           // of the depthwise convolution over the whole plane
  int speed;               // multiply-adds of the products at a time, in those of f32
};

std::vector<Band> make_bands(const Window& window, int64_t count);

// The number of bands that is expected to take least time on `num_threads` threads, or 0 where the three steps one by one take less.
int64_t choose_bands(const BottleneckSizes& sizes, const KernelTable& kernels, int num_threads);

}  // namespace dynprune
