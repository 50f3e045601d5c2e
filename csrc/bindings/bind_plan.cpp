// Plan and Workspace for Python. Every argument is checked here; the engine below trusts them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <new>
#include <stdexcept>
#include <tuple>

#include "base/spin.h"
#include "base/thread_pool.h"
#include "bindings/read_spec.h"
#include "bindings/without_gil.h"
#include "dispatch.h"
#include "plan/executor.h"

namespace py = pybind11;

namespace dynprune {
namespace {

std::vector<float> to_vector(const FloatArray& array) { return {array.data(), array.data() + array.size()}; }

// A workspace and the Python objects that its buffers lie in. A late thread keeps both alive.
struct PyWorkspace {
  std::shared_ptr<KeptAlive> bound;
  std::shared_ptr<Workspace> workspace;
  int64_t run_ns = 0;  // in run() since the inference began
};

class PyPlan {
 public:
  PyPlan(const py::dict& spec, const std::string& isa, int num_threads) : kept_(std::make_shared<KeptAlive>()) {
    PlanSpec plan;
    plan.arena_size = spec["arena_size"].cast<int64_t>();
    for (const py::handle item : spec["buffers"]) {
      const auto buffer = item.cast<std::tuple<std::string, int64_t, int64_t>>();
      plan.buffers.push_back({std::get<0>(buffer) == "arena", std::get<1>(buffer), std::get<2>(buffer)});
    }
    for (const py::handle item : spec["sites"]) {
      const auto site = item.cast<std::tuple<std::string, int64_t, int64_t>>();
      plan.sites.push_back({std::get<0>(site) == "branch", std::get<1>(site), std::get<2>(site)});
    }
    std::vector<int64_t> macs;
    for (const py::handle item : spec["steps"]) {
      const auto step = item.cast<py::dict>();
      plan.steps.push_back(read_step(step, *kept_));
      macs.push_back(step.contains("macs") ? step["macs"].cast<int64_t>() : 0);
    }
    // The plan may die on a helper thread; what it points into dies with it.
    plan_ = std::shared_ptr<Plan>(new Plan(std::move(plan), macs, kernels_for(isa), num_threads),
                                  [kept = kept_](Plan* p) { delete p; });
  }

  void set_gate(int64_t site, const FloatArray& down, const FloatArray& up, const FloatArray& bias, const FloatArray& curve,
                const FloatArray& rest_ms) {
    check_not_running();
    if (down.ndim() != 2 || up.ndim() != 2) throw std::invalid_argument("gate matrices 'down' and 'up' must have 2 dimensions.");
    GateParameters parameters;
    parameters.rank = down.shape(0);
    parameters.in_features = down.shape(1);
    parameters.down = to_vector(down);
    parameters.up = to_vector(up);
    parameters.bias = to_vector(bias);
    parameters.curve = to_vector(curve);
    parameters.rest_ns = to_vector(rest_ms);
    for (float& rest : parameters.rest_ns) rest *= 1e6f;
    plan_->set_gate(site, std::move(parameters));
  }

  void set_compensation(int64_t step, const FloatArray& compensation) {
    check_not_running();
    check_compensation(step, compensation, plan_->compensation_sizes(step));
    kept_->add(compensation);
    plan_->set_compensation(step, compensation.data());
  }

  void set_costs(const std::vector<double>& fixed_ms, const std::vector<double>& scaled_ms) {
    if (fixed_ms.size() != scaled_ms.size()) throw std::invalid_argument("fixed_ms and scaled_ms must have the same length.");
    std::vector<StepCost> costs;
    for (size_t i = 0; i < fixed_ms.size(); ++i) costs.push_back({fixed_ms[i] * 1e6, scaled_ms[i] * 1e6});
    plan_->set_costs(std::move(costs));
  }

  std::vector<int64_t> compensation_sizes(int64_t step) const { return plan_->compensation_sizes(step); }
  int64_t arena_bytes(int64_t batch) const { return plan_->arena_size() * batch * static_cast<int64_t>(sizeof(float)); }
  std::vector<int64_t> chunks() const {
    std::vector<int64_t> result;
    for (int64_t i = 0; i < plan_->num_steps(); ++i) result.push_back(plan_->op(i) == nullptr ? 0 : plan_->op(i)->chunks_per_sample());
    return result;
  }

