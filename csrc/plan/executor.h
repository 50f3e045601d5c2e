// Runs a plan in a workspace, leaderless: no thread that the system puts aside can hold up the others.
//
// Every step is a set of chunks. Any thread claims a chunk, computes it into its own scratch and commits it by compare-and-swap.
// When all are claimed but some are late, any thread computes those again; whoever is first commits, the others' scratch is dropped.
// Whoever commits the last chunk of a step moves the run to the next one. Only a thread put aside in the short commit is waited for.
//
// A thread that was overtaken may still read the workspace when the run is over. So a workspace is not used again, and what the caller
// bound to it is not let go, while any thread is inside (`idle()`). Within a run a late reader may see a later step's data: its
// result is dropped, and every index it can read is valid, so it only wastes its own time. These reads, all in Op::compute of a chunk
// that was computed twice, race by design; nothing else does (`make sanitize-threads`).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/thread_pool.h"
#include "plan/plan.h"

namespace dynprune {

class Workspace final : public Job, public std::enable_shared_from_this<Workspace> {
 public:
  // Memory and bookkeeping for inferences of exactly `batch` samples. Throws std::bad_alloc where the arena does not fit.
  // `bound_to` lives until no thread is inside any more: what the caller's buffers belong to.
  Workspace(std::shared_ptr<const Plan> plan, int64_t batch, std::shared_ptr<void> bound_to = nullptr);

  int64_t batch() const { return batch_; }
  const Plan& plan() const { return *plan_; }
  GateState& gates() { return gates_; }
  float* arena() const { return arena_.data(); }

  // Tells where a buffer of the caller lies: sample i at base + i * sample_stride (elements).
  void bind(int64_t buffer, float* base, int64_t sample_stride);

  // Whether every buffer of the caller has been bound.
  bool all_bound() const;

  // Runs the steps [first, last), none of which is Python's, on up to `num_threads` threads; returns when they are done.
  void run(int64_t first, int64_t last, int num_threads);

  // True when no thread is inside, late ones included.
  bool idle() const { return inside_.load(std::memory_order_acquire) == 0; }

  // Times of the steps of the last run in nanoseconds, where `set_profiling(true)` was called; 0 for steps not run.
  // Gates, and what only they read, run then even where they decide nothing, and a run waits for late threads.
  void set_profiling(bool on) {
    profiling_ = on;
    gates_.set_always_run(on);
  }
  const std::vector<int64_t>& step_ns() const { return step_ns_; }
  // How many chunks were computed again because their owner was late, since the workspace was made.
  int64_t overtaken() const { return overtaken_.load(std::memory_order_relaxed); }

  void work(int slot) override;

 private:
  struct alignas(64) Done {
    std::atomic<int64_t> count{0};
  };
  bool runs_somewhere(int64_t step) const;
  void run_alone(int64_t first, int64_t last, float* scratch);
  bool try_chunk(const Op& op, int64_t step, int64_t chunk, uint64_t expected, uint64_t epoch, float* scratch);
  bool passes(int64_t step) const;
  void advance(uint64_t cursor);
  void overtake(const Op& op, int64_t step, int64_t chunks, uint64_t epoch, float* scratch);

  std::shared_ptr<void> bound_to_;
  std::shared_ptr<const Plan> plan_;
  int64_t batch_;
  AlignedBuffer<float> arena_;
  std::vector<RunView::Slot> slots_;
  GateState gates_;
  RunView view_;
  std::vector<int64_t> first_chunk_;               // of each step in state_
  std::unique_ptr<std::atomic<uint64_t>[]> state_;  // epoch and claims of each chunk
  std::unique_ptr<Done[]> done_;                    // of each step
  alignas(64) std::atomic<uint64_t> cursor_{0};     // epoch and current step
  std::atomic<int64_t> inside_{0};
  std::atomic<int64_t> overtaken_{0};
  std::atomic<int64_t> last_{0};
  std::atomic<int> num_threads_{1};
  bool profiling_ = false;
  std::atomic<int64_t> step_began_ns_{0};
  std::vector<int64_t> step_ns_;
};

}  // namespace dynprune
