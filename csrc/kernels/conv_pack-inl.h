// Packs convolution patches of one tile of positions: panel[k][lane], k running over (active row, kernel tap).
//
// Where each tap's elements lie in a plane was worked out when the plan was built (`Segment`); here they are only copied.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dynprune {
namespace {

inline void copy_segment(const float* source, float* target, int64_t length) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= length; i += Vec::kLanes) store(target + i, load(source + i));
  if (i < length) {
    const int rest = static_cast<int>(length - i);
    store_partial(target + i, load_partial(source + i, rest), rest);
  }
}

inline void copy_segment_strided(const float* source, int64_t step, float* target, int64_t length) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if (step == 2) {  // every second lane of two vectors; the last element read is the last one wanted
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (; i < length; i += Vec::kLanes) {
      const int rest = length - i < Vec::kLanes ? static_cast<int>(length - i) : Vec::kLanes;
      const int elements = 2 * rest - 1;
      const Vec low = load_partial(source + 2 * i, elements < Vec::kLanes ? elements : Vec::kLanes);
      const Vec high = elements > Vec::kLanes ? load_partial(source + 2 * i + Vec::kLanes, elements - Vec::kLanes) : zero();
      store_partial(target + i, {_mm512_permutex2var_ps(low.v, even, high.v)}, rest);
    }
  }
#endif
  for (; i < length; ++i) target[i] = source[i * step];
}

inline void pack_patches(const PackArgs& a) {
  const float* plane = a.planes;
  int64_t tap = a.first_k % a.taps;
  plane += (a.first_k / a.taps) * a.plane_stride;
  float* panel = a.panel;
  for (int64_t k = 0; k < a.num_k; ++k, panel += a.width) {
    const TapSegments& segments = a.tap_segments[tap];
    if (segments.zero_fill) {
      for (int64_t lane = 0; lane < a.width; lane += Vec::kLanes) store(panel + lane, zero());
    }
    for (int32_t s = segments.first; s < segments.last; ++s) {
      const Segment& segment = a.segments[s];
      if (a.step == 1) {
        copy_segment(plane + segment.source, panel + segment.target, segment.length);
      } else {
        copy_segment_strided(plane + segment.source, a.step, panel + segment.target, segment.length);
      }
    }
    if (++tap == a.taps) {
      tap = 0;
      plane += a.plane_stride;
    }
  }
}

inline void pack_shifted(const PackShiftedArgs& a) {
  const float* plane = a.planes + (a.first_k / a.taps) * a.plane_stride;
  int64_t tap = a.first_k % a.taps;
  float* panel = a.panel;
  for (int64_t k = 0; k < a.num_k; ++k) {
    const float* source = plane + a.shifts[tap];
    const uint32_t* masks = a.masks + tap * a.vectors;
    for (int64_t v = 0; v < a.vectors; ++v, source += Vec::kLanes, panel += Vec::kLanes) {
      store(panel, masks[v] != 0 ? load_masked(source, mask_from_bits(masks[v])) : zero());
    }
    if (++tap == a.taps) {
      tap = 0;
      plane += a.plane_stride;
    }
  }
}

inline void pack_gathered(const PackGatheredArgs& a) {
  const float* plane = a.planes + (a.first_k / a.taps) * a.plane_stride;
  int64_t tap = a.first_k % a.taps;
  float* panel = a.panel;
  for (int64_t k = 0; k < a.num_k; ++k) {
    const PatchVector* patch = a.patch + tap * a.vectors * a.parts;
    for (int64_t v = 0; v < a.vectors; ++v, panel += Vec::kLanes) {
      Vec sum = zero();
      for (int64_t part = 0; part < a.parts; ++part, ++patch) {
        if (patch->lanes == 0) continue;
        sum = add(sum, gather_lanes(plane + patch->base, a.patterns + patch->pattern * Vec::kLanes, patch->lanes, patch->upper));
      }
      store(panel, sum);
    }
    if (++tap == a.taps) {
      tap = 0;
      plane += a.plane_stride;
    }
  }
}

}  // namespace
}  // namespace dynprune
