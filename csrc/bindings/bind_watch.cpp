// Reads what a model's parameters and modules are now; called once per inference, so without Python code in the loop.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace py = pybind11;

namespace dynprune {
namespace {

// After an inference nothing of this is in a cache any more, and all of it hangs on chains of pointers. So each link is fetched this many
// objects before it is followed, the next one half as many before.
constexpr Py_ssize_t kAhead = 64;
constexpr size_t kKeysBytes = 160;   // of a dict of a few entries
constexpr size_t kObjectBytes = 48;  // of a tensor's Python object
// Of what stands behind it, up to the pointer to its version counter, by the layout of torch 2.13. Where another release has something
// else there, that is fetched in vain.
constexpr size_t kCounterAt = 40;
constexpr size_t kBlockBytes = kCounterAt + sizeof(void*);
constexpr size_t kCounterBytes = 24;

// The lines that these bytes lie on.
inline void prefetch(const void* address, size_t bytes) {
  constexpr uintptr_t kLine = 64;
  const auto first = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t line = first / kLine * kLine; line < first + bytes; line += kLine) __builtin_prefetch(reinterpret_cast<const void*>(line));
}

void prefetch_table(const py::tuple& tables, Py_ssize_t i) {
  const Py_ssize_t count = PyTuple_GET_SIZE(tables.ptr());
  if (i + kAhead < count) prefetch(PyTuple_GET_ITEM(tables.ptr(), i + kAhead), sizeof(PyDictObject));
  if (i + kAhead / 2 < 0 || i + kAhead / 2 >= count) return;
  PyObject* const table = PyTuple_GET_ITEM(tables.ptr(), i + kAhead / 2);
  if (PyDict_Check(table)) prefetch(reinterpret_cast<PyDictObject*>(table)->ma_keys, kKeysBytes);
}

// Whether the values of the dicts `tables`, one after the other, are the very objects in `members`.
bool same_members(const py::tuple& tables, const py::tuple& members) {
  const Py_ssize_t num_tables = PyTuple_GET_SIZE(tables.ptr());
  const Py_ssize_t count = PyTuple_GET_SIZE(members.ptr());
  Py_ssize_t i = 0;
  for (Py_ssize_t t = -kAhead; t < 0; ++t) prefetch_table(tables, t);
  for (Py_ssize_t t = 0; t < num_tables; ++t) {
    PyObject* const table = PyTuple_GET_ITEM(tables.ptr(), t);
    if (!PyDict_Check(table)) throw py::type_error("tables must be dicts.");
    prefetch_table(tables, t);
    PyObject* value = nullptr;
    Py_ssize_t place = 0;
    while (PyDict_Next(table, &place, nullptr, &value) != 0) {
      if (i == count || PyTuple_GET_ITEM(members.ptr(), i) != value) return false;
      ++i;
    }
  }
  return i == count;
}

uint64_t read_uint64(const py::bytes& numbers, Py_ssize_t i) {
  uint64_t number = 0;
  if (i < static_cast<Py_ssize_t>(PyBytes_GET_SIZE(numbers.ptr()) / sizeof number)) {
    std::memcpy(&number, PyBytes_AS_STRING(numbers.ptr()) + i * sizeof number, sizeof number);
  }
  return number;
}

#if PY_VERSION_HEX < 0x030C0000
// A number that no dict had before, given to each state that one takes on. It lies beside the dict's type: one line to look at instead of
// all that lead to the values. Python since 3.12 keeps it for its own use.
uint64_t tag_of(PyObject* table) { return reinterpret_cast<PyDictObject*>(table)->ma_version_tag; }

py::bytes table_tags(const py::tuple& tables) {
  std::vector<uint64_t> tags;
  for (const py::handle table : tables) {
    if (!PyDict_Check(table.ptr())) throw py::type_error("tables must be dicts.");
    tags.push_back(tag_of(table.ptr()));
  }
  return {reinterpret_cast<const char*>(tags.data()), tags.size() * sizeof(uint64_t)};
}

// Whether the dicts are in the states that they were in when they had these tags; if not, they may still hold the same.
bool same_tags(const py::tuple& tables, const py::bytes& tags) {
  const Py_ssize_t count = PyTuple_GET_SIZE(tables.ptr());
  if (PyBytes_GET_SIZE(tags.ptr()) != count * static_cast<Py_ssize_t>(sizeof(uint64_t))) return false;
  for (Py_ssize_t i = -kAhead; i < count; ++i) {
    if (i + kAhead < count) __builtin_prefetch(&reinterpret_cast<PyDictObject*>(PyTuple_GET_ITEM(tables.ptr(), i + kAhead))->ma_version_tag);
    if (i >= 0 && (!PyDict_Check(PyTuple_GET_ITEM(tables.ptr(), i)) || tag_of(PyTuple_GET_ITEM(tables.ptr(), i)) != read_uint64(tags, i))) {
      return false;
    }
  }
  return true;
}
#else
py::bytes table_tags(const py::tuple&) { return {}; }
bool same_tags(const py::tuple&, const py::bytes&) { return false; }
#endif

const char* block_of(const py::bytes& blocks, Py_ssize_t i) {
  return reinterpret_cast<const char*>(read_uint64(blocks, i));
}

// The sum of `tensor._version`, how often each was written in place. `version` is the attribute's descriptor; a built-in one is asked
// straight, which takes half the time of looking the attribute up in each tensor. `blocks` may hold the addresses (uint64) of what stands
// behind the tensors' Python objects, only to fetch it ahead.
int64_t version_sum(const py::tuple& tensors, const py::object& version, const py::bytes& blocks) {
  if (!PyObject_TypeCheck(version.ptr(), &PyGetSetDescr_Type)) throw py::type_error("version must be a built-in attribute.");
  const auto* descriptor = reinterpret_cast<PyGetSetDescrObject*>(version.ptr());
  const PyGetSetDef& access = *descriptor->d_getset;
  if (access.get == nullptr) throw py::type_error("version must be readable.");
  const Py_ssize_t count = PyTuple_GET_SIZE(tensors.ptr());
  int64_t sum = 0;
  for (Py_ssize_t i = -kAhead; i < count; ++i) {
    if (i + kAhead < count) {
      prefetch(PyTuple_GET_ITEM(tensors.ptr(), i + kAhead), kObjectBytes);
      if (const char* block = block_of(blocks, i + kAhead)) prefetch(block, kBlockBytes);
    }
    if (i + kAhead / 2 >= 0 && i + kAhead / 2 < count) {
      if (const char* block = block_of(blocks, i + kAhead / 2)) {
        const void* counter = nullptr;
        std::memcpy(&counter, block + kCounterAt, sizeof counter);
        prefetch(counter, kCounterBytes);
      }
    }
    if (i < 0) continue;
    PyObject* const tensor = PyTuple_GET_ITEM(tensors.ptr(), i);
    if (!PyObject_TypeCheck(tensor, PyDescr_TYPE(descriptor))) throw py::type_error("tensors must have the attribute.");
    const auto value = py::reinterpret_steal<py::object>(access.get(tensor, access.closure));
    if (!value) throw py::error_already_set();
    sum += PyLong_AsLongLong(value.ptr());
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  }
  return sum;
}

// `tags` are of the tables as they held `members`.
bool unchanged(const py::tuple& tables, const py::bytes& tags, const py::tuple& members, const py::tuple& tensors,
               const py::object& version, const py::bytes& blocks, int64_t sum) {
  return (same_tags(tables, tags) || same_members(tables, members)) && version_sum(tensors, version, blocks) == sum;
}

}  // namespace

void bind_watch(py::module_& m) {
  m.def("same_members", &same_members, py::arg("tables"), py::arg("members"));
  m.def("table_tags", &table_tags, py::arg("tables"));
  m.def("unchanged", &unchanged, py::arg("tables"), py::arg("tags"), py::arg("members"), py::arg("tensors"), py::arg("version"),
        py::arg("blocks"), py::arg("sum"));
  m.def("version_sum", &version_sum, py::arg("tensors"), py::arg("version"), py::arg("blocks") = py::bytes());
}

}  // namespace dynprune
