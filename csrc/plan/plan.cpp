#include "plan/plan.h"

#include <algorithm>
#include <stdexcept>

#include "plan/ops.h"
#include "plan/ops/factories.h"

namespace dynprune {
namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

}  // namespace

Plan::Plan(PlanSpec spec, const std::vector<int64_t>& step_macs, const KernelTable& kernels, int num_threads)
    : spec_(std::move(spec)), kernels_(kernels), macs_(step_macs) {
  if (macs_.size() != spec_.steps.size()) fail("a plan needs one count of multiply-adds per step.");
  if (num_threads < 1) fail("num_threads must be >= 1, got " + std::to_string(num_threads) + ".");
  for (const BufferSpec& buffer : spec_.buffers) {
    if (buffer.size < 0 || buffer.offset < 0 || (buffer.is_arena && buffer.offset + buffer.size > spec_.arena_size)) {
      fail("a buffer lies outside the arena of " + std::to_string(spec_.arena_size) + " elements.");
    }
  }
  for (const SiteSpec& site : spec_.sites) {
    if (site.num_channels < 1 || site.group_size < 1 || site.num_channels % site.group_size != 0) {
      fail("a site needs channels in whole groups, got " + std::to_string(site.num_channels) + " channels in groups of " +
           std::to_string(site.group_size) + ".");
    }
  }
  const auto num_sites = static_cast<int32_t>(spec_.sites.size());
  gate_of_site_.resize(spec_.sites.size(), nullptr);
  costs_.resize(spec_.steps.size());
  for (StepSpec& step : spec_.steps) {
    if (step.in_site >= num_sites || step.out_site >= num_sites) fail("step '" + step.name + "' names an unknown site.");
    for (const int32_t branch : step.branches) {
      if (branch < 0 || branch >= num_sites) fail("step '" + step.name + "' names an unknown branch.");
    }
    for (Rows& rows : step.inputs) {
      check_operand(step, rows);
      const int64_t end = rows.offset + (rows.rows - 1) * rows.row_stride + rows.positions;
      const BufferSpec& buffer = spec_.buffers[rows.buffer];
      rows.readable_past_end = buffer.is_arena || end + kReadPastEnd <= buffer.size;
    }
    if (step.op != "torch" && step.op != "gate") check_operand(step, step.output);
    branches_.push_back(step.branches);
    step_sites_.push_back({step.in_site, step.out_site});
    if (step.op == "torch") {
      ops_.push_back(nullptr);
    } else if (step.op == "gate") {
      auto gate = std::make_unique<GateOp>(std::move(step), kernels, spec_.sites);
      gate_of_site_[gate->site()] = gate.get();
      ops_.push_back(std::move(gate));
    } else {
      ops_.push_back(make_op(std::move(step), kernels, num_threads));
    }
    if (ops_.back() != nullptr) scratch_floats_ = std::max(scratch_floats_, ops_.back()->scratch_floats());
  }
  spec_.steps.clear();
}

void Plan::check_operand(const StepSpec& step, const Rows& rows) const {
  if (rows.buffer < 0 || rows.buffer >= static_cast<int32_t>(spec_.buffers.size())) {
    fail("step '" + step.name + "' names buffer " + std::to_string(rows.buffer) + " of " + std::to_string(spec_.buffers.size()) + ".");
  }
  const int64_t last = rows.offset + (rows.rows - 1) * rows.row_stride + rows.positions;
  if (rows.offset < 0 || rows.rows < 0 || rows.positions < 0 || rows.row_stride < 0 ||
      (rows.rows > 0 && last > spec_.buffers[rows.buffer].size)) {
    fail("step '" + step.name + "' (" + step.op + ") has an operand of " + std::to_string(last) + " elements in a buffer of " +
         std::to_string(spec_.buffers[rows.buffer].size) + ".");
  }
}

void Plan::set_gate(int64_t site, GateParameters parameters) {
  if (site < 0 || site >= static_cast<int64_t>(gate_of_site_.size()) || gate_of_site_[site] == nullptr) {
    fail("the plan has no gate for site " + std::to_string(site) + ".");
  }
  gate_of_site_[site]->set_parameters(std::move(parameters));
  scratch_floats_ = std::max(scratch_floats_, gate_of_site_[site]->scratch_floats());
}

std::vector<int64_t> Plan::compensation_sizes(int64_t step) const {
  if (step < 0 || step >= num_steps()) fail("the plan has no step " + std::to_string(step) + ".");
  const auto* op = dynamic_cast<const Compensated*>(ops_[step].get());
  return op == nullptr ? std::vector<int64_t>{} : op->compensation_sizes();
}

void Plan::set_compensation(int64_t step, const float* matrix) {
  if (compensation_sizes(step).empty()) fail("step " + std::to_string(step) + " has no gated input to compensate.");
  dynamic_cast<Compensated&>(*ops_[step]).set_compensation(matrix);
}

void Plan::set_costs(std::vector<StepCost> costs) {
  if (costs.size() != ops_.size()) fail("a plan of " + std::to_string(ops_.size()) + " steps got " + std::to_string(costs.size()) + " costs.");
  costs_ = std::move(costs);
}

double Plan::work_share(int64_t step, const GateState& gates, int64_t sample) const {
  const StepSites sites = step_sites_[step];
  auto share = [&](int32_t site) {
    return site < 0 ? 1.0 : static_cast<double>(gates.list(site, sample).count) / static_cast<double>(spec_.sites[site].num_channels);
  };
  if (!runs(step, gates, sample)) return 0.0;
  return sites.in == sites.out ? share(sites.in) : share(sites.in) * share(sites.out);
}

Executed Plan::executed(const GateState& gates, int64_t batch) const {
  Executed total;
  for (int64_t step = 0; step < num_steps(); ++step) {
    for (int64_t sample = 0; sample < batch; ++sample) {
      const double share = work_share(step, gates, sample);
      total.macs += share * static_cast<double>(macs_[step]);
      if (runs(step, gates, sample)) total.predicted_ns += costs_[step].fixed_ns + share * costs_[step].scaled_ns;
    }
  }
  return total;
}

}  // namespace dynprune
