// The few types that every floor of the engine shares: rows of an activation, and lists of active rows.
#pragma once

#include <cstdint>

namespace dynprune {

// An operand inside a plan. Activations are planar: `rows` channels, each `positions` contiguous floats (pixels or tokens), row i
// of a sample at `buffer + offset + i * row_stride` (elements). A gated operand holds only its active rows, compact, in ascending
// order. row_stride 0 repeats one row; a Rows with positions 1 is one scalar per row (a squeeze-excite scale, a pooled mean).
struct Rows {
  int32_t buffer = -1;
  int64_t offset = 0;
  int64_t rows = 0;
  int64_t row_stride = 0;
  int64_t positions = 0;
  // Set by the plan: kReadPastEnd elements past the operand's end may be read (their values are not used).
  bool readable_past_end = false;
};

// The widest tile of positions is shorter than this, so that one more tile may be read where only its first positions count.
constexpr int64_t kReadPastEnd = 256;

// The rows of one sample that run, ascending. `inactive` has 1.0f for each row that does not run and 0.0f for the others, over all
// rows. Reading it late (see executor.h) may mix two runs' lists, so every index is always below the row count and count <= rows.
struct ActiveList {
  const int32_t* index = nullptr;
  int64_t count = 0;
  const float* inactive = nullptr;
};

enum class Activation : int32_t {
  kNone, kClamp, kHardSwish, kHardSigmoid, kSigmoid, kSilu, kGelu, kGeluTanh, kTanh, kLeakyRelu, kElu, kExp, kSoftplus, kMish,
  kSqrt, kRsqrt, kNeg, kAbs, kSquare, kReciprocal, kErf, kLog
};

// Activation with its parameters: kClamp uses low and high (ReLU is low 0, high +inf); kLeakyRelu uses low as slope; kElu low as alpha.
struct ActivationSpec {
  Activation kind = Activation::kNone;
  float low = 0.0f;
  float high = 0.0f;
};

}  // namespace dynprune
