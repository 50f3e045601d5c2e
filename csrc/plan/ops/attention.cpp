// Scaled dot-product attention over planar heads: out = v * softmax(scale * k' q + mask), all of one sample.
//
// q, k, v and the output are `heads` blocks of rows (features) by positions (tokens). A chunk is one head by one tile of queries; lanes
// are queries, so the scores [keys][queries] need no transpose: k is the "weight" whose rows are keys, and softmax runs down the rows.
//
// With `outer` > 1 there are several such groups of heads after each other (windows), each with its own keys.
//
// A site may own q and the output by whole heads, and with `gated_keys` k and v too; they then hold the heads that run, compact. Several
// heads may share the keys and values of one (`key_heads`).
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
    key_heads_ = reader.integer("key_heads", heads_);
    outer_ = reader.integer("outer", 1);
    gated_keys_ = reader.integer("gated_keys", 0) != 0;
    causal_ = reader.integer("causal", 0) != 0;
    const auto scale = spec_.floats.find("scale");
    reader.check(scale != spec_.floats.end() && scale->second.size() == 1, "needs floats 'scale', one value");
    scale_ = scale->second[0];
    reader.check(spec_.in_site == spec_.out_site, "in_site must equal out_site");
    const bool positive = outer_ >= 1 && heads_ >= 1 && key_heads_ >= 1 && outer_ <= q_.rows && heads_ <= q_.rows && key_heads_ <= heads_;
    reader.check(positive && q_.rows % (outer_ * heads_) == 0 && v_.rows % (outer_ * key_heads_) == 0 && heads_ % key_heads_ == 0,
                 "outer times heads must divide the rows of q, outer times key_heads those of v, and key_heads the heads");
    features_ = q_.rows / (outer_ * heads_);
    out_features_ = v_.rows / (outer_ * key_heads_);
    reader.check(spec_.in_site < 0 || features_ == out_features_, "a gated one must have as many features in v as in q");
    reader.check(!gated_keys_ || (spec_.in_site >= 0 && key_heads_ == heads_), "gated keys need a site and keys of their own for each head");
    keys_ = k_.positions;
    reader.check_rows("k", k_, outer_ * key_heads_ * features_, keys_);
    reader.check_rows("v", v_, v_.rows, keys_);
    reader.check_rows("the output", spec_.output, outer_ * heads_ * out_features_, q_.positions);
    reader.check(keys_ >= 1 && features_ >= 1, "needs at least one key and one feature");
    read_mask(reader);
    tiles_ = make_tiles(q_.positions, kernels.lanes, kernels.gemm_max_vectors, 0);
    for (int64_t i = 0; i < features_; ++i) feature_offset_.push_back(static_cast<int32_t>(i * k_.row_stride));
    for (int64_t i = 0; i < keys_; ++i) key_offset_.push_back(static_cast<int32_t>(i));
  }

  int64_t chunks_per_sample() const override { return outer_ * heads_ * static_cast<int64_t>(tiles_.size()); }
  int64_t scratch_floats() const override { return (features_ + keys_ + out_features_) * max_width(); }

  void compute(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const int64_t group = part / static_cast<int64_t>(tiles_.size()) / heads_;
    const int64_t slot = part / static_cast<int64_t>(tiles_.size()) % heads_;
    if (slot >= heads_that_run(run, sample)) return;
    const int64_t head = head_at(run, sample, slot);
    const int64_t place = group * heads_ + slot;
    const int64_t key_head = group * key_heads_ + (gated_keys_ ? slot : head * key_heads_ / heads_);
    const PositionTile& tile = tiles_[part % tiles_.size()];
    const int64_t width = tile.vectors * kernels_.lanes;
    float* out = scratch;
    float* queries = out + out_features_ * width;
    float* scores = queries + features_ * width;
    for (int64_t i = 0; i < features_; ++i) {
      const float* q = run.row(q_, sample, place * features_ + i) + tile.first;
      float* line = queries + i * width;
      for (int64_t p = 0; p < tile.count; ++p) line[p] = q[p] * scale_;
      std::fill(line + tile.count, line + width, 0.0f);
    }
    kernels_.gather_gemm({keys_, features_, width, 0, run.row(k_, sample, key_head * features_), 1, false, nullptr, 0,
                          feature_offset_.data(), queries, width, scores, width, false});
    add_mask(run, sample, group * heads_ + head, tile, width, scores);
    kernels_.softmax_columns({keys_, width, scores, width, nullptr, nullptr, 0.0f, scores, width});
    kernels_.gather_gemm({out_features_, keys_, width, 0, run.row(v_, sample, key_head * out_features_), v_.row_stride, false, nullptr, 0,
                          key_offset_.data(), scores, width, out, width, false});
  }

  void commit(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const int64_t place = part / static_cast<int64_t>(tiles_.size());
    if (place % heads_ >= heads_that_run(run, sample)) return;
    const PositionTile& tile = tiles_[part % tiles_.size()];
    for (int64_t i = 0; i < out_features_; ++i) {
      std::memcpy(run.row(spec_.output, sample, place * out_features_ + i) + tile.first, scratch + i * tile.vectors * kernels_.lanes,
                  tile.count * sizeof(float));
    }
  }

 private:
  int64_t max_width() const { return static_cast<int64_t>(kernels_.gemm_max_vectors) * kernels_.lanes; }

  int64_t heads_that_run(const RunView& run, int64_t sample) const {
    return std::min(heads_, spec_.in_site < 0 ? heads_ : run.active(spec_.in_site, sample).count / features_);
  }
  // The true number of the head whose rows stand in a slot of each group.
  int64_t head_at(const RunView& run, int64_t sample, int64_t slot) const {
    return spec_.in_site < 0 ? slot : std::min<int64_t>(heads_ - 1, run.active(spec_.in_site, sample).index[slot * features_] / features_);
  }

  // The mask is added to the scores: one for all heads or one for each, constant or an input.
  void read_mask(const SpecReader& reader) {
    const auto constant = spec_.constants.find("mask");
    int64_t mask_rows = 0;
    if (constant != spec_.constants.end()) {
      reader.check(spec_.inputs.size() == 3, "takes the mask as a constant or as an input, not both");
      mask_rows = constant->second.sizes.empty() ? 0 : constant->second.sizes[0];
      mask_ = reader.constant("mask", {mask_rows, q_.positions});
    } else if (spec_.inputs.size() == 4) {
      mask_input_ = &spec_.inputs[3];
      mask_rows = mask_input_->rows;
      reader.check_rows("the mask", *mask_input_, mask_rows, q_.positions);
    } else {
      return;
    }
    reader.check(mask_rows == keys_ || mask_rows == heads_ * keys_ || mask_rows == outer_ * heads_ * keys_,
                 "the mask must have a row for each key, or for each key of each head, got " + std::to_string(mask_rows));
    mask_heads_ = mask_rows / keys_;
  }

  // `head` counts through the groups.
  void add_mask(const RunView& run, int64_t sample, int64_t head, const PositionTile& tile, int64_t width, float* scores) const {
    if (mask_ != nullptr || mask_input_ != nullptr) {
      for (int64_t key = 0; key < keys_; ++key) {
        const int64_t row = head % mask_heads_ * keys_ + key;
        const float* mask = (mask_ != nullptr ? mask_ + row * q_.positions : run.row(*mask_input_, sample, row)) + tile.first;
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
  int64_t outer_, heads_, key_heads_, features_, out_features_, keys_;
  bool gated_keys_;
  bool causal_;
  float scale_;
  const float* mask_ = nullptr;
  const Rows* mask_input_ = nullptr;
  int64_t mask_heads_ = 1;  // how many heads have a mask of their own, over and over
  std::vector<PositionTile> tiles_;
  std::vector<int32_t> feature_offset_;
  std::vector<int32_t> key_offset_;
};

}  // namespace

std::unique_ptr<Op> make_attention(StepSpec spec, const KernelTable& kernels, int /*num_threads*/) {
  return std::make_unique<AttentionOp>(std::move(spec), kernels);
}

}  // namespace dynprune
