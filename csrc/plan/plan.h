// A plan: operations in order, the memory they need, the sites they obey, and what each is predicted to cost. Immutable once it runs.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "plan/gate.h"
#include "plan/op.h"

namespace dynprune {

struct BufferSpec {
  bool is_arena = true;  // otherwise the caller binds it before a run
  int64_t size = 0;
  int64_t offset = 0;
};

struct PlanSpec {
  int64_t arena_size = 0;  // elements of one sample
  std::vector<BufferSpec> buffers;
  std::vector<SiteSpec> sites;
  std::vector<StepSpec> steps;  // op "torch" stands for a step that Python runs
};

// Predicted time of a step for one sample: fixed + scaled * (share of its rows x share of its columns that run); 0 when skipped.
struct StepCost {
  double fixed_ns = 0.0;
  double scaled_ns = 0.0;
};

// What one inference executed, summed over the batch.
struct Executed {
  double macs = 0.0;
  double predicted_ns = 0.0;
};

class Plan {
 public:
  // Throws std::invalid_argument where a step, buffer or site is inconsistent.
  Plan(PlanSpec spec, const std::vector<int64_t>& step_macs, const KernelTable& kernels, int num_threads);

  void set_gate(int64_t site, GateParameters parameters);
  // `compensation` must outlive the plan; sizes are those that `compensation_sizes(step)` gives.
  void set_compensation(int64_t step, const float* compensation);
  std::vector<int64_t> compensation_sizes(int64_t step) const;
  void set_costs(std::vector<StepCost> costs);

  int64_t num_steps() const { return static_cast<int64_t>(ops_.size()); }
  // nullptr for a step that Python runs.
  const Op* op(int64_t step) const { return ops_[step].get(); }
  int64_t arena_size() const { return spec_.arena_size; }
  const std::vector<BufferSpec>& buffers() const { return spec_.buffers; }
  const std::vector<SiteSpec>& sites() const { return spec_.sites; }
  int64_t scratch_floats() const { return scratch_floats_; }
  const KernelTable& kernels() const { return kernels_; }

  bool runs(int64_t step, const GateState& gates, int64_t sample) const {
    if (for_gates_[step] && !gates.gates_run(step) && !(looks_[step] && gates.watched())) return false;
    for (const int32_t branch : branches_[step]) {
      if (gates.list(branch, sample).count == 0) return false;
    }
    return true;
  }
  // How many rows of a site ran for a sample: none where a branch around the site's gate is off.
  int64_t rows_run(int64_t site, const GateState& gates, int64_t sample) const;
  Executed executed(const GateState& gates, int64_t batch) const;

 private:
  Executed whole() const;
  int64_t num_fused(int64_t step) const;
  int64_t first_step_for(int64_t step) const;
  void choose_looks();
  void make_ops(int num_threads);
  double work_share(int64_t step, const GateState& gates, int64_t sample) const;
  void check_sizes(const StepSpec& step) const;
  void check_operand(const StepSpec& step, const Rows& rows) const;
  void check_strides(const StepSpec& step, const Rows& rows, const char* strides) const;
  void check_sites(const StepSpec& step) const;

  PlanSpec spec_;
  const KernelTable& kernels_;
  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<std::vector<int32_t>> branches_;
  std::vector<char> for_gates_;  // the step is a gate, or only gates read what it writes
  std::vector<char> looks_;      // the step is a gate that looks at the clock
  struct StepSites {
    int32_t in, out;
  };
  std::vector<StepSites> step_sites_;
  std::vector<int64_t> macs_;
  std::vector<StepCost> costs_;
  Executed whole_;  // of one sample, where everything runs but what is for gates
  std::vector<GateOp*> gate_of_site_;
  int64_t scratch_floats_ = 0;
};

}  // namespace dynprune
