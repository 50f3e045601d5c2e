#include "base/cpu_features.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace dynprune {
namespace {

struct IsaGroup {
  const char* name;
  std::vector<const char*> needs;
  bool built;
};

const std::vector<IsaGroup>& isa_groups() {
  static const std::vector<IsaGroup> groups = {
      {"scalar", {}, true},
#if defined(DYNPRUNE_HAVE_AVX2)
      {"avx2", {"avx2", "fma", "f16c"}, true},
#else
      {"avx2", {"avx2", "fma", "f16c"}, false},
#endif
#if defined(DYNPRUNE_HAVE_AVX512)
      {"avx512", {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}, true},
#else
      {"avx512", {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}, false},
#endif
      {"avx512_bf16", {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl", "avx512bf16"},
#if defined(DYNPRUNE_HAVE_AVX512_BF16)
       true},
#else
       false},
#endif
  };
  return groups;
}

std::string missing_feature(const IsaGroup& group, const std::map<std::string, bool>& features) {
  for (const char* need : group.needs) {
    const auto found = features.find(need);
    if (found == features.end() || !found->second) return need;
  }
  return "";
}

}  // namespace

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> features;
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();  // asks the operating system too (xgetbv)
  features["avx2"] = __builtin_cpu_supports("avx2");
  features["fma"] = __builtin_cpu_supports("fma");
  features["f16c"] = __builtin_cpu_supports("avx2");  // no CPU has AVX2 without F16C, and older compilers cannot ask for it
  features["avx512f"] = __builtin_cpu_supports("avx512f");
  features["avx512cd"] = __builtin_cpu_supports("avx512cd");
  features["avx512bw"] = __builtin_cpu_supports("avx512bw");
  features["avx512dq"] = __builtin_cpu_supports("avx512dq");
  features["avx512vl"] = __builtin_cpu_supports("avx512vl");
  features["avx512vnni"] = __builtin_cpu_supports("avx512vnni");
  features["avx512bf16"] = __builtin_cpu_supports("avx512bf16");
#endif
  return features;
}

std::vector<std::string> available_isas() {
  const auto features = cpu_features();
  std::vector<std::string> result;
  for (const IsaGroup& group : isa_groups()) {
    if (group.built && missing_feature(group, features).empty()) result.push_back(group.name);
  }
  return result;
}

std::string choose_isa() {
  const std::vector<std::string> available = available_isas();
  const char* wanted = std::getenv("DYNPRUNE_MAX_ISA");
  if (wanted == nullptr || *wanted == '\0') return available.back();
  const auto& groups = isa_groups();
  const auto group = std::find_if(groups.begin(), groups.end(), [&](const IsaGroup& g) { return wanted == std::string(g.name); });
  if (group == groups.end()) {
    std::string names;
    for (const IsaGroup& g : groups) names += (names.empty() ? "" : ", ") + std::string(g.name);
    throw std::invalid_argument("DYNPRUNE_MAX_ISA='" + std::string(wanted) + "' is unknown; choose one of " + names + ".");
  }
  if (!group->built) {
    throw std::invalid_argument("DYNPRUNE_MAX_ISA='" + std::string(wanted) + "' was not built into this extension.");
  }
  const std::string missing = missing_feature(*group, cpu_features());
  if (!missing.empty()) {
    throw std::invalid_argument("DYNPRUNE_MAX_ISA='" + std::string(wanted) + "' needs " + missing +
                                ", which this CPU or its operating system lacks; the best here is " + available.back() + ".");
  }
  return wanted;
}

}  // namespace dynprune
