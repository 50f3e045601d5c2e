#include "bindings/read_spec.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace dynprune {

namespace {

// What threads without the GIL could not let go. Never destroyed: such threads run until the process is gone.
struct Left {
  std::mutex mutex;
  std::vector<PyObject*> objects;
  std::atomic<bool> any{false};
};

Left& left() {
  static auto* const instance = new Left();
  return *instance;
}

bool holds_gil() { return PyGILState_GetThisThreadState() != nullptr && PyGILState_Check() != 0; }

}  // namespace

KeptAlive::~KeptAlive() {
  if (objects_.empty() || holds_gil()) return;
  const std::lock_guard<std::mutex> lock(left().mutex);
  for (py::object& object : objects_) left().objects.push_back(object.release().ptr());
  left().any.store(true, std::memory_order_release);
}

void KeptAlive::let_go() {
  if (!left().any.load(std::memory_order_acquire)) return;
  std::vector<PyObject*> objects;
  {
    const std::lock_guard<std::mutex> lock(left().mutex);
    objects.swap(left().objects);
    left().any.store(false, std::memory_order_release);
  }
  for (PyObject* object : objects) Py_DECREF(object);
}

Rows read_rows(const py::handle& handle) {
  const auto tuple = py::cast<py::tuple>(handle);
  if (tuple.size() != 5) {
    throw std::invalid_argument("an operand must be (buffer, offset, rows, row_stride, positions), got " +
                                std::to_string(tuple.size()) + " values.");
  }
  Rows rows;
  rows.buffer = tuple[0].cast<int32_t>();
  rows.offset = tuple[1].cast<int64_t>();
  rows.rows = tuple[2].cast<int64_t>();
  rows.row_stride = tuple[3].cast<int64_t>();
  rows.positions = tuple[4].cast<int64_t>();
  return rows;
}

StepSpec read_step(const py::dict& step, KeptAlive& kept) {
  StepSpec spec;
  spec.op = step["op"].cast<std::string>();
  spec.name = step.contains("name") ? step["name"].cast<std::string>() : spec.op;
  if (step.contains("inputs")) {
    for (const py::handle input : step["inputs"]) spec.inputs.push_back(read_rows(input));
  }
  if (step.contains("output") && !step["output"].is_none()) spec.output = read_rows(step["output"]);
  if (step.contains("ints")) spec.ints = step["ints"].cast<std::map<std::string, std::vector<int64_t>>>();
  if (step.contains("floats")) spec.floats = step["floats"].cast<std::map<std::string, std::vector<float>>>();
  if (step.contains("in_site")) spec.in_site = step["in_site"].cast<int32_t>();
  if (step.contains("out_site")) spec.out_site = step["out_site"].cast<int32_t>();
  if (step.contains("branches")) spec.branches = step["branches"].cast<std::vector<int32_t>>();
  if (step.contains("constants")) {
    for (const auto& item : step["constants"].cast<py::dict>()) {
      const auto name = item.first.cast<std::string>();
      if (!py::isinstance<FloatArray>(item.second)) {
        throw std::invalid_argument("step '" + spec.name + "': constant '" + name + "' must be a C-contiguous float32 array.");
      }
      const auto array = py::reinterpret_borrow<FloatArray>(item.second);
      Constant constant;
      constant.data = array.data();
      constant.sizes.assign(array.shape(), array.shape() + array.ndim());
      spec.constants[name] = constant;
      kept.add(array);
    }
  }
  return spec;
}

void check_compensation(int64_t step, const FloatArray& compensation, const std::vector<int64_t>& sizes) {
  if (!sizes.empty() && std::equal(sizes.begin(), sizes.end(), compensation.shape(), compensation.shape() + compensation.ndim())) return;
  std::string wanted = "(it takes none)";
  for (const int64_t size : sizes) wanted = (&size == sizes.data() ? "" : wanted + " x ") + std::to_string(size);
  throw std::invalid_argument("the compensation of step " + std::to_string(step) + " must have the step's sizes " + wanted + ".");
}

}  // namespace dynprune
