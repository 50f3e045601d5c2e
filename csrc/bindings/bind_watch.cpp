// Reads what a model's parameters and modules are now; called once per inference, so without Python code in the loop.
#include <pybind11/pybind11.h>

#include <stdexcept>

namespace py = pybind11;

namespace dynprune {
namespace {

// Whether the values of the dicts `tables`, one after the other, are the very objects in `members`.
bool same_members(const py::tuple& tables, const py::tuple& members) {
  const Py_ssize_t count = PyTuple_GET_SIZE(members.ptr());
  Py_ssize_t i = 0;
  for (const py::handle table : tables) {
    if (!PyDict_Check(table.ptr())) throw py::type_error("tables must be dicts.");
    PyObject* value = nullptr;
    Py_ssize_t place = 0;
    while (PyDict_Next(table.ptr(), &place, nullptr, &value) != 0) {
      if (i == count || PyTuple_GET_ITEM(members.ptr(), i) != value) return false;
      ++i;
    }
  }
  return i == count;
}

// The sum of `tensor._version`, how often each was written in place. `version` is the attribute's descriptor; a built-in one is asked
// straight, which takes half the time of looking the attribute up in each tensor.
int64_t version_sum(const py::tuple& tensors, const py::object& version) {
  if (!PyObject_TypeCheck(version.ptr(), &PyGetSetDescr_Type)) throw py::type_error("version must be a built-in attribute.");
  const auto* descriptor = reinterpret_cast<PyGetSetDescrObject*>(version.ptr());
  const PyGetSetDef& access = *descriptor->d_getset;
  if (access.get == nullptr) throw py::type_error("version must be readable.");
  // After an inference the tensors are no longer in the cache, and each hangs on a chain of pointers: the heads are fetched ahead.
  constexpr Py_ssize_t kAhead = 8;
  const Py_ssize_t count = PyTuple_GET_SIZE(tensors.ptr());
  int64_t sum = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const tensor = PyTuple_GET_ITEM(tensors.ptr(), i);
    if (i + kAhead < count) __builtin_prefetch(PyTuple_GET_ITEM(tensors.ptr(), i + kAhead));
    if (!PyObject_TypeCheck(tensor, PyDescr_TYPE(descriptor))) throw py::type_error("tensors must have the attribute.");
    const auto value = py::reinterpret_steal<py::object>(access.get(tensor, access.closure));
    if (!value) throw py::error_already_set();
    sum += PyLong_AsLongLong(value.ptr());
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  }
  return sum;
}

bool unchanged(const py::tuple& tables, const py::tuple& members, const py::tuple& tensors, const py::object& version, int64_t sum) {
  return same_members(tables, members) && version_sum(tensors, version) == sum;
}

}  // namespace

void bind_watch(py::module_& m) {
  m.def("same_members", &same_members, py::arg("tables"), py::arg("members"));
  m.def("unchanged", &unchanged, py::arg("tables"), py::arg("members"), py::arg("tensors"), py::arg("version"), py::arg("sum"));
  m.def("version_sum", &version_sum, py::arg("tensors"), py::arg("version"));
}

}  // namespace dynprune
