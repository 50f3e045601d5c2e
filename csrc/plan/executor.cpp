#include "plan/executor.h"

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>

#include "base/denormals.h"
#include "base/spin.h"
#include "base/thread_sanitizer.h"

namespace dynprune {
namespace {

// A chunk's state is its epoch (one per run) in the high bits and below: 1..5 claimed that many times, committing, done. Any older
// epoch means free.
constexpr uint64_t kClaimBits = 3;
constexpr uint64_t kMaxClaims = 5;
constexpr uint64_t kCommitting = 6;
constexpr uint64_t kDone = 7;
constexpr uint64_t kStepBits = 24;
constexpr uint64_t kStepMask = (uint64_t{1} << kStepBits) - 1;

// How long a thread with nothing left to claim waits before it computes others' chunks again, at least, and in its own chunks' times.
constexpr int64_t kPatienceNs = 60'000;
constexpr int64_t kPatienceChunks = 3;

// Private scratch of a thread, grown to the largest plan it has worked on.
float* thread_scratch(size_t floats) {
  thread_local AlignedBuffer<float> scratch;
  if (scratch.size() < floats) scratch = AlignedBuffer<float>(floats);
  return scratch.data();
}

class Inside {
 public:
  explicit Inside(std::atomic<int64_t>& count) : count_(count) { count_.fetch_add(1, std::memory_order_acq_rel); }
  ~Inside() { count_.fetch_sub(1, std::memory_order_acq_rel); }

 private:
  std::atomic<int64_t>& count_;
};

void run_chunk(const Op& op, const RunView& view, bool runs, int64_t sample, int64_t part, float* scratch) {
  if (!runs) {
    op.skip(view, sample, part);
    return;
  }
  op.compute(view, sample, part, scratch);
  op.commit(view, sample, part, scratch);
}

}  // namespace

Workspace::Workspace(std::shared_ptr<const Plan> plan, int64_t batch, std::shared_ptr<void> bound_to)
    : bound_to_(std::move(bound_to)),
      plan_(std::move(plan)),
      batch_(batch),
      arena_(plan_->arena_size() * batch + kReadPastEnd),
      slots_(plan_->buffers().size()),
      gates_(plan_->sites(), batch),
      done_(new Done[plan_->num_steps()]) {
  for (size_t b = 0; b < slots_.size(); ++b) {
    const BufferSpec& buffer = plan_->buffers()[b];
    if (buffer.is_arena) slots_[b] = {arena_.data() + buffer.offset, plan_->arena_size()};
  }
  view_ = {slots_.data(), gates_.lists(), &gates_};
  int64_t chunks = 0;
  for (int64_t step = 0; step < plan_->num_steps(); ++step) {
    first_chunk_.push_back(chunks);
    if (plan_->op(step) != nullptr) chunks += plan_->op(step)->chunks_per_sample() * batch;
  }
  state_.reset(new std::atomic<uint64_t>[chunks]());
  step_ns_.resize(plan_->num_steps());
}

void Workspace::bind(int64_t buffer, float* base, int64_t sample_stride) { slots_[buffer] = {base, sample_stride}; }

bool Workspace::all_bound() const {
  return std::all_of(slots_.begin(), slots_.end(), [](const RunView::Slot& slot) { return slot.base != nullptr; });
}

bool Workspace::runs_somewhere(int64_t step) const {
  for (int64_t sample = 0; sample < batch_; ++sample) {
    if (plan_->runs(step, gates_, sample)) return true;
  }
  return false;
}

void Workspace::run(int64_t first, int64_t last, int num_threads) {
  // Here, where a lack of memory can still be reported: work() finds it made.
  float* scratch = thread_scratch(plan_->scratch_floats());
  if (profiling_) {
    std::fill(step_ns_.begin() + first, step_ns_.begin() + last, 0);
    step_began_ns_.store(now_ns(), std::memory_order_relaxed);
  }
  const FlushDenormals flush;
  if (num_threads == 1) return run_alone(first, last, scratch);
  // A helper that joined the previous run may only now come to look: it must not take the old step for one of this run.
  const uint64_t epoch = (cursor_.load(std::memory_order_relaxed) >> kStepBits) + 1;
  cursor_.store(epoch << kStepBits | kStepMask, std::memory_order_release);
  last_.store(last, std::memory_order_release);
  num_threads_.store(num_threads, std::memory_order_relaxed);
  for (int64_t step = first; step < last; ++step) done_[step].count.store(0, std::memory_order_relaxed);
  cursor_.store(epoch << kStepBits | static_cast<uint64_t>(first), std::memory_order_release);
  ThreadPool::instance().run(shared_from_this(), num_threads);
  while (profiling_ && !idle()) pause();  // who moved the run on writes the step's time after that
}

void Workspace::work(int slot) {
  const Inside inside(inside_);
  float* scratch = nullptr;
  try {
    scratch = thread_scratch(plan_->scratch_floats());
  } catch (const std::bad_alloc&) {
    return;  // a helper without memory; the others do its part
  }
  uint64_t cursor = cursor_.load(std::memory_order_acquire);
  const uint64_t epoch = cursor >> kStepBits;
  const int64_t last = last_.load(std::memory_order_acquire);
  cursor = cursor_.load(std::memory_order_acquire);  // still this epoch: then `last` is this run's
  const int num_threads = num_threads_.load(std::memory_order_relaxed);
  for (;; cursor = cursor_.load(std::memory_order_acquire)) {
    const auto step = static_cast<int64_t>(cursor & kStepMask);
    if (cursor >> kStepBits != epoch || step >= last) return;
    const Op& op = *plan_->op(step);
    const int64_t chunks = op.chunks_per_sample() * batch_;
    if (passes(step)) {
      advance(cursor);
      continue;
    }
    // Each thread begins in a part of its own, so that in the next step it mostly reads what it wrote in this one.
    const int64_t begin = chunks * std::min(slot, num_threads - 1) / num_threads;
    const int64_t began_ns = now_ns();
    int64_t mine = 0;
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t chunk = begin + i < chunks ? begin + i : begin + i - chunks;
      const uint64_t state = state_[first_chunk_[step] + chunk].load(std::memory_order_acquire);
      if (state >> kClaimBits >= epoch) continue;
      mine += try_chunk(op, step, chunk, state, epoch, scratch) ? 1 : 0;
    }
    if (cursor_.load(std::memory_order_acquire) != cursor) continue;
    const int64_t claimed_ns = now_ns();
    const int64_t patience = std::max(kPatienceNs, mine == 0 ? 0 : kPatienceChunks * (claimed_ns - began_ns) / mine);
    for (int64_t since = claimed_ns; cursor_.load(std::memory_order_acquire) == cursor;) {
      if (now_ns() - since > patience && overtakes()) {
        overtake(op, step, chunks, epoch, scratch);
        since = now_ns();
      }
      pause();
    }
  }
}

