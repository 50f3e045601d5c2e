#include "plan/gate.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "base/spin.h"
#include "plan/ops/spec_reader.h"

namespace dynprune {
namespace {

// No difference of a time of the clock and an earlier or later one than this leaves 64 bits.
constexpr int64_t kFarNs = int64_t{1} << 61;

// No step has such a number.
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// A gate's scratch: level, level needed for the deadline, count; then the groups (int32), then scores and the hidden vector.
enum Scratch { kLevel, kNeededLevel, kCount, kGroups = 16 };
constexpr int32_t kStaysWhole = -1;

}  // namespace

GateState::GateState(const std::vector<SiteSpec>& sites, int64_t batch) : sites_(sites), batch_(batch) {
  int64_t channels = 0;
  for (const SiteSpec& site : sites) channels += site.num_channels;
  index_ = AlignedBuffer<int32_t>(channels * batch);
  inactive_ = AlignedBuffer<float>(channels * batch);
  flat_.resize(sites.size() * batch);
  int64_t offset = 0;
  for (size_t s = 0; s < sites.size(); ++s) {
    for (int64_t sample = 0; sample < batch; ++sample) {
      for (int64_t c = 0; c < sites[s].num_channels; ++c) {
        index_.data()[offset + c] = static_cast<int32_t>(c);
        inactive_.data()[offset + c] = 0.0f;
      }
      flat_[s * batch + sample] = {index_.data() + offset, sites[s].num_channels, inactive_.data() + offset};
      offset += sites[s].num_channels;
    }
    rows_.push_back(flat_.data() + s * batch);
  }
}

void GateState::begin(float level, int64_t deadline_ns, float slowdown) {
  if (gates_from_.load(std::memory_order_relaxed) != kNever) all_whole_ = false;
  given_ = false;
  start_level_ = level;
  level_.store(level, std::memory_order_relaxed);
  needed_level_.store(level, std::memory_order_relaxed);
  deadline_ns_ = std::max(deadline_ns, -kFarNs);
  slowdown_ = slowdown;
  guard_actions_.store(0, std::memory_order_relaxed);
  gates_from_.store(level > 0.0f ? 0 : kNever, std::memory_order_relaxed);
  if (level == 0.0f) publish_all();
}

void GateState::begin_given() {
  begin(0.0f, 0, 1.0f);
  given_ = true;
}

void GateState::give(int64_t site, int64_t sample, const int32_t* groups, int64_t count) {
  all_whole_ = false;
  publish(site, sample, groups, count);
}

bool GateState::all_whole() const {
  return all_whole_ && !always_run_ && !watched() && gates_from_.load(std::memory_order_relaxed) == kNever;
}

void GateState::publish_all() {
  if (all_whole_) return;
  all_whole_ = true;
  std::vector<int32_t> all;
  for (size_t site = 0; site < sites_.size(); ++site) {
    const int64_t groups = sites_[site].num_groups();
    while (static_cast<int64_t>(all.size()) < groups) all.push_back(static_cast<int32_t>(all.size()));
    for (int64_t sample = 0; sample < batch_; ++sample) publish(site, sample, all.data(), groups);
  }
}

void GateState::publish(int64_t site, int64_t sample, const int32_t* groups, int64_t count) {
  const SiteSpec& spec = sites_[site];
  ActiveList& list = flat_[site * batch_ + sample];
  auto* index = const_cast<int32_t*>(list.index);
  auto* inactive = const_cast<float*>(list.inactive);
  std::fill(inactive, inactive + spec.num_channels, 1.0f);
  for (int64_t g = 0; g < count; ++g) {
    for (int64_t i = 0; i < spec.group_size; ++i) {
      const int64_t channel = groups[g] * spec.group_size + i;
      *index++ = static_cast<int32_t>(channel);
      inactive[channel] = 0.0f;
    }
  }
  list.count = count * spec.group_size;
}

GateOp::GateOp(StepSpec spec, const KernelTable& kernels, const std::vector<SiteSpec>& sites, int64_t number, int64_t first_input)
    : Op(std::move(spec)), kernels_(kernels), number_(number), first_input_(first_input) {
  const SpecReader reader(spec_);
  site_ = reader.integer("site");
  reader.check(site_ >= 0 && site_ < static_cast<int64_t>(sites.size()), "unknown site " + std::to_string(site_));
  site_spec_ = sites[site_];
  const Rows& pooled = reader.input(0);
  reader.check(pooled.positions == 1 && pooled.row_stride == 1, "the pooled input must be one contiguous value per channel");
  by_magnitude_ = reader.integer("by_magnitude", 0) != 0;
  reader.check(!by_magnitude_ || pooled.rows == site_spec_.num_groups(), "by_magnitude needs one input per group");
  parameters_.in_features = pooled.rows;
  parameters_.bias.assign(site_spec_.num_groups(), 0.0f);
  parameters_.up.clear();
  parameters_.curve = {-1.0f, -1.0f};
}

void GateOp::set_parameters(GateParameters parameters) {
  const SpecReader reader(spec_);
  const auto groups = static_cast<size_t>(site_spec_.num_groups());
  reader.check(parameters.in_features == spec_.inputs[0].rows,
               "the gate must read " + std::to_string(spec_.inputs[0].rows) + " channels, got " + std::to_string(parameters.in_features));
  reader.check(parameters.down.size() == static_cast<size_t>(parameters.rank * parameters.in_features) &&
                   parameters.up.size() == groups * parameters.rank && parameters.bias.size() == groups,
               "gate matrices must be [rank, channels], [groups, rank], [groups]");
  reader.check(parameters.curve.size() >= 2, "a threshold curve needs at least 2 levels");
  reader.check(parameters.rest_ns.empty() || parameters.rest_ns.size() == parameters.curve.size(),
               "predicted rests must have one entry per level of the curve");
  parameters_ = std::move(parameters);
}

int64_t GateOp::scratch_floats() const { return kGroups + 2 * site_spec_.num_groups() + parameters_.rank + 48; }

float GateOp::threshold(float level) const {
  const std::vector<float>& curve = parameters_.curve;
  const float place = level * static_cast<float>(curve.size() - 1);
  const auto low = std::min(static_cast<size_t>(place), curve.size() - 2);
  const float share = place - static_cast<float>(low);
  return curve[low] + share * (curve[low + 1] - curve[low]);
}

// The lowest stored level from the run's on at which the rest of the model still meets the deadline.
float GateOp::needed_level(const GateState& state) const {
  const float level = state.level();
  const auto left = static_cast<float>(state.deadline_ns_ - now_ns());
  const size_t last = parameters_.rest_ns.size() - 1;
  for (auto i = static_cast<size_t>(level * static_cast<float>(last)); i <= last; ++i) {
    if (parameters_.rest_ns[i] * state.slowdown_ <= left) return std::max(level, static_cast<float>(i) / static_cast<float>(last));
  }
  return 1.0f;
}

bool GateOp::is_idle(const RunView& run) const {
  const GateState& state = *run.gates;
  return looks_ && state.watched() && !state.gates_run(number_) && needed_level(state) == 0.0f;
}

// Branches are skipped last: one is decided at the level that the run began with, as long as channels left out later can still meet the
// deadline.
void GateOp::compute(const RunView& run, int64_t sample, int64_t /*part*/, float* scratch) const {
  const GateState& state = *run.gates;
  if (state.given_) return;
  auto* count = reinterpret_cast<int32_t*>(scratch + kCount);
  auto* groups = reinterpret_cast<int32_t*>(scratch + kGroups);
  const int64_t num_groups = site_spec_.num_groups();
  const bool looks = looks_ && state.watched();
  const float needed = looks ? needed_level(state) : state.needed_level_.load(std::memory_order_relaxed);
  const float level = site_spec_.is_branch && needed < 1.0f ? state.start_level_ : std::max(state.level(), needed);
  scratch[kNeededLevel] = needed;
  scratch[kLevel] = level;
  *count = kStaysWhole;
  if (level == 0.0f || !state.gates_run(first_input_)) return;  // such a run began at level 0, so the list is whole
  float* scores = scratch + kGroups + num_groups;
  const float* bias = parameters_.bias.data();
  if (by_magnitude_) {
    const float* x = run.row(spec_.inputs[0], sample, 0);
    for (int64_t g = 0; g < num_groups; ++g) scores[g] = std::fabs(x[g]);
  } else if (parameters_.rank > 0) {
    float* hidden = scores + num_groups;
    kernels_.dot_rows({parameters_.rank, parameters_.in_features, parameters_.down.data(), parameters_.in_features, nullptr, 0,
                       run.row(spec_.inputs[0], sample, 0), nullptr, hidden});
    kernels_.dot_rows({num_groups, parameters_.rank, parameters_.up.data(), parameters_.rank, nullptr, 0, hidden, bias, scores});
  } else {
    std::memcpy(scores, bias, num_groups * sizeof(float));
  }
  const float limit = threshold(level);
  int32_t found = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    groups[found] = static_cast<int32_t>(g);
    found += scores[g] > limit ? 1 : 0;
  }
  *count = found;
}

void GateOp::commit(const RunView& run, int64_t sample, int64_t /*part*/, float* scratch) const {
  GateState& state = *run.gates;
  if (state.given_) return;
  const auto count = *reinterpret_cast<const int32_t*>(scratch + kCount);
  if (count != kStaysWhole) state.publish(site_, sample, reinterpret_cast<const int32_t*>(scratch + kGroups), count);
  const float needed = scratch[kNeededLevel];
  if (looks_) state.needed_level_.store(needed, std::memory_order_relaxed);
  if (needed > 0.0f && !state.gates_run(number_ + 1)) state.gates_from_.store(number_ + 1, std::memory_order_relaxed);
  if (scratch[kLevel] > state.level()) {
    state.level_.store(scratch[kLevel], std::memory_order_relaxed);
    state.guard_actions_.fetch_add(1, std::memory_order_relaxed);
  }
}

}  // namespace dynprune
