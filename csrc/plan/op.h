// What every operation of a plan is to the executor: a set of idempotent chunks, each computed into private scratch and committed once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/types.h"
#include "kernels.h"

namespace dynprune {

struct Constant {
  const float* data = nullptr;  // owned by whoever made the plan, alive as long as the plan
  std::vector<int64_t> sizes;
};

// One line of a plan as Python describes it. A factory (ops/*.cpp) checks it once and makes an Op; it throws std::invalid_argument
// with the step's name, what was expected and what came.
struct StepSpec {
  std::string op;
  std::string name;
  std::vector<Rows> inputs;
  Rows output;
  std::map<std::string, std::vector<int64_t>> ints;
  std::map<std::string, std::vector<float>> floats;
  std::map<std::string, Constant> constants;
  int32_t in_site = -1;           // the site whose active list the inputs' rows follow; -1: all rows
  int32_t out_site = -1;          // the same for the output
  std::vector<int32_t> branches;  // the step is skipped for a sample for which any of these branch sites is off
};

class GateState;

// Where a plan's buffers and active lists lie in one run. Cheap to copy; valid while the run's workspace lives.
struct RunView {
  struct Slot {
    float* base = nullptr;
    int64_t sample_stride = 0;  // elements
  };
  const Slot* slots = nullptr;               // one per buffer
  const ActiveList* const* lists = nullptr;  // lists[site][sample]
  GateState* gates = nullptr;                // what only gate steps look at

  float* row(const Rows& operand, int64_t sample, int64_t row) const {
    const Slot& slot = slots[operand.buffer];
    return slot.base + sample * slot.sample_stride + operand.offset + row * operand.row_stride;
  }
  const ActiveList& active(int32_t site, int64_t sample) const { return lists[site][sample]; }
  // How many rows run: those of the site's list, or all of `all_rows` where there is no site.
  int64_t num_active(int32_t site, int64_t sample, int64_t all_rows) const {
    return site < 0 ? all_rows : lists[site][sample].count;
  }
};

// The half-open range of `total` items that part `part` of `parts` covers; parts differ by one item at most.
struct Range {
  int64_t begin, end;
};
inline Range part_of(int64_t total, int64_t part, int64_t parts) {
  return {total * part / parts, total * (part + 1) / parts};
}

// Floats rounded up to whole cache lines, for what lies in scratch.
inline int64_t align(int64_t floats) { return (floats + 15) / 16 * 16; }
// In how many parts to cut the `count` of `total` rows that run, where all make `parts`: in parts as long as those, but at least `least`.
inline int64_t parts_of_some(int64_t count, int64_t total, int64_t parts, int64_t least) {
  return std::max(least, (count * parts + total - 1) / total);
}

class Op {
 public:
  explicit Op(StepSpec spec) : spec_(std::move(spec)) {}
  virtual ~Op() = default;
  Op(const Op&) = delete;
  Op& operator=(const Op&) = delete;

  const StepSpec& spec() const { return spec_; }

  // The number of chunks of one sample; fixed when the plan is built, whatever lists a run has. A chunk should take some 10-50
  // microseconds; a step shorter than that is one chunk. 0: a later step does this one's work.
  virtual int64_t chunks_per_sample() const = 0;
  // How much private scratch one chunk needs, in floats.
  virtual int64_t scratch_floats() const = 0;
  // Computes the chunk into `scratch` (64-byte aligned) and touches nothing else. May run on several threads at once for the same
  // chunk, and late, when the inputs already hold other data: it must never leave its memory or loop for ever, whatever it reads.
  virtual void compute(const RunView& run, int64_t sample, int64_t part, float* scratch) const = 0;
  // Writes what `compute` left in `scratch` to the output. Called once per chunk and run. Recomputes its ranges from the lists,
  // which are the same as in `compute` for the one call that counts.
  virtual void commit(const RunView& run, int64_t sample, int64_t part, float* scratch) const = 0;
  // Called instead of compute and commit when a branch of this step is off for the sample; an op that adds a residual hands it on.
  virtual void skip(const RunView& /*run*/, int64_t /*sample*/, int64_t /*part*/) const {}
  // Whether `skip` writes anything; a step that does not is passed over as a whole when no sample needs it.
  virtual bool hands_over() const { return false; }
  // Whether the step, though it runs, would change nothing at this moment. Asked of the next step by the one thread that ends a step.
  virtual bool is_idle(const RunView& /*run*/) const { return false; }

 protected:
  StepSpec spec_;
};

}  // namespace dynprune
