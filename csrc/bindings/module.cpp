// The extension dynprune.runtime._C: names only; each bind_*.cpp says what they do.
#include <pybind11/pybind11.h>

namespace dynprune {
void bind_cpu(pybind11::module_& m);
void bind_plan(pybind11::module_& m);
void bind_run_step(pybind11::module_& m);
void bind_watch(pybind11::module_& m);
}  // namespace dynprune

PYBIND11_MODULE(_C, m) {
  dynprune::bind_cpu(m);
  dynprune::bind_plan(m);
  dynprune::bind_run_step(m);
  dynprune::bind_watch(m);
}
