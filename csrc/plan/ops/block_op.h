// What the operations on rows share: the output is cut into blocks of rows by positions, a chunk is one block. It is computed into
// scratch and committed by copying; where computing costs no more than that copy, or one thread runs the plan, commit does it all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "plan/op.h"

namespace dynprune {

// How many chunks a step of `total_ns` on one thread should have: about 25 microseconds each, and two for each thread if they last
// four microseconds or more.
inline int64_t wanted_chunks(double total_ns, int num_threads) {
  const auto by_time = static_cast<int64_t>(total_ns / 25e3);
  const auto by_threads = num_threads > 1 ? std::min<int64_t>(2 * num_threads, static_cast<int64_t>(total_ns / 4e3)) : 1;
  return std::max<int64_t>({1, by_time, by_threads});
}

// Results of a chunk lie in scratch until they are committed: this many floats keep them in the first two levels of cache.
constexpr int64_t kMaxBlockFloats = 16 * 1024;

// When a block may be computed straight into the output, inside commit. `kCheap` is for what is bound by reading and writing anyway: then
// a copy from scratch would hold the commit up for as long.
enum class Direct { kNever, kAlone, kCheap };

// How an output may be cut.
struct BlockLimits {
  bool split_rows = true;
  int64_t unit = 16;                     // positions are cut at multiples of it
  int64_t row_multiple = 1;              // a row takes this multiple of floats in scratch (whole vectors for some kernels)
  int64_t max_floats = kMaxBlockFloats;  // of one block, where the limits above allow it
  double total_ns = 0.0;                 // expected time of one sample on one thread
  Direct direct = Direct::kNever;
};

class BlockOp : public Op {
 public:
  int64_t chunks_per_sample() const final { return row_parts_ * position_parts_; }
  int64_t scratch_floats() const final { return extra_offset_ + extra_floats_; }

  void compute(const RunView& run, int64_t sample, int64_t part, float* scratch) const final {
    if (direct_) return;
    const Block block = block_of(run, sample, part);
    if (block.rows.end > block.rows.begin) compute_block(run, sample, block, scratch, scratch + extra_offset_);
  }

  void commit(const RunView& run, int64_t sample, int64_t part, float* scratch) const final {
    Block block = block_of(run, sample, part);
    const int64_t rows = block.rows.end - block.rows.begin;
    if (rows <= 0) return;
    float* out = run.row(spec_.output, sample, block.rows.begin) + block.positions.begin;
    if (direct_) {
      block.stride = spec_.output.row_stride;
      compute_block(run, sample, block, out, scratch + extra_offset_);
      return;
    }
    const int64_t length = block.positions.end - block.positions.begin;
    if (block.stride == length && spec_.output.row_stride == length) {
      std::memcpy(out, scratch, rows * length * sizeof(float));
      return;
    }
    for (int64_t i = 0; i < rows; ++i) std::memcpy(out + i * spec_.output.row_stride, scratch + i * block.stride, length * sizeof(float));
  }

 protected:
  struct Block {
    Range rows;            // among the rows that run
    Range positions;
    int64_t stride;        // of the block's rows where they are computed
    const int32_t* index;  // true channels of all rows that run; nullptr: row i is channel i
  };

  BlockOp(StepSpec spec, const KernelTable& kernels) : Op(std::move(spec)), kernels_(kernels) {}

  // `site` is the one that the output rows follow, or -1. To be called once, at the end of a constructor.
  void cut(const BlockLimits& limits, int32_t site, int num_threads) {
    site_ = site;
    unit_ = limits.unit;
    row_multiple_ = limits.row_multiple;
    const Rows& out = spec_.output;
    const int64_t units = (out.positions + unit_ - 1) / unit_;
    const int64_t max_row_parts = limits.split_rows ? std::max<int64_t>(1, out.rows) : 1;
    const int64_t wanted = wanted_chunks(limits.total_ns, num_threads);
    const int64_t undivided_rows = limits.split_rows ? 1 : out.rows;
    const int64_t fitting_units = std::max<int64_t>(1, limits.max_floats / std::max<int64_t>(1, undivided_rows * unit_));
    position_parts_ = std::max((units + fitting_units - 1) / fitting_units, (wanted + max_row_parts - 1) / max_row_parts);
    position_parts_ = std::clamp<int64_t>(position_parts_, 1, std::max<int64_t>(1, units));
    const int64_t length = whole((units + position_parts_ - 1) / position_parts_ * unit_);
    const int64_t fitting_rows = std::max<int64_t>(1, limits.max_floats / length);
    row_parts_ = std::max((out.rows + fitting_rows - 1) / fitting_rows, (wanted + position_parts_ - 1) / position_parts_);
    row_parts_ = std::clamp<int64_t>(row_parts_, 1, max_row_parts);
    direct_ = limits.direct == Direct::kCheap || (limits.direct == Direct::kAlone && num_threads == 1);
    extra_offset_ = direct_ ? 0 : ((out.rows + row_parts_ - 1) / row_parts_ * length + 15) / 16 * 16;
  }

  // The most positions that a block has.
  int64_t max_block_positions() const {
    const int64_t units = (spec_.output.positions + unit_ - 1) / unit_;
    return (units + position_parts_ - 1) / position_parts_ * unit_;
  }
  // Further scratch of a chunk, behind the block.
  void reserve_extra(int64_t floats) { extra_floats_ = floats; }

  Block block_of(const RunView& run, int64_t sample, int64_t part) const {
    Block block;
    const int64_t count = std::min(run.num_active(site_, sample, spec_.output.rows), spec_.output.rows);
    block.rows = part_of(count, part / position_parts_, row_parts_);
    const int64_t units = (spec_.output.positions + unit_ - 1) / unit_;
    const Range range = part_of(units, part % position_parts_, position_parts_);
    block.positions = {range.begin * unit_, std::min(range.end * unit_, spec_.output.positions)};
    block.stride = whole(block.positions.end - block.positions.begin);
    block.index = site_ < 0 ? nullptr : run.active(site_, sample).index;
    return block;
  }

  // Fills `out`, [rows of the block][block.stride]; `extra` is the reserved scratch.
  virtual void compute_block(const RunView& run, int64_t sample, const Block& block, float* out, float* extra) const = 0;

  const KernelTable& kernels_;

 private:
  int64_t whole(int64_t length) const { return (length + row_multiple_ - 1) / row_multiple_ * row_multiple_; }

  int32_t site_ = -1;
  int64_t unit_ = 1;
  int64_t row_multiple_ = 1;
  int64_t row_parts_ = 1;
  int64_t position_parts_ = 1;
  bool direct_ = false;
  int64_t extra_offset_ = 0;
  int64_t extra_floats_ = 0;
};

// A clamp is part of the kernels that take `low` and `high`; any other activation is a second pass over the block.
struct FusedClamp {
  explicit FusedClamp(const ActivationSpec& activation) : rest(activation) {
    if (activation.kind == Activation::kClamp) {
      low = activation.low;
      high = activation.high;
      rest = ActivationSpec();
    }
  }

  bool is_whole() const { return rest.kind == Activation::kNone; }

  void apply_rest(const KernelTable& kernels, int64_t rows, int64_t length, float* values, int64_t stride) const {
    if (!is_whole()) kernels.epilogue({rows, length, values, stride, nullptr, nullptr, 0, values, stride, rest});
  }

  float low = -std::numeric_limits<float>::infinity();
  float high = std::numeric_limits<float>::infinity();
  ActivationSpec rest;
};

}  // namespace dynprune
