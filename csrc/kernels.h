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

// The same panel where the output plane is as wide as the input plane and the stride is 1: then a tap's element for position p is
// plane[p + shift[tap]], but for the lanes beyond the border, whose bit in masks[tap][vector] is 0. Item: float, or uint32_t for the
// panel of a product in bfloat16.
template <class Item>
struct PackShifted {
  const float* planes;  // at the tile's first position
  int64_t plane_stride;
  int64_t taps;
  int64_t first_k;
  int64_t num_k;
  const int32_t* shifts;   // [taps]
  const uint32_t* masks;   // [taps][vectors], lane i in bit i
  Item* panel;
  int64_t vectors;
};
using PackShiftedArgs = PackShifted<float>;
using Bf16PackShiftedArgs = PackShifted<uint32_t>;

// And for any stride, where the elements of a vector lie close together: one vector of one tap is the sum of `parts` of these. Lane i of
// a part is plane[base + pattern[i]], or 0 where bit i of `lanes` is 0. `upper` has the lanes whose pattern is 32 or more.
struct PatchVector {
  int32_t base;
  int32_t pattern;
  uint32_t lanes;
  uint32_t upper;
};
constexpr int64_t kPatternReach = 64;  // elements from `base` on that may be read
struct PackGatheredArgs {
  const float* planes;
  int64_t plane_stride;
  int64_t taps;
  int64_t first_k;
  int64_t num_k;
  const PatchVector* patch;  // [taps][vectors][parts]
  int64_t parts;
  const int32_t* patterns;   // [pattern][lanes of a vector], each below kPatternReach
  float* panel;
  int64_t vectors;
};

// Packed weights: those of this many output channels lie together, column by column, so that a tile of rows reads one stream of lines.
constexpr int64_t kPackedRows = 16;
// So many columns ahead a product with packed weights asks for their lines; so many more entries can be read behind its weight offsets.
constexpr int64_t kColumnsAhead = 12;

// out[i][p] = (accumulate ? out[i][p] : 0) + sum_k row_i[weight_offset[k]] * panel[k][p] for p < width + tail. Row r begins at weight +
// r * weight_stride, or, packed, at weight + r / kPackedRows * weight_stride + r % kPackedRows.
struct GatherGemmArgs {
  int64_t m;
  int64_t k;
  int64_t width;  // lanes, a multiple of the vector length, at most gemm_max_vectors vectors
  int64_t tail;   // further positions, at most gemm_max_tail, multiplied with rows in the lanes; 0 unless packed
  const float* weight;
  int64_t weight_stride;
  bool packed;
  const int32_t* row_index;      // [m]; nullptr: i
  int64_t row_shift;             // r of row i is row_index[i] + row_shift
  const int32_t* weight_offset;  // [k]; packed [k + kColumnsAhead], the last only to ask for
  const float* panel;            // row k at panel + k * panel_stride; all `width` lanes are read
  int64_t panel_stride;
  float* out;
  int64_t out_stride;
  bool accumulate;
  // What will be multiplied after this, so that its weights can be asked for: rows [next_row, next_row + next_rows) of the same list, which
  // may go on behind m, or none; their columns are weight_offset[next_k + k] for this product's k, all of which are there.
  int64_t next_row = 0;
  int64_t next_rows = 0;
  int64_t next_k = 0;
};

// out[i][p] = clamp(bias[i] + sum_k weight[r_i * weight_stride + weight_offset[k]] * panel[k][p], low, high), r_i as in GatherGemmArgs.
struct PointwiseArgs {
  int64_t m;
  int64_t k;
  int64_t width;  // lanes, a multiple of the vector length, at most gemm_max_vectors vectors
  const float* weight;
  int64_t weight_stride;
  const int32_t* row_index;
  int64_t first_row;
  const int32_t* weight_offset;
  const float* panel;
  int64_t panel_stride;
  const float* bias;
  float low, high;
  float* out;
  int64_t out_stride;
};

// Products in bfloat16: weights are stored in it, panels rounded to it (to nearest, ties to even), sums are f32. An item is the 4 bytes
// that a lane multiplies at a time: two values side by side where the instruction set multiplies bfloat16 (0 beside a last single one),
// otherwise one value as f32. Weights are packed, kPackedRows to a tile.
//
// items[t][j][row] = item j of `row` in tile tile_index[t], made of the columns column[0 .. k).
struct Bf16TilesArgs {
  int64_t tiles;
  int64_t k;
  const uint16_t* weight;  // [tile][column][kPackedRows]; where items are pairs, [tile][pair of columns][kPackedRows][2]
  int64_t tile_stride;     // a multiple of kPackedRows, of pairs an even one
  const int32_t* tile_index;
  const int32_t* column;
  uint32_t* items;
  int64_t item_stride;  // from one tile to the next
};

