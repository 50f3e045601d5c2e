#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "base/cpu_features.h"
#include "dispatch.h"

namespace py = pybind11;

namespace dynprune {

void bind_cpu(py::module_& m) {
  m.def("cpu_features", &cpu_features);
  m.def("available_isas", &available_isas);
  m.def("chosen_isa", &choose_isa);
  m.def(
      "kernel_info",
      [](const std::string& isa) {
        const KernelTable& kernels = kernels_for(isa);
        py::dict info;
        info["lanes"] = kernels.lanes;
        info["gemm_max_vectors"] = kernels.gemm_max_vectors;
        return info;
      },
      py::arg("isa"));
}

}  // namespace dynprune
