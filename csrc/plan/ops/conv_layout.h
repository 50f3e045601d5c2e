// What the products of a convolution have in common: how it is cut into chunks, and how patches and chosen columns come to a product.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "plan/op.h"
#include "plan/ops/conv_chunks.h"
#include "plan/ops/conv_tiling.h"

namespace dynprune {

// Patches of a tile: a row for each reduction index, `stride` apart.
struct Panel {
  const float* data;
  int64_t stride;
};

struct ConvLayout {
  const KernelTable& kernels;
  ConvShape shape;
  Rows x;
  PatchMap patches;
  ConvChunks chunks;

  int64_t columns() const { return shape.group_inputs() * shape.taps(); }

  // The patches of tile t for the reduction indices k, packed into `panel` unless the planes themselves will do.
  Panel pack(const float* planes, int64_t t, Range k, float* panel) const;

  // weight_offset[k] of reduction index k: channel within the group times taps, plus tap; `distance` from one to the next.
  void fill_offsets(const int32_t* index, int64_t first_channel, Range k, int64_t distance, int32_t* offsets) const;
};

}  // namespace dynprune
