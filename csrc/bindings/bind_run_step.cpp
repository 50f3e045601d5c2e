// One step alone over buffers of the caller: what the kernel tests and the kernel benchmark use.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>

#include "base/spin.h"
#include "bindings/read_spec.h"
#include "bindings/without_gil.h"
#include "dispatch.h"
#include "plan/executor.h"

namespace py = pybind11;

namespace dynprune {
namespace {

// A one-step plan bound to numpy buffers of shape (batch, size), with the active lists that its sites have.
class StepRunner {
 public:
  StepRunner(const std::string& isa, const py::dict& step, const std::vector<FloatArray>& buffers, const std::vector<int64_t>& sites,
             const std::vector<std::vector<std::vector<int32_t>>>& active, int num_threads, std::optional<FloatArray> compensation)
      : num_threads_(num_threads), kept_(std::make_shared<KeptAlive>()) {
    if (buffers.empty()) throw std::invalid_argument("a step needs at least one buffer.");
    if (active.size() != sites.size()) throw std::invalid_argument("one entry of `active` per site is needed.");
    if (num_threads < 1) throw std::invalid_argument("num_threads must be >= 1, got " + std::to_string(num_threads) + ".");
    PlanSpec spec;
    const int64_t batch = buffers[0].ndim() == 2 ? buffers[0].shape(0) : 0;
    for (const FloatArray& buffer : buffers) {
      if (buffer.ndim() != 2 || buffer.shape(0) != batch || batch < 1) {
        throw std::invalid_argument("buffers must be (batch, size) with one batch >= 1.");
      }
      spec.buffers.push_back({false, buffer.shape(1), 0});
      kept_->add(buffer);
    }
    for (const int64_t channels : sites) spec.sites.push_back({false, channels, 1});
    spec.steps.push_back(read_step(step, *kept_));
    auto plan = std::shared_ptr<Plan>(new Plan(std::move(spec), {0}, kernels_for(isa), num_threads), [kept = kept_](Plan* p) { delete p; });
    if (compensation) {
      kept_->add(*compensation);
      check_compensation(0, *compensation, plan->compensation_sizes(0));
      plan->set_compensation(0, compensation->data());
    }
    workspace_ = std::make_shared<Workspace>(plan, batch);
    for (size_t b = 0; b < buffers.size(); ++b) {
      workspace_->bind(static_cast<int64_t>(b), const_cast<float*>(buffers[b].data()), buffers[b].shape(1));
    }
    GateState& gates = workspace_->gates();
    gates.begin_given();
    for (size_t s = 0; s < sites.size(); ++s) {
      if (static_cast<int64_t>(active[s].size()) != batch) throw std::invalid_argument("one list per sample is needed.");
      for (int64_t n = 0; n < batch; ++n) {
        int64_t previous = -1;
        for (const int32_t channel : active[s][n]) {
          if (channel <= previous || channel >= sites[s]) throw std::invalid_argument("active lists must ascend within the site.");
          previous = channel;
        }
        gates.give(static_cast<int64_t>(s), n, active[s][n].data(), static_cast<int64_t>(active[s][n].size()));
      }
    }
  }

  // Runs the step `times` times and returns the nanoseconds of each.
  std::vector<int64_t> run(int64_t times) {
    std::vector<int64_t> result;
    without_gil([&] {
      for (int64_t i = 0; i < times; ++i) {
        const int64_t began = now_ns();
        workspace_->run(0, 1, num_threads_);
        result.push_back(now_ns() - began);
      }
    });
    return result;
  }

 private:
  int num_threads_;
  std::shared_ptr<KeptAlive> kept_;
  std::shared_ptr<Workspace> workspace_;
};

}  // namespace

void bind_run_step(py::module_& m) {
  py::class_<StepRunner>(m, "StepRunner")
      .def(py::init<const std::string&, const py::dict&, const std::vector<FloatArray>&, const std::vector<int64_t>&,
                    const std::vector<std::vector<std::vector<int32_t>>>&, int, std::optional<FloatArray>>(),
           py::arg("isa"), py::arg("step"), py::arg("buffers"), py::arg("sites") = std::vector<int64_t>{},
           py::arg("active") = std::vector<std::vector<std::vector<int32_t>>>{}, py::arg("num_threads") = 1,
           py::arg("compensation") = py::none())
      .def("run", &StepRunner::run, py::arg("times") = 1);
}

}  // namespace dynprune