// panel[j][lane] = item j of in[0 .. k)[lane]
struct Bf16PanelArgs {
  int64_t k;
  int64_t width;  // lanes, a multiple of the vector length
  const float* in;
  int64_t in_stride;
  uint32_t* panel;  // [items of k][width]
};

// out[i][p] = (accumulate ? out[i][p] : 0) + sum_j weight[row_offset[i] + j * kPackedRows] * panel[j][p] for p < width + tail; with a
// bias, which goes with neither accumulate nor tail, clamp(bias[i] + sum_j ..., low, high).
struct Bf16GemmArgs {
  int64_t m;
  int64_t items;
  int64_t width;  // as in GatherGemmArgs
  int64_t tail;
  const uint32_t* weight;
  const int32_t* row_offset;  // [m]; its remainder by kPackedRows is the row in its tile
  const uint32_t* panel;
  int64_t panel_stride;
  float* out;
  int64_t out_stride;
  bool accumulate;
  const float* bias;
  float low, high;
  // The items of the row that will be multiplied after these, so that they can be asked for; null where that is not known.
  const uint32_t* next = nullptr;
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
// Weights are float or bfloat16 (uint16_t).
template <class Weight>
struct DotRows {
  int64_t rows;
  int64_t k;
  const Weight* weight;
  int64_t weight_stride;
  const int32_t* row_index;
  int64_t first_row;
  const float* x;
  const float* bias;  // indexed by r; may be null
  float* out;
};
using DotRowsArgs = DotRows<float>;
using Bf16DotRowsArgs = DotRows<uint16_t>;

// Rows of a sparse weight that share their columns: out rows out_row .. out_row + rows - 1; nonzero j (j < count) stands at
// column[first_column + j], its weight for row i at value[first_value + j * value_stride + i]. rows is 1 or kSparseMaxRows.
struct SparseRun {
  int32_t out_row;
  int32_t rows;
  int32_t count;
  int32_t value_stride;
  int64_t first_column;
  int64_t first_value;
};
constexpr int kSparseMaxRows = 4;

// out[r][p] = (accumulate ? out[r][p] : 0) + sum_j value[j] * panel[column[j]][p] for every row of every run.
struct SparseGemmArgs {
  const SparseRun* runs;
  int64_t num_runs;
  const int32_t* column;
  const float* value;
  int64_t width;       // lanes, a multiple of the vector length, at most gemm_max_vectors vectors
  const float* panel;  // all `width` lanes of the rows that the columns name are read
  int64_t panel_stride;
  float* out;
  int64_t out_stride;
  bool accumulate;
};

// Matrix-vector with a sparse weight: out[i] = bias[r] + sum_j value[j] * x[column[j]], j from row_start[r] to row_start[r + 1],
// r = row_index ? row_index[i] : first_row + i.
struct SparseDotArgs {
  int64_t rows;
  const int64_t* row_start;
  const int32_t* column;
  const float* value;
  const int32_t* row_index;
  int64_t first_row;
  const float* x;
  const float* bias;  // indexed by r; may be null
  float* out;
};

// Matrix-vector by column: out[i] = bias[i] + sum_j x[j] * weight[c_j * weight_stride + i], c_j = column_index ? column_index[j] : j.
template <class Weight>
struct AxpyRows {
  int64_t n;
  int64_t columns;
  const Weight* weight;  // transposed: one row per input
  int64_t weight_stride;
  const int32_t* column_index;
  const float* x;
  const float* bias;  // [n]; may be null
  float* out;
};
using AxpyRowsArgs = AxpyRows<float>;
using Bf16AxpyRowsArgs = AxpyRows<uint16_t>;

// A window that slides over one plane: output (oy, ox) sees the input elements (oy * stride_y - pad_top + r * dilation_y,
// ox * stride_x - pad_left + s * dilation_x); those outside the plane are padding.
struct Window {
  int64_t in_height, in_width;
  int64_t out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_y, stride_x;
  int64_t pad_top, pad_left;
  int64_t dilation_y, dilation_x;
};

// Input rows laid out for a window: one line per row, padding filled in, columns split by their remainder modulo stride_x, so that
// every tap is a contiguous load: tap s of output column x stands at line + tap_offset[s] + x.
struct WindowLines {
  const int32_t* tap_offset;  // [kernel_width] = (s * dilation_x % stride_x) * phase_width + s * dilation_x / stride_x
  int64_t phase_width;        // columns of one remainder: out_width rounded up to the lanes, plus the reach of the taps; whole vectors
  int64_t stride;             // floats of a line, stride_x * phase_width
};

// out[i][y][x] = clamp(bias[c] + sum_rs weight[c][r][s] * in[i](first_row + y, x; r, s), low, high) for num_rows rows of each of `rows`
// planes, c = row_index ? row_index[i] : first_channel + i.
struct DepthwiseArgs {
  const Window* window;
  const WindowLines* lines;
  int64_t rows;
  const float* planes;
  int64_t plane_stride;
  int64_t first_row;
  int64_t num_rows;
  const float* weight;  // [channels][kernel_height][kernel_width]
  const float* bias;    // [channels]
  const int32_t* row_index;
  int64_t first_channel;
  float low, high;
  const float* zeros;  // [in_width] zeros: an input row above or below the plane
  float* packed;       // lines->stride floats for each input row that num_rows output rows see
  float* out;          // [rows][num_rows][out_width], planes out_stride apart
  int64_t out_stride;
};

// out[i][x] = max of in(first_row + i, x; r, s), padding ignored, NaN handed on; or sum / (row_count[i] * column_count[x]).
struct PoolArgs {
  const Window* window;
  const WindowLines* lines;
  const float* plane;
  int64_t first_row;
  int64_t num_rows;
  const float* row_count;     // [num_rows]; nullptr: maximum
  const float* column_count;  // [out_width]
  float* packed;              // one line, then out_width rounded up to the lanes for each input row seen
  float* out;                 // [num_rows][out_width]
};

// out[i] = mean of in[i][0 .. n)
struct RowMeansArgs {
  int64_t rows;
  int64_t n;
  const float* in;
  int64_t in_stride;
  float* out;
};

// out[i][p] = clamp(in[i][p] * scale[r] + shift[r], low, high), r = row_index ? row_index[i] : first_row + i.
struct AffineArgs {
  int64_t rows;
  int64_t n;
  const float* in;
  int64_t in_stride;
  const float* scale;
  const float* shift;
  const int32_t* row_index;
  int64_t first_row;
  float low, high;
  float* out;
  int64_t out_stride;
};

enum class Binary : int32_t { kAdd, kSub, kMul, kDiv, kMax, kMin };

// out[i][p] = clamp(a[i][p] op b[r][p or 0], low, high), r as in AffineArgs; with `reverse` b op a. kMax and kMin hand on NaN.
struct BinaryArgs {
  Binary kind;
  bool reverse;
  int64_t rows;
  int64_t n;
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  bool b_scalar;  // one value per row of b
  const int32_t* row_index;
  int64_t first_row;
  float low, high;
  float* out;
  int64_t out_stride;
};

// Layer norm, rms norm or softmax along one axis of rows x n. "Columns": along the rows, one result per position; out_stride is a
// multiple of the lanes, at least n, and lanes from n to the next multiple are scratch. "Rows": along the positions of each row.
struct NormalizeArgs {
  int64_t rows;
  int64_t n;
  const float* in;
  int64_t in_stride;
  const float* weight;  // not softmax; of the axis; may be null
  const float* bias;    // layer norm only; of the axis; may be null
  float eps;            // not softmax
  float* out;
  int64_t out_stride;
};

// Norms along the rows: the statistics of positions 0..n-1 go to `mean` (0 where the norm takes none) and `factor`, and
// out = (in - mean) * factor * weight + bias. The kernels of statistics write these two alone, the other one reads them.
struct ColumnNormArgs {
  int64_t rows;
  int64_t n;
  const float* in;
  int64_t in_stride;
  float* mean;
  float* factor;
  const float* weight;  // of the rows; may be null
  const float* bias;    // of the rows; may be null
  float eps;
  float* out;
  int64_t out_stride;
};

// out[j][i] = in[i][j] for i < rows, j < columns.
struct TransposeArgs {
  int64_t rows;
  int64_t columns;
  const float* in;
  int64_t in_stride;
  float* out;
  int64_t out_stride;
};

// Winograd F(m x m, 3 x 3): m = `tile` outputs a side from t = m + 2 inputs; lanes are tiles (kernels/winograd-inl.h).
// A unit is 8 output columns of one tile row: 8 / m tiles, one after the other in the lanes.
struct WinogradUnit {
  int32_t line;     // where its input columns begin in a line
  int32_t out;      // where its outputs begin in a row of results
  int32_t columns;  // of the 8, how many the output plane has; 0 for a unit that only fills lanes
  int32_t rows;     // of the m, how many the output plane has
};
// Neighbouring units of one tile row: their input begins at (in_y, in_x), which may lie in the padding, and is `columns` wide.
struct WinogradBand {
  int32_t in_y, in_x;
  int32_t columns;
  int32_t line;  // where the columns stand in a line
};

// out[i * t + j][row][lane] = (B' d B)[i][j], d the t x t inputs of tile `lane` of plane `row`; outside the plane they are zero.
struct WinogradInputArgs {
  int64_t tile;
  int64_t rows;
  const float* planes;
  int64_t plane_stride;
  int64_t in_height, in_width;
  const WinogradBand* bands;
  int64_t num_bands;
  const WinogradUnit* units;  // [width * tile / 8, rounded up]
  int64_t width;              // lanes of a row, a multiple of the vector length
  float* lines;               // t lines of line_stride floats: what `bands` fill and `units` read
  int64_t line_stride;
  float* out;  // [t * t][rows][width]
  int64_t out_stride;
};

// out[e][i][lane] = sum_k weight[e][r_i][column k] * in[e][k][lane], r_i = row_index ? row_index[i] : first_row + i. Row r of product e
// stands at weight + e * weight_stride + r / kPackedRows * tile_stride + r % kPackedRows, its column k column_offset[k] on.
struct WinogradProductArgs {
  int64_t products;
  int64_t m;
  int64_t k;
  int64_t width;  // lanes, a multiple of the vector length, at most gemm_max_vectors vectors
  const float* weight;
  int64_t weight_stride;
  int64_t tile_stride;
  const int32_t* row_index;
  int64_t first_row;
  const int32_t* column_offset;  // [k + kColumnsAhead]: the input channel times kPackedRows; the last only to ask for
  const float* in;               // [k][width]
  int64_t in_stride;
  float* out;  // [m][width]
  int64_t out_stride;
};

// out[row][units[u].out + y * row_stride + x] = (A' m A)[y][x], m the t x t products of a tile: in[i * t + j][row][lane].
struct WinogradOutputArgs {
  int64_t tile;
  int64_t rows;
  const float* in;  // [t * t][rows][width]
  int64_t in_stride;
  const WinogradUnit* units;
  int64_t width;
  float* out;
  int64_t out_stride;
  int64_t row_stride;
};

// The kernels of one instruction set. Filled once in isa/<isa>.cpp; never null.
struct KernelTable {
  const char* isa;
  int lanes;
  int gemm_max_vectors;  // the widest tile of gather_gemm, in vectors
  int gemm_vectors;      // the tile with which it is fastest
  int gemm_max_tail;     // the most positions that it takes beside whole vectors
  int bf16_per_item;     // 2 where it multiplies bfloat16, or 1
  void (*pack_patches)(const PackArgs&);
  void (*pack_shifted)(const PackShiftedArgs&);
  void (*pack_gathered)(const PackGatheredArgs&);
  void (*gather_gemm)(const GatherGemmArgs&);
  void (*epilogue)(const EpilogueArgs&);
  void (*dot_rows)(const DotRowsArgs&);
  void (*axpy_rows)(const AxpyRowsArgs&);
  void (*bf16_tiles)(const Bf16TilesArgs&);
  void (*bf16_panel)(const Bf16PanelArgs&);
  void (*bf16_pack_shifted)(const Bf16PackShiftedArgs&);
  void (*bf16_gemm)(const Bf16GemmArgs&);
  void (*bf16_dot_rows)(const Bf16DotRowsArgs&);
  void (*bf16_axpy_rows)(const Bf16AxpyRowsArgs&);
  void (*sparse_gemm)(const SparseGemmArgs&);
  void (*sparse_dot)(const SparseDotArgs&);
  void (*depthwise)(const DepthwiseArgs&);
  void (*pointwise)(const PointwiseArgs&);
  void (*pool)(const PoolArgs&);
  void (*row_means)(const RowMeansArgs&);
  void (*affine)(const AffineArgs&);
  void (*binary)(const BinaryArgs&);
  void (*layer_norm_statistics)(const ColumnNormArgs&);
  void (*rms_norm_statistics)(const ColumnNormArgs&);
  void (*apply_column_norm)(const ColumnNormArgs&);
  void (*layer_norm_rows)(const NormalizeArgs&);
  void (*rms_norm_rows)(const NormalizeArgs&);
  void (*softmax_columns)(const NormalizeArgs&);
  void (*softmax_rows)(const NormalizeArgs&);
  void (*transpose)(const TransposeArgs&);
  void (*winograd_input)(const WinogradInputArgs&);
  void (*winograd_products)(const WinogradProductArgs&);
  void (*winograd_output)(const WinogradOutputArgs&);
};

// Defined where setup.py builds them.
const KernelTable& scalar_kernels();
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
const KernelTable& avx512_bf16_kernels();

}  // namespace dynprune
