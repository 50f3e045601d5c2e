// AVX2 with FMA and F16C. Compiled with flags of its own: all but the last function is in an anonymous namespace.
#include "kernels.h"

#include "vec/vec_avx2.h"

#include "kernels/activation-inl.h"
#include "kernels/bf16-inl.h"
#include "kernels/conv_pack-inl.h"
#include "kernels/depthwise-inl.h"
#include "kernels/elementwise-inl.h"
#include "kernels/epilogue-inl.h"
#include "kernels/gather_gemm-inl.h"
#include "kernels/matvec-inl.h"
#include "kernels/normalize-inl.h"
#include "kernels/pointwise-inl.h"
#include "kernels/pool-inl.h"
#include "kernels/sparse-inl.h"
#include "kernels/transpose-inl.h"
#include "kernels/winograd-inl.h"

namespace dynprune {

const KernelTable& avx2_kernels() {
  static constexpr KernelTable table{
      "avx2",
      Vec::kLanes,
      kGemmMaxVectors,
      kGemmVectors,
      kGemmMaxTail,
      kBf16PerItem,
      pack_patches,
      pack_shifted,
      pack_gathered,
      gather_gemm,
      epilogue,
      dot_rows,
      axpy_rows,
      bf16_tiles,
      bf16_panel,
      bf16_pack_shifted,
      bf16_gemm,
      dot_rows,
      axpy_rows,
      sparse_gemm,
      sparse_dot,
      depthwise,
      pointwise,
      pool,
      row_means,
      affine,
      binary,
      layer_norm_statistics,
      rms_norm_statistics,
      apply_column_norm,
      layer_norm_rows,
      rms_norm_rows,
      softmax_columns,
      softmax_rows,
      transpose,
      winograd_input,
      winograd_products,
      winograd_output,
  };
  return table;
}

}  // namespace dynprune
