#include "plan/gate.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "base/spin.h"
#include "plan/ops/spec_reader.h"

namespace dynprune {
namespace {

// No difference of a time of the clock and an earlier or later one than this leaves 64 bits.
constexpr int64_t kFarNs = int64_t{1} << 61;

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
  given_ = false;
  start_level_ = level;
  level_.store(level, std::memory_order_relaxed);
  deadline_ns_ = std::max(deadline_ns, -kFarNs);
  slowdown_ = slowdown;
  guard_actions_.store(0, std::memory_order_relaxed);
  gates_run_ = level > 0.0f || deadline_ns != 0;
  if (gates_run_) {
    all_whole_ = false;
  } else {
    publish_all();
  }
}

void GateState::begin_given() {
  begin(0.0f, 0, 1.0f);
  given_ = true;
}

void GateState::give(int64_t site, int64_t sample, const int32_t* groups, int64_t count) {
  all_whole_ = false;
  publish(site, sample, groups, count);
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

GateOp::GateOp(StepSpec spec, const KernelTable& kernels, const std::vector<SiteSpec>& sites)
    : Op(std::move(spec)), kernels_(kernels) {
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

int64_t GateOp::scratch_floats() const { return 2 * site_spec_.num_groups() + parameters_.rank + 64; }

float GateOp::threshold(float level) const {
  const std::vector<float>& curve = parameters_.curve;
  const float place = level * static_cast<float>(curve.size() - 1);
  const auto low = std::min(static_cast<size_t>(place), curve.size() - 2);
  const float share = place - static_cast<float>(low);
  return curve[low] + share * (curve[low + 1] - curve[low]);
}

// The run's level, or the lowest stored one above it at which the rest of the model still meets the deadline. Branches are skipped
// last: one is decided at the level that the run began with, as long as channels left out later can still meet the deadline.
float GateOp::guarded_level(const GateState& state) const {
  const float level = state.level();
  if (state.deadline_ns_ == 0 || parameters_.rest_ns.empty()) return level;
  const auto left = static_cast<float>(state.deadline_ns_ - now_ns());
  const size_t last = parameters_.rest_ns.size() - 1;
  for (auto i = static_cast<size_t>(level * static_cast<float>(last)); i <= last; ++i) {
    if (parameters_.rest_ns[i] * state.slowdown_ > left) continue;
    if (site_spec_.is_branch && i < last) return state.start_level_;
    return std::max(level, static_cast<float>(i) / static_cast<float>(last));
  }
  return 1.0f;
}

// Scratch: level, count, then the groups (int32), then scores and the hidden vector.
void GateOp::compute(const RunView& run, int64_t sample, int64_t /*part*/, float* scratch) const {
  const GateState& state = *run.gates;
  auto* count = reinterpret_cast<int32_t*>(scratch + 1);
  auto* groups = reinterpret_cast<int32_t*>(scratch + 16);
  const int64_t num_groups = site_spec_.num_groups();
  if (state.given_) return;
  const float level = guarded_level(state);
  scratch[0] = level;
  if (level == 0.0f) {
    for (int64_t g = 0; g < num_groups; ++g) groups[g] = static_cast<int32_t>(g);
    *count = static_cast<int32_t>(num_groups);
    return;
  }
  float* scores = scratch + 16 + num_groups;
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
  const auto count = *reinterpret_cast<const int32_t*>(scratch + 1);
  state.publish(site_, sample, reinterpret_cast<const int32_t*>(scratch + 16), count);
  if (scratch[0] > state.level()) {
    state.level_.store(scratch[0], std::memory_order_relaxed);
    state.guard_actions_.fetch_add(1, std::memory_order_relaxed);
  }
}

}  // namespace dynprune
