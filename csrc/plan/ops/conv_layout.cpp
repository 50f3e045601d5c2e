#include "plan/ops/conv_layout.h"

#include <algorithm>

namespace dynprune {

Panel ConvLayout::pack(const float* planes, int64_t t, Range k, float* panel) const {
  const int64_t taps = shape.taps();
  const int64_t width = chunks.tile(t).packed_vectors() * kernels.lanes;
  switch (patches.packing) {
    case Packing::kDirect:
      return {planes + k.begin * x.row_stride + chunks.tile(t).first, x.row_stride};
    case Packing::kShifted:
      kernels.pack_shifted({planes + chunks.tile(t).first, x.row_stride, taps, k.begin, k.end - k.begin, patches.shifts.data(),
                            patches.masks.data() + patches.first_vector[t], panel, width / kernels.lanes});
      break;
    case Packing::kGathered:
      kernels.pack_gathered({planes, x.row_stride, taps, k.begin, k.end - k.begin, patches.vectors.data() + patches.first_vector[t],
                             patches.parts, patches.patterns.data(), panel, width / kernels.lanes});
      break;
    case Packing::kSegments:
      kernels.pack_patches({planes, x.row_stride, taps, k.begin, k.end - k.begin, patches.segments.data(), patches.taps.data() + t * taps,
                            shape.stride_x, panel, width});
      break;
  }
  return {panel, width};
}

void ConvLayout::fill_offsets(const int32_t* index, int64_t first_channel, Range k, int64_t distance, int32_t* offsets) const {
  const int64_t taps = shape.taps();
  const int64_t limit = shape.group_inputs() - 1;
  if (taps == 1) {
    const auto first = static_cast<int32_t>(first_channel);
    const auto last = static_cast<int32_t>(limit);
    for (int64_t i = k.begin; i < k.end; ++i) {
      *offsets++ = std::clamp<int32_t>(index[i] - first, 0, last) * static_cast<int32_t>(distance);
    }
    return;
  }
  int64_t row = k.begin / taps;
  int64_t tap = k.begin % taps;
  int64_t base = std::clamp<int64_t>(index[row] - first_channel, 0, limit) * taps;
  for (int64_t i = k.begin; i < k.end; ++i) {
    *offsets++ = static_cast<int32_t>((base + tap) * distance);
    if (++tap == taps && i + 1 < k.end) {
      tap = 0;
      base = std::clamp<int64_t>(index[++row] - first_channel, 0, limit) * taps;
    }
  }
}

}  // namespace dynprune
