// AVX-512 with products of bfloat16 (AVX512_BF16); everything else as in avx512.cpp.
#include "kernels.h"

#include "vec/vec_avx512.h"

#include "kernels/bf16-inl.h"

namespace dynprune {

const KernelTable& avx512_bf16_kernels() {
  static const KernelTable table = [] {
    KernelTable kernels = avx512_kernels();
    kernels.isa = "avx512_bf16";
    kernels.bf16_per_item = kBf16PerItem;
    kernels.bf16_tiles = bf16_tiles;
    kernels.bf16_panel = bf16_panel;
    kernels.bf16_pack_shifted = bf16_pack_shifted;
    kernels.bf16_gemm = bf16_gemm;
    return kernels;
  }();
  return table;
}

}  // namespace dynprune
