// The ways in which a convolution multiplies a chunk: in f32, in bfloat16, or the nonzeros of a sparse weight.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "plan/op.h"
#include "plan/ops/conv_layout.h"

namespace dynprune {

// A chunk to multiply.
struct ConvTask {
  const RunView& run;
  int64_t sample;
  ConvChunk chunk;
  const int32_t* in_index;  // of the active inputs; nullptr: all
  int64_t in_count;
  float* sums;         // of the chunk's rows, `chunk.width` apart
  const float* means;  // [in_channels], with `at_means`
  float* at_means;     // where the sums go that the inputs give when each is at its mean, one for each row; nullptr for none
  float* scratch;      // the product's own
};

class ConvProduct {
 public:
  virtual ~ConvProduct() = default;
  virtual int64_t scratch_floats() const = 0;
  virtual void multiply(const ConvTask& task) const = 0;
  // Whether `at_means` may be asked for, of a layer of one tap and one group.
  virtual bool takes_means() const { return false; }
  // A weight or a mean as it is multiplied.
  virtual float kept(float value) const { return value; }

 protected:
  explicit ConvProduct(const ConvLayout& layout) : layout_(layout) {}

  // Calls part(rows, inputs, group) for the rows of the chunk that belong to a group, and the active inputs that they read, in turn.
  template <class Part>
  void in_groups(const ConvTask& task, const Part& part) const {
    const ConvChunk& chunk = task.chunk;
    for (int64_t row = chunk.rows.begin; row < chunk.rows.end;) {
      const int64_t group = chunk.channel(row) / layout_.shape.group_outputs();
      const int64_t rows_end = layout_.chunks.end_of_group(chunk, row, group);
      part(Range{row, rows_end}, layout_.chunks.inputs_of_group(task.in_index, task.in_count, group), group);
      row = rows_end;
    }
  }

  // Makes a product one with a panel of a single position: a tail, or a vector where vectors have one lane.
  template <class Product>
  void as_one_position(Product& product, float* out) const {
    product.tail = std::min<int64_t>(1, layout_.kernels.gemm_max_tail);
    product.width = 1 - product.tail;
    product.panel_stride = product.out_stride = 1;
    product.out = out;
  }

  // The means of the active inputs `k`, in their order.
  void gather_means(const ConvTask& task, Range k, float* means) const {
    const auto limit = static_cast<int32_t>(layout_.shape.in_channels - 1);
    for (int64_t i = k.begin; i < k.end; ++i) means[i - k.begin] = task.means[std::clamp<int32_t>(task.in_index[i], 0, limit)];
  }

  PackedGroups packed_groups() const { return {layout_.shape.group_outputs()}; }

  const ConvLayout& layout_;
};

// Of `weight`, [out_channels][group_inputs * taps]; the layout and the weight must live as long.
// `packed`: keep a copy of the weight in the order in which a product of many rows reads it.
std::unique_ptr<ConvProduct> make_dense_product(const ConvLayout& layout, const float* weight, bool packed);
std::unique_ptr<ConvProduct> make_bf16_product(const ConvLayout& layout, const float* weight);
// `gated`: inputs may come in lists.
std::unique_ptr<ConvProduct> make_sparse_product(const ConvLayout& layout, const float* weight, bool gated);

}  // namespace dynprune
