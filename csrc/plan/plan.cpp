#include "plan/plan.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "plan/ops.h"
#include "plan/ops/bottleneck.h"
#include "plan/ops/factories.h"

namespace dynprune {
namespace {

// Sizes and strides up to this keep every product of two of them within 64 bits.
constexpr int64_t kMaxSize = int64_t{1} << 31;
// Kernels, strides, dilations and paddings are looped over when a plan is built.
constexpr int64_t kMaxWindow = 1 << 16;
constexpr int64_t kMaxChannels = 1 << 20;
// Chunks are cut for no more threads than this.
constexpr int kMaxThreads = 256;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

bool is_size(int64_t value) { return value >= 0 && value <= kMaxSize; }

}  // namespace

Plan::Plan(PlanSpec spec, const std::vector<int64_t>& step_macs, const KernelTable& kernels, int num_threads)
    : spec_(std::move(spec)), kernels_(kernels), macs_(step_macs) {
  if (macs_.size() != spec_.steps.size()) fail("a plan needs one count of multiply-adds per step.");
  if (num_threads < 1) fail("num_threads must be >= 1, got " + std::to_string(num_threads) + ".");
  num_threads = std::min(num_threads, kMaxThreads);
  for (const BufferSpec& buffer : spec_.buffers) {
    if (!is_size(buffer.size) || !is_size(buffer.offset) || (buffer.is_arena && buffer.offset + buffer.size > spec_.arena_size)) {
      fail("a buffer lies outside the arena of " + std::to_string(spec_.arena_size) + " elements.");
    }
  }
  if (!is_size(spec_.arena_size)) fail("an arena of " + std::to_string(spec_.arena_size) + " elements is too large.");
  for (const SiteSpec& site : spec_.sites) {
    const bool whole_groups = site.group_size >= 1 && site.num_channels % site.group_size == 0;
    if (site.num_channels < 1 || site.num_channels > kMaxChannels || !whole_groups) {
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
    check_sizes(step);
    for (Rows& rows : step.inputs) {
      check_operand(step, rows);
      const int64_t end = rows.offset + (rows.rows - 1) * rows.row_stride + rows.positions;
      const BufferSpec& buffer = spec_.buffers[rows.buffer];
      rows.readable_past_end = buffer.is_arena || end + kReadPastEnd <= buffer.size;
    }
    if (step.op != "torch" && step.op != "gate") check_operand(step, step.output);
    if (step.op == "copy" && !step.inputs.empty()) check_strides(step, step.inputs[0], "in_strides");
    if (step.op == "copy" || step.op == "fill") check_strides(step, step.output, "out_strides");
    check_sites(step);
    branches_.push_back(step.branches);
    for_gates_.push_back(step.op == "gate" || step.ints.count("for_gates") > 0);
    step_sites_.push_back({step.in_site, step.out_site});
  }
  make_ops(num_threads);
  spec_.steps.clear();
  whole_ = whole();
}

// How many of the steps before it a step runs along.
int64_t Plan::num_fused(int64_t step) const {
  const auto found = spec_.steps[step].ints.find("fused");
  if (found == spec_.steps[step].ints.end()) return 0;
  const std::vector<int64_t>& value = found->second;
  if (value.size() != 1 || value[0] < 1 || value[0] > std::min<int64_t>(2, step)) {
    fail("step '" + spec_.steps[step].name + "' (" + spec_.steps[step].op + "): 'fused' must be 1 or 2 steps that stand before it.");
  }
  return value[0];
}

// The first of the steps that a step reads from and that run for gates alone, or itself.
int64_t Plan::first_step_for(int64_t step) const {
  for (int64_t i = step - 1; i >= 0; --i) {
    const StepSpec& before = spec_.steps[i];
    if (!for_gates_[i] || before.op == "gate" || before.inputs.empty()) continue;
    if (before.output.buffer == spec_.steps[step].inputs[0].buffer) return first_step_for(i);
  }
  return step;
}

// A gate looks at the clock where the predicted rest has shrunk by a 64th since the last one that does: not right after another.
void Plan::choose_looks() {
  constexpr float kLookAgain = 1.0f - 1.0f / 64;
  float looked_rest_ns = std::numeric_limits<float>::infinity();
  looks_.assign(ops_.size(), 0);
  for (size_t step = 0; step < ops_.size(); ++step) {
    auto* gate = dynamic_cast<GateOp*>(ops_[step].get());
    if (gate == nullptr) continue;
    gate->set_looks(gate->is_watching() && gate->rest_ns() <= kLookAgain * looked_rest_ns);
    if (!gate->looks()) continue;
    looks_[step] = 1;
    looked_rest_ns = gate->rest_ns();
  }
}

void Plan::make_ops(int num_threads) {
  const auto num_steps = static_cast<int64_t>(spec_.steps.size());
  std::vector<int64_t> first_for(num_steps);
  for (int64_t i = 0; i < num_steps; ++i) {
    if (spec_.steps[i].op == "gate" && !spec_.steps[i].inputs.empty()) first_for[i] = first_step_for(i);
  }
  std::vector<std::unique_ptr<Op>> fused(num_steps);
  for (int64_t last = 0; last < num_steps; ++last) {
    const int64_t first = last - num_fused(last);
    if (first == last) continue;
    const std::vector<StepSpec> parts(spec_.steps.begin() + first, spec_.steps.begin() + last + 1);
    fused[last] = make_bottleneck(parts, kernels_, num_threads);
    for (int64_t i = first; i < last && fused[last] != nullptr; ++i) {
      if (fused[i] != nullptr) fail("step '" + parts[0].name + "' is fused with more than one other.");
      fused[i] = make_absorbed(spec_.steps[i], *fused[last]);
    }
  }
  for (int64_t i = 0; i < num_steps; ++i) {
    StepSpec& step = spec_.steps[i];
    if (fused[i] != nullptr) {
      ops_.push_back(std::move(fused[i]));
    } else if (step.op == "torch") {
      ops_.push_back(nullptr);
    } else if (step.op == "gate") {
      auto gate = std::make_unique<GateOp>(std::move(step), kernels_, spec_.sites, i, first_for[i]);
      gate_of_site_[gate->site()] = gate.get();
      ops_.push_back(std::move(gate));
    } else {
      ops_.push_back(make_op(std::move(step), kernels_, num_threads));
    }
    if (ops_.back() != nullptr) scratch_floats_ = std::max(scratch_floats_, ops_.back()->scratch_floats());
  }
}

void Plan::check_sizes(const StepSpec& step) const {
  for (const auto& [name, values] : step.ints) {
    const bool window = name == "kernel" || name == "stride" || name == "dilation" || name == "padding";
    for (const int64_t value : values) {
      if (value < -kMaxSize || value > (window ? kMaxWindow : kMaxSize)) {
        fail("step '" + step.name + "' (" + step.op + "): " + std::to_string(value) + " in '" + name + "' is too large.");
      }
    }
  }
}

// Operands that follow a site have a row for each of its channels, or repeat one. Linear layers may own several features of a channel.
void Plan::check_sites(const StepSpec& step) const {
  auto check = [&](const char* what, const Rows& rows, int32_t site, bool may_repeat) {
    const int64_t channels = spec_.sites[site].num_channels;
    const auto repeat = step.ints.find("repeat");
    const int64_t features = repeat != step.ints.end() && !repeat->second.empty() ? repeat->second[0] : 1;
    if (rows.rows == channels || (may_repeat && (rows.rows == 1 || rows.row_stride == 0))) return;
    if (step.op == "attention" && rows.rows > 0 && rows.rows % channels == 0) return;
    if (step.op == "linear" && may_repeat && rows.rows * rows.positions == channels * features) return;
    fail("step '" + step.name + "' (" + step.op + "): " + what + " has " + std::to_string(rows.rows) + " rows, its site " +
         std::to_string(channels) + " channels.");
  };
  if (step.op == "torch" || step.op == "gate") return;
  if (step.in_site >= 0) {
    const size_t following = step.op == "conv" || step.op == "attention" ? std::min<size_t>(1, step.inputs.size()) : step.inputs.size();
    for (size_t i = 0; i < following; ++i) check("an input", step.inputs[i], step.in_site, i > 0 || step.op == "linear");
  }
  if (step.out_site >= 0) check("the output", step.output, step.out_site, false);
}

// What a strided copy or fill reaches from the operand's offset must lie in its buffer.
void Plan::check_strides(const StepSpec& step, const Rows& rows, const char* name) const {
  const auto sizes = step.ints.find("sizes");
  const auto strides = step.ints.find(name);
  if (sizes == step.ints.end() || strides == step.ints.end() || sizes->second.size() != strides->second.size()) {
    fail("step '" + step.name + "' (" + step.op + "): needs ints 'sizes' and '" + name + "' of one length.");
  }
  const int64_t size = spec_.buffers[rows.buffer].size;
  int64_t last = rows.offset;
  bool empty = false;
  for (size_t d = 0; d < sizes->second.size(); ++d) {
    const int64_t n = sizes->second[d];
    empty = empty || n == 0;
    if (n < 0 || strides->second[d] < 0) fail("step '" + step.name + "' (" + step.op + "): sizes and strides must be >= 0.");
    if (n > 1) last = std::min(last + (n - 1) * strides->second[d], size);
  }
  if (!empty && last >= size) fail("step '" + step.name + "' (" + step.op + ") reaches beyond its buffer of " + std::to_string(size) + " elements.");
}

void Plan::check_operand(const StepSpec& step, const Rows& rows) const {
  if (rows.buffer < 0 || rows.buffer >= static_cast<int32_t>(spec_.buffers.size())) {
    fail("step '" + step.name + "' names buffer " + std::to_string(rows.buffer) + " of " + std::to_string(spec_.buffers.size()) + ".");
  }
  if (!is_size(rows.offset) || !is_size(rows.rows) || !is_size(rows.positions) || !is_size(rows.row_stride)) {
    fail("step '" + step.name + "' (" + step.op + ") has an operand of negative or too large sizes.");
  }
  const int64_t last = rows.offset + (rows.rows - 1) * rows.row_stride + rows.positions;
  if (rows.rows > 0 && last > spec_.buffers[rows.buffer].size) {
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
  choose_looks();
}

std::vector<int64_t> Plan::compensation_sizes(int64_t step) const {
  if (step < 0 || step >= num_steps()) fail("the plan has no step " + std::to_string(step) + ".");
  const auto* op = dynamic_cast<const Compensated*>(ops_[step].get());
  return op == nullptr ? std::vector<int64_t>{} : op->compensation_sizes();
}

void Plan::set_compensation(int64_t step, const float* compensation) {
  if (compensation_sizes(step).empty()) fail("step " + std::to_string(step) + " has no gated input to compensate.");
  dynamic_cast<Compensated&>(*ops_[step]).set_compensation(compensation);
}

void Plan::set_costs(std::vector<StepCost> costs) {
  if (costs.size() != ops_.size()) fail("a plan of " + std::to_string(ops_.size()) + " steps got " + std::to_string(costs.size()) + " costs.");
  costs_ = std::move(costs);
  whole_ = whole();
}

double Plan::work_share(int64_t step, const GateState& gates, int64_t sample) const {
  const StepSites sites = step_sites_[step];
  auto share = [&](int32_t site) {
    return site < 0 ? 1.0 : static_cast<double>(gates.list(site, sample).count) / static_cast<double>(spec_.sites[site].num_channels);
  };
  if (!runs(step, gates, sample)) return 0.0;
  return sites.in == sites.out ? share(sites.in) : share(sites.in) * share(sites.out);
}

int64_t Plan::rows_run(int64_t site, const GateState& gates, int64_t sample) const {
  const GateOp* gate = gate_of_site_[site];
  if (gate != nullptr) {
    for (const int32_t branch : gate->spec().branches) {
      if (gates.list(branch, sample).count == 0) return 0;
    }
  }
  return gates.list(site, sample).count;
}

Executed Plan::whole() const {
  Executed total;
  for (int64_t step = 0; step < num_steps(); ++step) {
    if (for_gates_[step]) continue;
    total.macs += static_cast<double>(macs_[step]);
    total.predicted_ns += costs_[step].fixed_ns + costs_[step].scaled_ns;
  }
  return total;
}

Executed Plan::executed(const GateState& gates, int64_t batch) const {
  if (gates.all_whole()) return {whole_.macs * static_cast<double>(batch), whole_.predicted_ns * static_cast<double>(batch)};
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
