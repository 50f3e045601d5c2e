// Gates: from the pooled input of a site to the list of what runs there, and the state of one run that they read and write.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/aligned_buffer.h"
#include "plan/op.h"

namespace dynprune {

struct SiteSpec {
  bool is_branch = false;
  int64_t num_channels = 0;
  int64_t group_size = 1;

  int64_t num_groups() const { return num_channels / group_size; }
};

// A gate as calibration or training left it: score = up * (down * pooled) + bias, a group runs when its score > the curve at the level.
// Of a gate step with ints "by_magnitude" the score of a channel is the magnitude of its input, and the matrices do not count.
struct GateParameters {
  int64_t in_features = 0;
  int64_t rank = 0;
  std::vector<float> down;   // [rank][in_features]
  std::vector<float> up;     // [groups][rank]
  std::vector<float> bias;   // [groups]
  std::vector<float> curve;  // threshold at level i / (size - 1), not decreasing
  // Predicted time in nanoseconds from this gate to the end of the model at those same levels; empty: the deadline is not watched.
  std::vector<float> rest_ns;
};

// The gates' side of one run: level and deadline on the way in, active lists on the way out.
class GateState {
 public:
  GateState(const std::vector<SiteSpec>& sites, int64_t batch);

  // Starts an inference whose gates decide at `level`. `deadline_ns` is a time of now_ns(), or 0; `slowdown` multiplies predictions.
  void begin(float level, int64_t deadline_ns, float slowdown);
  // Starts an inference whose gates do not decide: sites run whole but for the lists given next (ascending groups, not checked here).
  void begin_given();
  void give(int64_t site, int64_t sample, const int32_t* groups, int64_t count);

  // Whether gates, and what only they read, run at this step: not with given lists, and at level 0 not until a gate that looks at the
  // clock has found the deadline in danger; then from the next step on. So the answer for a step is fixed before the run comes to it.
  bool gates_run(int64_t step) const { return always_run_ || step >= gates_from_.load(std::memory_order_relaxed); }
  // Whether the gates that look at the clock run in any case.
  bool watched() const { return deadline_ns_ != 0; }
  // Makes the gates run even where they have nothing to decide, so that they can be timed.
  void set_always_run(bool on) { always_run_ = on; }

  // Whether this inference runs every list whole, and no gate.
  bool all_whole() const;

  const ActiveList* const* lists() const { return rows_.data(); }
  const ActiveList& list(int64_t site, int64_t sample) const { return rows_[site][sample]; }
  float level() const { return level_.load(std::memory_order_relaxed); }
  float start_level() const { return start_level_; }
  int64_t guard_actions() const { return guard_actions_.load(std::memory_order_relaxed); }

 private:
  friend class GateOp;
  void publish(int64_t site, int64_t sample, const int32_t* groups, int64_t count);
  void publish_all();

  const std::vector<SiteSpec>& sites_;
  int64_t batch_;
  std::vector<ActiveList> flat_;            // [site][sample]
  std::vector<const ActiveList*> rows_;     // [site] -> flat_
  AlignedBuffer<int32_t> index_;            // storage of all lists; always holds valid channels
  AlignedBuffer<float> inactive_;
  bool given_ = false;
  bool always_run_ = false;
  bool all_whole_ = true;  // every list has all channels, unless gates run
  std::atomic<float> level_{0.0f};
  float start_level_ = 0.0f;
  int64_t deadline_ns_ = 0;
  float slowdown_ = 1.0f;
  std::atomic<int64_t> guard_actions_{0};
  std::atomic<int64_t> gates_from_{0};
  std::atomic<float> needed_level_{0.0f};  // for the deadline, by the last look at the clock
};

class GateOp final : public Op {
 public:
  // `number` is the step's, `first_input` that of the first step that runs for this gate alone, or its own where there is none.
  GateOp(StepSpec spec, const KernelTable& kernels, const std::vector<SiteSpec>& sites, int64_t number, int64_t first_input);
  void set_parameters(GateParameters parameters);
  int64_t site() const { return site_; }
  // Whether it has predictions to compare the clock with, and the time in nanoseconds from here to the end of the model at level 0.
  bool is_watching() const { return !parameters_.rest_ns.empty(); }
  float rest_ns() const { return parameters_.rest_ns[0]; }
  // Whether this gate looks at the clock; the others go by what the one before them found.
  void set_looks(bool looks) { looks_ = looks; }
  bool looks() const { return looks_; }

  int64_t chunks_per_sample() const override { return 1; }
  // Of a gate that runs only to look at the clock: whether it would find nothing to do.
  bool is_idle(const RunView& run) const override;
  int64_t scratch_floats() const override;
  void compute(const RunView& run, int64_t sample, int64_t part, float* scratch) const override;
  void commit(const RunView& run, int64_t sample, int64_t part, float* scratch) const override;

 private:
  float needed_level(const GateState& state) const;
  float threshold(float level) const;

  const KernelTable& kernels_;
  int64_t site_;
  SiteSpec site_spec_;
  bool by_magnitude_;
  int64_t number_;
  int64_t first_input_;
  bool looks_ = false;
  GateParameters parameters_;
};

}  // namespace dynprune