  // A workspace that nobody uses, late threads included; a new one where there is none.
  std::shared_ptr<PyWorkspace> acquire(int64_t batch) {
    if (batch < 1) throw std::invalid_argument("batch must be >= 1, got " + std::to_string(batch) + ".");
    constexpr int64_t kMaxFloats = int64_t{1} << 46;
    if (batch > kMaxFloats / std::max<int64_t>(1, plan_->arena_size())) throw std::bad_alloc();
    runs_ = true;
    for (size_t i = free_.size(); i-- > 0;) {
      if (free_[i]->workspace->batch() == batch && free_[i]->workspace->idle()) {
        std::shared_ptr<PyWorkspace> found = std::move(free_[i]);
        free_.erase(free_.begin() + static_cast<int64_t>(i));
        return found;
      }
    }
    auto made = std::make_shared<PyWorkspace>();
    made->bound = std::make_shared<KeptAlive>();
    made->workspace = std::make_shared<Workspace>(plan_, batch, made->bound);
    return made;
  }

  // Letting Python objects go may run other threads, which come here too: it is done while `free_` is whole.
  void release(const std::shared_ptr<PyWorkspace>& workspace) {
    KeptAlive::let_go();
    if (workspace->workspace->idle()) workspace->bound->clear();
    constexpr size_t kMaxFree = 4;
    free_.push_back(workspace);
    if (free_.size() <= kMaxFree) return;
    const auto found = std::find_if(free_.begin(), free_.end(), [](const auto& free) { return free->workspace->idle(); });
    if (found == free_.end()) return;
    const std::shared_ptr<PyWorkspace> gone = std::move(*found);
    free_.erase(found);
  }

  // Lets go of the memory of workspaces that nobody uses.
  void trim() {
    KeptAlive::let_go();
    const auto used = std::stable_partition(free_.begin(), free_.end(), [](const auto& free) { return !free->workspace->idle(); });
    const std::vector<std::shared_ptr<PyWorkspace>> gone(std::make_move_iterator(used), std::make_move_iterator(free_.end()));
    free_.erase(used, free_.end());
  }

 private:
  void check_not_running() const {
    if (runs_) throw std::invalid_argument("gates and compensation are set before the plan first runs; make a new plan to change them.");
  }

