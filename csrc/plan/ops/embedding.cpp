// Rows of a table by number: out[f][t] = table[index[t]][f]. The indices are an input of the model, int64 where the plan otherwise holds
// f32: each takes two elements of its buffer. One that lies outside the table gives NaN, in every feature, as a value that no result hides.
#include <algorithm>
#include <cstring>
#include <limits>

#include "plan/ops/block_op.h"
#include "plan/ops/row_factories.h"
#include "plan/ops/spec_reader.h"

namespace dynprune {
namespace {

class EmbeddingOp final : public BlockOp {
 public:
  EmbeddingOp(StepSpec step, const KernelTable& kernels, int num_threads) : BlockOp(std::move(step), kernels) {
    const SpecReader reader(spec_);
    entries_ = reader.integer("entries");
    const Rows& out = spec_.output;
    const Rows& in = reader.input(0);
    reader.check(entries_ >= 1, "entries must be >= 1, got " + std::to_string(entries_));
    reader.check(spec_.in_site < 0 && spec_.out_site < 0, "must not be gated");
    reader.check_rows("the input", in, 1, 2 * out.positions);
    table_ = reader.constant("table", {entries_, out.rows});
    BlockLimits limits;
    limits.unit = 1;
    limits.split_rows = false;
    limits.total_ns = 1.0 * static_cast<double>(out.rows * out.positions);
    limits.direct = Direct::kCheap;
    cut(limits, -1, num_threads);
  }

 protected:
  void compute_block(const RunView& run, int64_t sample, const Block& block, float* out, float*) const override {
    const float* indices = run.row(spec_.inputs[0], sample, 0);
    for (int64_t t = block.positions.begin; t < block.positions.end; ++t) {
      int64_t index;
      std::memcpy(&index, indices + 2 * t, sizeof index);
      const bool known = index >= 0 && index < entries_;
      const float* entry = table_ + (known ? index : 0) * spec_.output.rows;
      float* column = out + (t - block.positions.begin);
      for (int64_t f = block.rows.begin; f < block.rows.end; ++f) {
        column[(f - block.rows.begin) * block.stride] = known ? entry[f] : std::numeric_limits<float>::quiet_NaN();
      }
    }
  }

 private:
  int64_t entries_;
  const float* table_;
};

}  // namespace

std::unique_ptr<Op> make_embedding(StepSpec spec, const KernelTable& kernels, int num_threads) {
  return std::make_unique<EmbeddingOp>(std::move(spec), kernels, num_threads);
}

}  // namespace dynprune
