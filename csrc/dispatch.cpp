#include "dispatch.h"

#include <algorithm>
#include <stdexcept>

#include "base/cpu_features.h"

namespace dynprune {

const KernelTable& kernels_for(const std::string& isa) {
  const auto available = available_isas();
  if (std::find(available.begin(), available.end(), isa) == available.end()) {
    std::string names;
    for (const std::string& name : available) names += (names.empty() ? "" : ", ") + name;
    throw std::invalid_argument("instruction set '" + isa + "' cannot run here; choose one of " + names + ".");
  }
#if defined(DYNPRUNE_HAVE_AVX512_BF16)
  if (isa == "avx512_bf16") return avx512_bf16_kernels();
#endif
#if defined(DYNPRUNE_HAVE_AVX512)
  if (isa == "avx512") return avx512_kernels();
#endif
#if defined(DYNPRUNE_HAVE_AVX2)
  if (isa == "avx2") return avx2_kernels();
#endif
  return scalar_kernels();
}

}  // namespace dynprune
