// Scaled dot-product attention over planar heads: out = v * softmax(scale * k' q + mask), all of one sample.
//
// q, k, v and the output are `heads` blocks of rows (features) by positions (tokens). A chunk is one head by one tile of queries; lanes
// are queries, so the scores [keys][queries] need no transpose: k is the "weight" whose rows are keys, and softmax runs down the rows.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "plan/ops/conv_tiling.h"
#include "plan/ops/row_factories.h"
#include "plan/ops/spec_reader.h"

namespace dynprune {
namespace {

class AttentionOp final : public Op {
 public:
  AttentionOp(StepSpec step, const KernelTable& kernels) : Op(std::move(step)), kernels_(kernels) {
    const SpecReader reader(spec_);
    q_ = reader.input(0);
    k_ = reader.input(1);
    v_ = reader.input(2);
    heads_ = reader.integer("heads");
    causal_ = reader.integer("causal", 0) != 0;
    const auto scale = spec_.floats.find("scale");
    reader.check(scale != spec_.floats.end() && scale->second.size() == 1, "needs floats 'scale', one value");
    scale_ = scale->second[0];
    reader.check(spec_.in_site < 0 && spec_.out_site < 0, "must not be gated");
    reader.check(heads_ >= 1 && q_.rows % heads_ == 0 && v_.rows % heads_ == 0, "heads must divide the rows of q and v");
    features_ = q_.rows / heads_;
    out_features_ = v_.rows / heads_;
    keys_ = k_.positions;
    reader.check_rows("k", k_, q_.rows, keys_);
    reader.check_rows("v", v_, v_.rows, keys_);
    reader.check_rows("the output", spec_.output, v_.rows, q_.positions);
    reader.check(keys_ >= 1 && features_ >= 1, "needs at least one key and one feature");
    mask_ = reader.constant("mask", {keys_, q_.positions}, false);
    tiles_ = make_tiles(q_.positions, kernels.lanes, kernels.gemm_max_vectors, 0);
    for (int64_t i = 0; i < features_; ++i) feature_offset_.push_back(static_cast<int32_t>(i * k_.row_stride));
    for (int64_t i = 0; i < keys_; ++i) key_offset_.push_back(static_cast<int32_t>(i));
  }

  int64_t chunks_per_sample() const override { return heads_ * static_cast<int64_t>(tiles_.size()); }
  int64_t scratch_floats() const override { return (features_ + keys_ + out_features_) * max_width(); }

  void compute(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const int64_t head = part / static_cast<int64_t>(tiles_.size());
    const PositionTile& tile = tiles_[part % tiles_.size()];
    const int64_t width = tile.vectors * kernels_.lanes;
    float* out = scratch;
    float* queries = out + out_features_ * width;
    float* scores = queries + features_ * width;
    for (int64_t i = 0; i < features_; ++i) {
      const float* q = run.row(q_, sample, head * features_ + i) + tile.first;
      float* line = queries + i * width;
      for (int64_t p = 0; p < tile.count; ++p) line[p] = q[p] * scale_;
      std::fill(line + tile.count, line + width, 0.0f);
    }
    kernels_.gather_gemm({keys_, features_, width, 0, run.row(k_, sample, head * features_), 1, false, nullptr, 0, feature_offset_.data(),
                          queries, width, scores, width, false});
    add_mask(tile, width, scores);
    kernels_.softmax_columns({keys_, width, scores, width, nullptr, nullptr, 0.0f, scores, width});
    kernels_.gather_gemm({out_features_, keys_, width, 0, run.row(v_, sample, head * out_features_), v_.row_stride, false, nullptr, 0,
                          key_offset_.data(), scores, width, out, width, false});
  }

  void commit(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const int64_t head = part / static_cast<int64_t>(tiles_.size());
    const PositionTile& tile = tiles_[part % tiles_.size()];
    for (int64_t i = 0; i < out_features_; ++i) {
      std::memcpy(run.row(spec_.output, sample, head * out_features_ + i) + tile.first, scratch + i * tile.vectors * kernels_.lanes,
                  tile.count * sizeof(float));
    }
  }

 private:
  int64_t max_width() const { return static_cast<int64_t>(kernels_.gemm_max_vectors) * kernels_.lanes; }

  void add_mask(const PositionTile& tile, int64_t width, float* scores) const {
    if (mask_ != nullptr) {
      for (int64_t key = 0; key < keys_; ++key) {
        const float* mask = mask_ + key * q_.positions + tile.first;
        for (int64_t p = 0; p < tile.count; ++p) scores[key * width + p] += mask[p];
      }
    }
    if (!causal_) return;
    for (int64_t key = tile.first + 1; key < keys_; ++key) {
      const int64_t hidden = std::min(key - tile.first, tile.count);  // queries before the key do not see it
      std::fill(scores + key * width, scores + key * width + hidden, -std::numeric_limits<float>::infinity());
    }
  }

  const KernelTable& kernels_;
  Rows q_, k_, v_;
  int64_t heads_, features_, out_features_, keys_;
  bool causal_;
  float scale_;
  const float* mask_;
  std::vector<PositionTile> tiles_;
  std::vector<int32_t> feature_offset_;
  std::vector<int32_t> key_offset_;
};

}  // namespace

std::unique_ptr<Op> make_attention(StepSpec spec, const KernelTable& kernels, int /*num_threads*/) {
  return std::make_unique<AttentionOp>(std::move(spec), kernels);
}

}  // namespace dynprune