  std::shared_ptr<KeptAlive> kept_;
  std::shared_ptr<Plan> plan_;
  std::vector<std::shared_ptr<PyWorkspace>> free_;
  bool runs_ = false;
};

void bind(PyWorkspace& self, int64_t buffer, uintptr_t address, int64_t sample_stride, py::object owner) {
  const auto& buffers = self.workspace->plan().buffers();
  if (buffer < 0 || buffer >= static_cast<int64_t>(buffers.size()) || buffers[buffer].is_arena) {
    throw std::invalid_argument("buffer " + std::to_string(buffer) + " is not one that the caller binds.");
  }
  self.workspace->bind(buffer, reinterpret_cast<float*>(address), sample_stride);
  self.bound->add(std::move(owner));
}

void begin(PyWorkspace& self, float level, int64_t deadline_ns, float slowdown) {
  if (!(level >= 0.0f && level <= 1.0f)) throw std::invalid_argument("level must be in [0, 1], got " + std::to_string(level) + ".");
  self.bound->clear();
  self.run_ns = 0;
  self.workspace->gates().begin(level, deadline_ns, slowdown);
}

// An array of int32 is copied at once, any other sequence number by number.
std::vector<int32_t> read_groups(const py::object& list) {
  if (py::isinstance<py::array_t<int32_t>>(list)) {
    const auto array = py::reinterpret_borrow<py::array_t<int32_t>>(list);
    if (array.ndim() == 1 && array.strides(0) == sizeof(int32_t)) return {array.data(), array.data() + array.size()};
  }
  try {
    return list.cast<std::vector<int32_t>>();
  } catch (const py::cast_error&) {
    throw py::type_error("a list of active groups must hold ints.");
  }
}

// `given`: per site None (whole) or one ascending list of groups per sample.
void begin_given(PyWorkspace& self, const std::vector<std::optional<std::vector<py::object>>>& given) {
  std::vector<std::optional<std::vector<std::vector<int32_t>>>> active(given.size());
  for (size_t s = 0; s < given.size(); ++s) {
    if (!given[s]) continue;
    active[s].emplace();
    for (const py::object& list : *given[s]) active[s]->push_back(read_groups(list));
  }
  const auto& sites = self.workspace->plan().sites();
  const int64_t batch = self.workspace->batch();
  if (active.size() != sites.size()) {
    throw std::invalid_argument("expected lists for " + std::to_string(sites.size()) + " sites, got " + std::to_string(active.size()) + ".");
  }
  for (size_t s = 0; s < active.size(); ++s) {
    if (!active[s]) continue;
    if (static_cast<int64_t>(active[s]->size()) != batch) {
      throw std::invalid_argument("site " + std::to_string(s) + " needs one list per sample, " + std::to_string(batch) + ", got " +
                                  std::to_string(active[s]->size()) + ".");
    }
    for (const auto& list : *active[s]) {
      int64_t previous = -1;
      for (const int32_t group : list) {
        if (group <= previous || group >= sites[s].num_groups()) {
          throw std::invalid_argument("lists of active groups must ascend within 0.." + std::to_string(sites[s].num_groups() - 1) +
                                      ", got " + std::to_string(group) + " after " + std::to_string(previous) + ".");
        }
        previous = group;
      }
    }
  }
  self.bound->clear();
  self.run_ns = 0;
  GateState& gates = self.workspace->gates();
  gates.begin_given();
  for (size_t s = 0; s < active.size(); ++s) {
    if (!active[s]) continue;
    for (int64_t sample = 0; sample < batch; ++sample) {
      const std::vector<int32_t>& list = (*active[s])[sample];
      gates.give(static_cast<int64_t>(s), sample, list.data(), static_cast<int64_t>(list.size()));
    }
  }
}

void run(PyWorkspace& self, int64_t first, int64_t last, int num_threads) {
  const Plan& plan = self.workspace->plan();
  if (first < 0 || last > plan.num_steps() || first > last) throw std::invalid_argument("steps to run lie outside the plan.");
  if (num_threads < 1) throw std::invalid_argument("num_threads must be >= 1, got " + std::to_string(num_threads) + ".");
  for (int64_t step = first; step < last; ++step) {
    if (plan.op(step) == nullptr) throw std::invalid_argument("step " + std::to_string(step) + " is not the engine's to run.");
  }
  if (!self.workspace->all_bound()) throw std::invalid_argument("bind every input and output before a run.");
  without_gil([&] {
    const int64_t began_ns = now_ns();
    self.workspace->run(first, last, num_threads);
    self.run_ns += now_ns() - began_ns;
  });
}

// The rows of a site that ran for a sample.
std::vector<int32_t> active(PyWorkspace& self, int64_t site, int64_t sample) {
  if (site < 0 || site >= static_cast<int64_t>(self.workspace->plan().sites().size()) || sample < 0 || sample >= self.workspace->batch()) {
    throw std::invalid_argument("no such site or sample.");
  }
  const ActiveList& list = self.workspace->gates().list(site, sample);
  return {list.index, list.index + list.count};
}

// Multiply-adds and milliseconds predicted for what ran, the level at the end, how often the deadline raised it, milliseconds in run(), the
// batch, and how many rows of each site ran for each sample, int64 (sites, batch) as bytes: to make an array, after an inference that
// left nothing of NumPy in the caches, takes 20 microseconds.
py::tuple executed(PyWorkspace& self) {
  const Plan& plan = self.workspace->plan();
  const GateState& gates = self.workspace->gates();
  const int64_t batch = self.workspace->batch();
  const Executed total = plan.executed(gates, batch);
  std::vector<int64_t> rows;
  rows.reserve(plan.sites().size() * batch);
  for (size_t s = 0; s < plan.sites().size(); ++s) {
    for (int64_t n = 0; n < batch; ++n) rows.push_back(plan.rows_run(static_cast<int64_t>(s), gates, n));
  }
  return py::make_tuple(total.macs, total.predicted_ns * 1e-6, gates.level(), gates.guard_actions(), static_cast<double>(self.run_ns) * 1e-6,
                        batch, py::bytes(reinterpret_cast<const char*>(rows.data()), rows.size() * sizeof(int64_t)));
}

// A whole inference in one call, for plans that leave no step to Python: `buffers` are the arguments of bind(), one tuple for each. Gives
// what executed() does.
py::tuple infer(PyPlan& self, int64_t batch, const py::list& buffers, float level, int64_t deadline_ns, float slowdown, int num_threads) {
  const std::shared_ptr<PyWorkspace> workspace = self.acquire(batch);
  try {
    begin(*workspace, level, deadline_ns, slowdown);
    for (const py::handle item : buffers) {
      auto [buffer, address, sample_stride, owner] = item.cast<std::tuple<int64_t, uintptr_t, int64_t, py::object>>();
      bind(*workspace, buffer, address, sample_stride, std::move(owner));
    }
    run(*workspace, 0, workspace->workspace->plan().num_steps(), num_threads);
    py::tuple done = executed(*workspace);
    self.release(workspace);
    return done;
  } catch (...) {
    self.release(workspace);
    throw;
  }
}

std::vector<double> step_ms(PyWorkspace& self) {
  std::vector<double> result;
  for (const int64_t ns : self.workspace->step_ns()) result.push_back(static_cast<double>(ns) * 1e-6);
  return result;
}

}  // namespace

void bind_plan(py::module_& m) {
  m.def("expect_run", [] { ThreadPool::instance().expect_job(); });
  py::class_<PyWorkspace, std::shared_ptr<PyWorkspace>>(m, "Workspace")
      .def("bind", &bind, py::arg("buffer"), py::arg("address"), py::arg("sample_stride"), py::arg("owner"))
      .def("begin", &begin, py::arg("level"), py::arg("deadline_ns") = 0, py::arg("slowdown") = 1.0f)
      .def("begin_given", &begin_given, py::arg("given"))
      .def("run", &run, py::arg("first"), py::arg("last"), py::arg("num_threads"))
      .def("active", &active, py::arg("site"), py::arg("sample"))
      .def("executed", &executed)
      .def("step_ms", &step_ms)
      .def("set_profiling", [](PyWorkspace& self, bool on) { self.workspace->set_profiling(on); }, py::arg("on"))
      .def("overtaken", [](PyWorkspace& self) { return self.workspace->overtaken(); })
      .def("arena_address", [](PyWorkspace& self) { return reinterpret_cast<uintptr_t>(self.workspace->arena()); });
  py::class_<PyPlan>(m, "Plan")
      .def(py::init<const py::dict&, const std::string&, int>(), py::arg("spec"), py::arg("isa"), py::arg("num_threads"))
      .def("set_gate", &PyPlan::set_gate, py::arg("site"), py::arg("down"), py::arg("up"), py::arg("bias"), py::arg("curve"),
           py::arg("rest_ms"))
      .def("set_compensation", &PyPlan::set_compensation, py::arg("step"), py::arg("compensation"))
      .def("compensation_sizes", &PyPlan::compensation_sizes, py::arg("step"))
      .def("set_costs", &PyPlan::set_costs, py::arg("fixed_ms"), py::arg("scaled_ms"))
      .def("arena_bytes", &PyPlan::arena_bytes, py::arg("batch"))
      .def("chunks", &PyPlan::chunks)
      .def("infer", &infer, py::arg("batch"), py::arg("buffers"), py::arg("level"), py::arg("deadline_ns"), py::arg("slowdown"),
           py::arg("num_threads"))
      .def("acquire", &PyPlan::acquire, py::arg("batch"))
      .def("release", &PyPlan::release, py::arg("workspace"))
      .def("trim", &PyPlan::trim);
}

}  // namespace dynprune
