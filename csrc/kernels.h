// One signature per kernel, its maths and contract, and the table of function pointers that an instruction set fills.
// All sizes and strides count elements. No kernel reads or writes outside the ranges its arguments describe.
#pragma once

#include <cstdint>

#include "base/types.h"

namespace dynprune {

// A run of `length` patch elements: source index s + i * step (within one input plane) goes to lane target + i.
struct Segment {
  int32_t source;
  int32_t target;
  int32_t length;
};
// The segments of one kernel tap over one tile of positions; lanes that no segment covers are zero (padding).
struct TapSegments {
  int32_t first;
  int32_t last;
  bool zero_fill;
};

// panel[k][lane] = patch element; k = (row - first_row) * taps + tap runs over [first_k, first_k + num_k), rows are compact.
struct PackArgs {
  const float* planes;
  int64_t plane_stride;
  int64_t taps;
  int64_t first_k;
  int64_t num_k;
  const Segment* segments;
  const TapSegments* tap_segments;  // [taps]
  int64_t step;                     // the convolution's stride along x
  float* panel;
  int64_t width;  // lanes per panel row, a multiple of the vector length
};

// out[i][p] = (accumulate ? out[i][p] : 0) + sum_k weight[row_index[i] * weight_stride + weight_offset[k]] * panel[k][p]
struct GatherGemmArgs {
  int64_t m;
  int64_t k;
  int64_t width;  // lanes, a multiple of the vector length, at most gemm_max_vectors vectors
  const float* weight;
  int64_t weight_stride;
  const int32_t* row_index;      // [m]; nullptr: row i is first_row + i
  int64_t first_row;
  const int32_t* weight_offset;  // [k]
  const float* panel;            // [k][width]
  float* out;
  int64_t out_stride;
  bool accumulate;
};

// out[i][p] = act(in[i][p] + bias[i] + residual[i][p]) for p < n; bias and residual may be null; in == out is allowed.
struct EpilogueArgs {
  int64_t rows;
  int64_t n;
  const float* in;
  int64_t in_stride;
  const float* bias;
  const float* residual;
  int64_t residual_stride;
  float* out;
  int64_t out_stride;
  ActivationSpec activation;
};

// Matrix-vector by row: out[i] = bias[r] + sum_k weight[r * weight_stride + k] * x[k], r = row_index ? row_index[i] : first_row + i.
struct DotRowsArgs {
  int64_t rows;
  int64_t k;
  const float* weight;
  int64_t weight_stride;
  const int32_t* row_index;
  int64_t first_row;
  const float* x;
  const float* bias;  // indexed by r; may be null
  float* out;
};

// Matrix-vector by column: out[i] = bias[i] + sum_j x[j] * weight[c_j * weight_stride + i], c_j = column_index ? column_index[j] : j.
struct AxpyRowsArgs {
  int64_t n;
  int64_t columns;
  const float* weight;  // transposed: one row per input
  int64_t weight_stride;
  const int32_t* column_index;
  const float* x;
  const float* bias;  // [n]; may be null
  float* out;
};

// The kernels of one instruction set. Filled once in isa/<isa>.cpp; never null.
struct KernelTable {
  const char* isa;
  int lanes;
  int gemm_max_vectors;  // the widest tile of gather_gemm, in vectors
  void (*pack_patches)(const PackArgs&);
  void (*gather_gemm)(const GatherGemmArgs&);
  void (*epilogue)(const EpilogueArgs&);
  void (*dot_rows)(const DotRowsArgs&);
  void (*axpy_rows)(const AxpyRowsArgs&);
};

}  // namespace dynprune