void Workspace::run_alone(int64_t first, int64_t last, float* scratch) {
  for (int64_t step = first; step < last; ++step) {
    const Op& op = *plan_->op(step);
    const int64_t parts = op.chunks_per_sample();
    for (int64_t sample = 0; sample < batch_; ++sample) {
      const bool runs = plan_->runs(step, gates_, sample);
      if (!runs && !op.hands_over()) continue;
      for (int64_t part = 0; part < parts; ++part) run_chunk(op, view_, runs, sample, part, scratch);
    }
    if (profiling_) {
      const int64_t now = now_ns();
      step_ns_[step] = now - step_began_ns_.exchange(now, std::memory_order_relaxed);
    }
  }
}

// Claims, computes and commits one chunk, if nobody was faster.
bool Workspace::try_chunk(const Op& op, int64_t step, int64_t chunk, uint64_t expected, uint64_t epoch, float* scratch) {
  std::atomic<uint64_t>& state = state_[first_chunk_[step] + chunk];
  const bool is_free = expected >> kClaimBits < epoch;
  uint64_t claimed = is_free ? (epoch << kClaimBits | 1) : expected + 1;
  if (!state.compare_exchange_strong(expected, claimed, std::memory_order_acq_rel)) return false;
  const int64_t parts = op.chunks_per_sample();
  const int64_t sample = chunk / parts;
  const int64_t part = chunk % parts;
  const bool runs = plan_->runs(step, gates_, sample);
  if (runs) {
    const LateReads late;
    op.compute(view_, sample, part, scratch);
  }
  // Another thread may have claimed the chunk meanwhile without having finished it: then this result is as good.
  for (;;) {
    if (claimed >> kClaimBits != epoch || (claimed & kDone) >= kCommitting) return true;
    if (state.compare_exchange_strong(claimed, epoch << kClaimBits | kCommitting, std::memory_order_acq_rel)) break;
  }
  if (runs) {
    op.commit(view_, sample, part, scratch);
  } else {
    op.skip(view_, sample, part);
  }
  state.store(epoch << kClaimBits | kDone, std::memory_order_release);
  const int64_t chunks = parts * batch_;
  if (done_[step].count.fetch_add(1, std::memory_order_acq_rel) + 1 == chunks) advance(epoch << kStepBits | static_cast<uint64_t>(step));
  return true;
}

// Whether no thread has anything to do at a step, whichever looks and whenever.
bool Workspace::passes(int64_t step) const {
  const Op& op = *plan_->op(step);
  return op.chunks_per_sample() == 0 || (!op.hands_over() && !runs_somewhere(step));
}

// Moves the run to the next step at which there is something to do: threads need not meet at the others. Whether an operation is idle may
// change with the time, so that is asked here only: once the run has come to a step, all threads take it as one that runs.
void Workspace::advance(uint64_t cursor) {
  if (!profiling_) {
    const int64_t last = last_.load(std::memory_order_relaxed);
    uint64_t next = cursor + 1;
    for (auto step = static_cast<int64_t>(next & kStepMask); step < last && (passes(step) || plan_->op(step)->is_idle(view_)); ++step) ++next;
    cursor_.compare_exchange_strong(cursor, next, std::memory_order_acq_rel);
    return;
  }
  const int64_t now = now_ns();
  if (!cursor_.compare_exchange_strong(cursor, cursor + 1, std::memory_order_acq_rel)) return;
  step_ns_[cursor & kStepMask] = now - step_began_ns_.exchange(now, std::memory_order_relaxed);
}

void Workspace::overtake(const Op& op, int64_t step, int64_t chunks, uint64_t epoch, float* scratch) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const uint64_t state = state_[first_chunk_[step] + chunk].load(std::memory_order_acquire);
    if (state >> kClaimBits != epoch || (state & kDone) >= kMaxClaims) continue;
    overtaken_.fetch_add(1, std::memory_order_relaxed);
    try_chunk(op, step, chunk, state, epoch, scratch);
  }
}

}  // namespace dynprune
