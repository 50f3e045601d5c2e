// Reads the dict form of a plan (`Plan.to_spec()` of Python) and keeps the arrays it refers to alive.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "plan/plan.h"

namespace dynprune {

using FloatArray = pybind11::array_t<float, pybind11::array::c_style>;

// Holds Python objects for C++ code that may be destroyed on any thread, without the GIL. A thread that does not hold the GIL does not
// ask for it (it might never get it, see without_gil.h) but leaves the objects to the next `let_go`.
class KeptAlive {
 public:
  KeptAlive() = default;
  KeptAlive(const KeptAlive&) = delete;
  KeptAlive& operator=(const KeptAlive&) = delete;
  ~KeptAlive();
  void add(pybind11::object object) { objects_.push_back(std::move(object)); }
  void clear() { objects_.clear(); }
  // Lets go of what was left; needs the GIL.
  static void let_go();

 private:
  std::vector<pybind11::object> objects_;
};

Rows read_rows(const pybind11::handle& tuple);
// Throws std::invalid_argument (a Python ValueError) where a constant is not a C-contiguous f32 array.
StepSpec read_step(const pybind11::dict& step, KeptAlive& kept);
// Throws std::invalid_argument where what compensates a step has not the sizes that it takes.
void check_compensation(int64_t step, const FloatArray& compensation, const std::vector<int64_t>& sizes);

}  // namespace dynprune
