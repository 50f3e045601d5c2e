// Convolution (and, with one row of tokens as its plane, a linear layer) over any lists of input and output channels.
//
// A chunk is some rows by some tiles of positions. For each block of the reduction it packs the patches of a tile into a panel, then
// multiplies the chosen weight rows with it; the sums stay in scratch, and commit adds bias and residual, activates and stores.
//
// Skipped inputs at their means m: a layer of one tap starts from bias + W m and takes off sum over the active c of w_c m_c, a product
// with one more position, whose weights are at hand. One of several taps adds the columns of a matrix, which is smaller than its weights.
#include <algorithm>
#include <cstring>
#include <optional>

#include "base/aligned_buffer.h"
#include "plan/ops/bf16_weight.h"
#include "plan/ops/conv_chunks.h"
#include "plan/ops/factories.h"
#include "plan/ops/sparse_weight.h"
#include "plan/ops/spec_reader.h"
#include "plan/ops/winograd.h"

namespace dynprune {
namespace {

// Length of a block of the reduction: a panel of 384 x 64 floats fits a second-level cache several times.
constexpr int64_t kBlock = 384;
// The same in bfloat16, and how much of it is packed as f32 at a time, to be rounded while it is in the first level.
constexpr int64_t kBf16Block = 512;
constexpr int64_t kBf16Stage = 64;

class ConvOp final : public Op, public Compensated {
 public:
  ConvOp(StepSpec step, const KernelTable& kernels, int num_threads)
      : Op(std::move(step)), kernels_(kernels), shape_(read_conv_shape(spec_)), alone_(num_threads == 1) {
    const SpecReader reader(spec_);
    x_ = reader.input(0);
    reader.check_rows("the input", x_, shape_.in_channels, shape_.in_positions());
    reader.check_rows("the output", spec_.output, shape_.out_channels, shape_.positions());
    if (spec_.inputs.size() > 1) {
      reader.check(spec_.out_site < 0, "a residual needs an output that is not gated");
      reader.check_rows("the residual", reader.input(1), shape_.out_channels, shape_.positions());
    }
    weight_ = reader.constant("weight", {shape_.out_channels, shape_.group_inputs() * shape_.taps()});
    if (reader.integer("sparse", 0) != 0) {
      reader.check(shape_.groups == 1, "'sparse' needs one group");
      sparse_.emplace(weight_, shape_.out_channels, shape_.in_channels, shape_.taps());
    } else if (reader.integer("bf16", 0) != 0) {
      constexpr int64_t kMaxWeights = int64_t{1} << 31;  // what an int32 offset into pairs or items reaches
      reader.check(shape_.out_channels * shape_.group_inputs() * shape_.taps() <= kMaxWeights, "'bf16' takes at most 2^31 weights");
      bf16_.emplace(weight_, shape_.out_channels, shape_.group_inputs() * shape_.taps(), shape_.groups,
                    kernels.bf16_per_item == 2 && spec_.in_site < 0);
    } else if (reader.integer("packed", 1) != 0) {
      pack_weights();
    }
    bias_ = reader.constant("bias", {shape_.out_channels});
    activation_ = reader.activation();
    by_means_ = shape_.taps() == 1 && shape_.groups == 1 && reader.integer("phases", 1) == 1 && (bf16_ || weights_.size() > 0);
    const std::vector<PositionTile> tiles = make_conv_tiles(shape_, kernels, sparse_ ? 0 : kernels.gemm_max_tail);
    patches_ = make_patch_map(shape_, tiles, kernels.lanes, x_);
    const double pack_cycles = pack_cycles_per_k(tiles[0].packed_vectors());
    const ChunkGrid grid = make_chunk_grid(shape_, tiles, pack_cycles, num_threads, bf16_ ? kernels.bf16_per_item : 1);
    chunks_.emplace(shape_, tiles, grid, kernels.lanes);
    for (int64_t i = 0; i < shape_.group_inputs() * shape_.taps() + kColumnsAhead; ++i) {
      offsets_.push_back(static_cast<int32_t>(i));
      packed_offsets_.push_back(static_cast<int32_t>(i * kPackedRows));
    }
  }

  int64_t chunks_per_sample() const override { return chunks_->count(); }

  int64_t scratch_floats() const override {
    const int64_t vectors = kernels_.gemm_max_vectors;
    const int64_t panel = sparse_ ? sparse_->max_block() * vectors : bf16_ ? (kBf16Block + kBf16Stage) * (vectors + 1) : kBlock * (vectors + 1);
    return panel_offset() + panel * kernels_.lanes;
  }

  void compute(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const ConvChunk chunk = chunk_of(run, sample, part);
    float* panel = scratch + panel_offset();
    auto* offsets = reinterpret_cast<int32_t*>(scratch + offsets_offset());
    const int64_t in_count = std::min(run.num_active(spec_.in_site, sample, shape_.in_channels), shape_.in_channels);
    const int32_t* in_index = spec_.in_site < 0 ? nullptr : run.active(spec_.in_site, sample).index;
    const bool compensated = compensation_ != nullptr && in_count < shape_.in_channels;
    float* bias = scratch + bias_offset();
    float* at_means = compensated && by_means_ ? bias : nullptr;
    if (alone_) ask_for_results(run, sample, chunk);
    if (sparse_) multiply_sparse(run, sample, chunk, in_index, in_count, scratch, panel);
    for (int64_t row = chunk.rows.begin; row < chunk.rows.end && !sparse_;) {
      const int64_t group = chunk.channel(row) / shape_.group_outputs();
      const int64_t rows_end = chunks_->end_of_group(chunk, row, group);
      const Range inputs = chunks_->inputs_of_group(in_index, in_count, group);
      if (bf16_) {
        multiply_bf16(run, sample, chunk, {row, rows_end}, inputs, in_index, group, scratch, at_means);
      } else {
        multiply(run, sample, chunk, {row, rows_end}, inputs, in_index, group, scratch, panel, offsets, at_means);
      }
      row = rows_end;
    }
    const int64_t rows = chunk.rows.end - chunk.rows.begin;
    if (at_means != nullptr) {
      for (int64_t i = 0; i < rows; ++i) bias[i] = bias_at_means_[chunk.channel(chunk.rows.begin + i)] - at_means[i];
    } else if (compensated) {
      kernels_.dot_rows({rows, shape_.in_channels, compensation_, shape_.in_channels,
                         chunk.index != nullptr ? chunk.index + chunk.rows.begin : nullptr, chunk.rows.begin,
                         run.active(spec_.in_site, sample).inactive, bias_, bias});
    } else {
      for (int64_t i = 0; i < rows; ++i) bias[i] = bias_[chunk.channel(chunk.rows.begin + i)];
    }
  }

  void commit(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const ConvChunk chunk = chunk_of(run, sample, part);
    finish(run, sample, chunk, scratch, scratch + bias_offset());
  }

  void skip(const RunView& run, int64_t sample, int64_t part) const override {
    if (spec_.inputs.size() < 2) return;
    const ConvChunk chunk = chunk_of(run, sample, part);
    const Rows& residual = spec_.inputs[1];
    for (int64_t row = chunk.rows.begin; row < chunk.rows.end; ++row) {
      kernels_.epilogue({1, chunk.positions.end - chunk.positions.begin, run.row(residual, sample, row) + chunk.positions.begin, 0, nullptr,
                         nullptr, 0, run.row(spec_.output, sample, row) + chunk.positions.begin, 0, activation_});
    }
  }

  bool hands_over() const override { return spec_.inputs.size() > 1; }

  void set_compensation(const float* compensation) override {
    compensation_ = compensation;
    if (compensation == nullptr || !by_means_) return;
    bias_at_means_.assign(bias_, bias_ + shape_.out_channels);
    for (int64_t o = 0; o < shape_.out_channels; ++o) {
      double sum = 0.0;
      for (int64_t c = 0; c < shape_.in_channels; ++c) {
        const float weight = weight_[o * shape_.in_channels + c];
        sum += static_cast<double>(kept(weight)) * kept(compensation[c]);
      }
      bias_at_means_[o] += static_cast<float>(sum);
    }
  }
  std::vector<int64_t> compensation_sizes() const override {
    return by_means_ ? std::vector<int64_t>{shape_.in_channels} : std::vector<int64_t>{shape_.out_channels, shape_.in_channels};
  }

 private:
  PackedGroups packed_groups() const { return {shape_.group_outputs()}; }
  int64_t tile_stride() const { return shape_.group_inputs() * shape_.taps() * kPackedRows; }

  void pack_weights() {
    const int64_t columns = shape_.group_inputs() * shape_.taps();
    weights_ = AlignedBuffer<float>(shape_.groups * packed_groups().tiles() * tile_stride());
    std::fill_n(weights_.data(), weights_.size(), 0.0f);
    for (int64_t channel = 0; channel < shape_.out_channels; ++channel) {
      const int64_t row = packed_groups().packed_row(channel);
      float* packed = weights_.data() + row / kPackedRows * tile_stride() + row % kPackedRows;
      for (int64_t k = 0; k < columns; ++k) packed[k * kPackedRows] = weight_[channel * columns + k];
    }
  }

  ConvChunk chunk_of(const RunView& run, int64_t sample, int64_t part) const {
    const int64_t rows = std::min(run.num_active(spec_.out_site, sample, shape_.out_channels), shape_.out_channels);
    return chunks_->at(part, rows, spec_.out_site < 0 ? nullptr : run.active(spec_.out_site, sample).index);
  }

  // Asks for what commit reads and writes, so that it comes while the chunk multiplies. Not where another thread may hold those lines:
  // then taking them over this early is slower.
  void ask_for_results(const RunView& run, int64_t sample, const ConvChunk& chunk) const {
    constexpr int64_t kLine = 16;
    for (int64_t row = chunk.rows.begin; row < chunk.rows.end; ++row) {
      const float* out = run.row(spec_.output, sample, row);
      const float* residual = spec_.inputs.size() > 1 ? run.row(spec_.inputs[1], sample, row) : out;
      for (int64_t p = chunk.positions.begin; p < chunk.positions.end; p += kLine) {
        __builtin_prefetch(out + p, 1, 2);
        __builtin_prefetch(residual + p, 0, 2);
      }
    }
  }

  // A line of packed weights holds 16 rows, active or not. With few of them active, rows by themselves are less to read.
  bool reads_packed(const ConvChunk& chunk) const { return weights_.size() > 0 && 2 * chunk.all_rows >= shape_.out_channels; }

  // A weight or a mean as it is multiplied.
  float kept(float value) const { return bf16_ ? float_of(bf16_of(value)) : value; }

  // `at_means`: where the sums go that the inputs give when each is at its mean, one for each row; nullptr for none.
  void multiply(const RunView& run, int64_t sample, const ConvChunk& chunk, Range rows, Range inputs, const int32_t* in_index, int64_t group,
                float* sums, float* panel, int32_t* offsets, float* at_means) const {
    const int64_t taps = shape_.taps();
    const int64_t reduction = (inputs.end - inputs.begin) * taps;
    const int64_t blocks = std::max<int64_t>(1, (reduction + kBlock - 1) / kBlock);
    const float* planes = run.row(x_, sample, inputs.begin);
    const bool packed = reads_packed(chunk);
    const int32_t* weight_offset = (packed ? packed_offsets_ : offsets_).data();
    if (in_index != nullptr) {
      fill_offsets(in_index + inputs.begin, group * shape_.group_inputs(), {0, reduction}, packed ? kPackedRows : 1, offsets);
      std::fill_n(offsets + reduction, kColumnsAhead, 0);
      weight_offset = offsets;
    }
    for (int64_t block = 0; block < blocks; ++block) {
      const Range k = part_of(reduction, block, blocks);
      GatherGemmArgs product{};
      product.m = rows.end - rows.begin;
      product.k = k.end - k.begin;
      product.weight = packed ? weights_.data() : weight_;
      product.weight_stride = packed ? tile_stride() : shape_.group_inputs() * taps;
      product.packed = packed;
      product.row_index = chunk.index != nullptr ? chunk.index + rows.begin : nullptr;
      product.row_shift = (packed ? group * packed_groups().padding() : 0) + (chunk.index != nullptr ? 0 : rows.begin);
      product.weight_offset = weight_offset + k.begin;
      product.out = sums + (rows.begin - chunk.rows.begin) * chunk.width;
      product.out_stride = chunk.width;
      product.accumulate = block > 0;
      for (int64_t t = chunk.tiles.begin; t < chunk.tiles.end; ++t) {
        const PositionTile& tile = chunks_->tile(t);
        const Panel patches = pack(planes, t, k, panel);
        product.panel = patches.data;
        product.panel_stride = patches.stride;
        product.width = tile.vectors * kernels_.lanes;
        product.tail = packed ? tile.tail : 0;
        if (t + 1 == chunk.tiles.end) set_next(product, chunk, rows, k, reduction);
        int64_t rest = packed ? 0 : tile.packed_vectors() - tile.vectors;  // vectors still to come
        if (tile.packed_vectors() <= kernels_.gemm_max_vectors) {
          product.width += rest * kernels_.lanes;
          rest = 0;
        }
        kernels_.gather_gemm(product);
        if (rest > 0) {
          product.panel += product.width;
          product.out += product.width;
          product.width = rest * kernels_.lanes;
          kernels_.gather_gemm(product);
          product.out -= tile.vectors * kernels_.lanes;
        }
        product.out += tile.packed_vectors() * kernels_.lanes;
      }
      if (at_means == nullptr) continue;
      gather_means(in_index, k, panel);
      if (!packed) {
        auto* packed_offsets = reinterpret_cast<int32_t*>(panel + kBlock);
        fill_offsets(in_index, 0, k, kPackedRows, packed_offsets);
        std::fill_n(packed_offsets + (k.end - k.begin), kColumnsAhead, 0);
        product.weight_offset = packed_offsets;
      }
      product.weight = weights_.data();
      product.weight_stride = tile_stride();
      product.packed = true;
      product.panel = panel;
      product.next_rows = 0;
      as_one_position(product, at_means);
      kernels_.gather_gemm(product);
    }
  }

  // After a block k of the reduction comes the next one, after the last the next chunk, which has the rows after these or the same.
  void set_next(GatherGemmArgs& product, const ConvChunk& chunk, Range rows, Range k, int64_t reduction) const {
    const bool is_last = k.end == reduction;
    product.next_row = is_last && chunks_->rows_first() ? product.m : 0;
    product.next_rows = is_last && chunks_->rows_first() ? chunk.all_rows - rows.end : product.m;
    product.next_k = (is_last ? 0 : k.end) - k.begin;
  }

  // Makes a product one with a panel of a single position: a tail, or a vector where vectors have one lane.
  template <class Product>
  void as_one_position(Product& product, float* out) const {
    product.tail = std::min<int64_t>(1, kernels_.gemm_max_tail);
    product.width = 1 - product.tail;
    product.panel_stride = product.out_stride = 1;
    product.out = out;
  }

  // The means of the active inputs `k`, in their order.
  void gather_means(const int32_t* in_index, Range k, float* means) const {
    const auto limit = static_cast<int32_t>(shape_.in_channels - 1);
    for (int64_t i = k.begin; i < k.end; ++i) means[i - k.begin] = compensation_[std::clamp<int32_t>(in_index[i], 0, limit)];
  }

  void multiply_bf16(const RunView& run, int64_t sample, const ConvChunk& chunk, Range rows, Range inputs, const int32_t* in_index,
                     int64_t group, float* scratch, float* at_means) const {
    const int64_t taps = shape_.taps();
    const int64_t per_item = kernels_.bf16_per_item;
    const int64_t reduction = (inputs.end - inputs.begin) * taps;
    const int64_t blocks = std::max<int64_t>(1, (reduction + kBf16Block - 1) / kBf16Block);
    const float* planes = run.row(x_, sample, inputs.begin);
    auto* row_offset = reinterpret_cast<int32_t*>(scratch + bf16_offset());
    int32_t* tile_index = row_offset + chunks_->max_rows();
    auto* items = reinterpret_cast<uint32_t*>(scratch + items_offset());
    auto* panel = reinterpret_cast<uint32_t*>(scratch + panel_offset());
    float* stage = scratch + panel_offset() + kBf16Block * (kernels_.gemm_max_vectors + 1) * kernels_.lanes;
    Bf16GemmArgs product{};
    product.m = rows.end - rows.begin;
    product.row_offset = row_offset;
    product.panel = panel;
    product.out_stride = chunk.width;
    const int64_t num_tiles = bf16_->place_rows(chunk.index, rows, item_stride(), max_tiles(), row_offset, tile_index);
    for (int64_t block = 0; block < blocks; ++block) {
      const Range pairs = part_of((reduction + 1) / 2, block, blocks);
      const Range k{2 * pairs.begin, std::min(2 * pairs.end, reduction)};
      product.items = (k.end - k.begin + per_item - 1) / per_item;
      product.accumulate = block > 0;
      product.out = scratch + (rows.begin - chunk.rows.begin) * chunk.width;
      if (bf16_->pairs()) {
        product.weight = bf16_->items() + pairs.begin * kPackedRows;
      } else {
        const int32_t* columns = offsets_.data() + k.begin;
        if (in_index != nullptr) {
          auto* offsets = reinterpret_cast<int32_t*>(scratch + offsets_offset());
          fill_offsets(in_index + inputs.begin, group * shape_.group_inputs(), k, 1, offsets);
          columns = offsets;
        }
        kernels_.bf16_tiles({num_tiles, k.end - k.begin, bf16_->values(), bf16_->tile_stride(), tile_index, columns, items, item_stride()});
        product.weight = items;
      }
      for (int64_t t = chunk.tiles.begin; t < chunk.tiles.end; ++t) {
        const PositionTile& tile = chunks_->tile(t);
        product.width = tile.vectors * kernels_.lanes;
        product.tail = tile.tail;
        product.panel_stride = tile.packed_vectors() * kernels_.lanes;
        pack_bf16(planes, t, k, panel, stage);
        if (t + 1 == chunk.tiles.end && bf16_->pairs()) product.next = bf16_next(chunk, rows, 2 * pairs.end < reduction ? pairs.end : 0);
        kernels_.bf16_gemm(product);
        product.out += product.panel_stride;
      }
      if (at_means == nullptr) continue;
      gather_means(in_index, k, stage);
      round_to_items(stage, k.end - k.begin, panel);
      Bf16GemmArgs one = product;
      as_one_position(one, at_means);
      kernels_.bf16_gemm(one);
    }
  }

  // What is multiplied after a block of the reduction, as in `set_next`; `next_pair` is 0 after the last.
  const uint32_t* bf16_next(const ConvChunk& chunk, Range rows, int64_t next_pair) const {
    const int64_t row = next_pair > 0 || !chunks_->rows_first() ? rows.begin : rows.end;
    if (row >= chunk.all_rows) return nullptr;
    return bf16_->items() + bf16_->first_item(packed_groups().packed_row(chunk.channel(row))) + next_pair * kPackedRows;
  }

  // items[j] = item j of a panel of one position.
  void round_to_items(const float* values, int64_t count, uint32_t* items) const {
    if (kernels_.bf16_per_item == 1) {
      for (int64_t i = 0; i < count; ++i) reinterpret_cast<float*>(items)[i] = kept(values[i]);
      return;
    }
    for (int64_t i = 0; i < count; i += 2) {
      items[i / 2] = bf16_of(values[i]) | (i + 1 < count ? static_cast<uint32_t>(bf16_of(values[i + 1])) << 16 : 0u);
    }
  }

  void multiply_sparse(const RunView& run, int64_t sample, const ConvChunk& chunk, const int32_t* in_index, int64_t in_count, float* sums,
                       float* panel) const {
    float* scratch = sums + sparse_offset();
    const SparseWeight::Request request{chunk.rows, chunk.index, in_index, in_count};
    const float* planes = run.row(x_, sample, 0);
    const int64_t blocks = sparse_->blocks(in_count);
    sparse_->prepare(request, scratch);
    for (int64_t block = 0; block < blocks; ++block) {
      const Range channels = part_of(in_count, block, blocks);
      SparseGemmArgs product = sparse_->select(request, block, chunks_->max_rows(), scratch);
      product.out_stride = chunk.width;
      product.out = sums;
      for (int64_t t = chunk.tiles.begin; t < chunk.tiles.end; ++t) {
        product.width = chunks_->tile(t).vectors * kernels_.lanes;
        const Panel patches = pack(planes, t, {channels.begin * shape_.taps(), channels.end * shape_.taps()}, panel);
        product.panel = patches.data;
        product.panel_stride = patches.stride;
        kernels_.sparse_gemm(product);
        product.out += product.width;
      }
    }
  }

  struct Panel {
    const float* data;
    int64_t stride;
  };

  // The patches of tile t for the reduction indices k, packed into `panel` unless the planes themselves will do.
  Panel pack(const float* planes, int64_t t, Range k, float* panel) const {
    const int64_t taps = shape_.taps();
    const int64_t width = chunks_->tile(t).packed_vectors() * kernels_.lanes;
    switch (patches_.packing) {
      case Packing::kDirect:
        return {planes + k.begin * x_.row_stride + chunks_->tile(t).first, x_.row_stride};
      case Packing::kShifted:
        kernels_.pack_shifted({planes + chunks_->tile(t).first, x_.row_stride, taps, k.begin, k.end - k.begin, patches_.shifts.data(),
                               patches_.masks.data() + patches_.first_vector[t], panel, width / kernels_.lanes});
        break;
      case Packing::kGathered:
        kernels_.pack_gathered({planes, x_.row_stride, taps, k.begin, k.end - k.begin, patches_.vectors.data() + patches_.first_vector[t],
                                patches_.parts, patches_.patterns.data(), panel, width / kernels_.lanes});
        break;
      case Packing::kSegments:
        kernels_.pack_patches({planes, x_.row_stride, taps, k.begin, k.end - k.begin, patches_.segments.data(),
                               patches_.taps.data() + t * taps, shape_.stride_x, panel, width});
        break;
    }
    return {panel, width};
  }

  // Of one panel row of a tile, with rounding it to bfloat16.
  double pack_cycles_per_k(int64_t vectors) const {
    const double round_cycles = patches_.packing == Packing::kShifted ? -1.0 : 1.5;  // of a vector; both in one pass cost less than one
    return patches_.cycles_per_k + (bf16_ ? round_cycles * static_cast<double>(vectors) : 0.0);
  }

  // The same in items of bfloat16; `stage` holds some of it as f32 on the way.
  void pack_bf16(const float* planes, int64_t t, Range k, uint32_t* panel, float* stage) const {
    const int64_t vectors = chunks_->tile(t).packed_vectors();
    const int64_t width = vectors * kernels_.lanes;
    if (patches_.packing == Packing::kShifted) {
      kernels_.bf16_pack_shifted({planes + chunks_->tile(t).first, x_.row_stride, shape_.taps(), k.begin, k.end - k.begin, patches_.shifts.data(),
                                  patches_.masks.data() + patches_.first_vector[t], panel, vectors});
      return;
    }
    for (int64_t first = k.begin; first < k.end; first += kBf16Stage) {
      const Range some{first, std::min(first + kBf16Stage, k.end)};
      const Panel patches = pack(planes, t, some, stage);
      kernels_.bf16_panel({some.end - some.begin, width, patches.data, patches.stride, panel});
      panel += kBf16Stage / kernels_.bf16_per_item * width;
    }
  }

  // weight_offset[k] of reduction index k: channel within the group times taps, plus tap; `distance` from one to the next.
  void fill_offsets(const int32_t* index, int64_t first_channel, Range k, int64_t distance, int32_t* offsets) const {
    const int64_t taps = shape_.taps();
    const int64_t limit = shape_.group_inputs() - 1;
    if (taps == 1) {
      const auto first = static_cast<int32_t>(first_channel);
      const auto last = static_cast<int32_t>(limit);
      for (int64_t i = k.begin; i < k.end; ++i) {
        *offsets++ = std::clamp<int32_t>(index[i] - first, 0, last) * static_cast<int32_t>(distance);
      }
      return;
    }
    int64_t row = k.begin / taps;
    int64_t tap = k.begin % taps;
    int64_t base = std::clamp<int64_t>(index[row] - first_channel, 0, limit) * taps;
    for (int64_t i = k.begin; i < k.end; ++i) {
      *offsets++ = static_cast<int32_t>((base + tap) * distance);
      if (++tap == taps && i + 1 < k.end) {
        tap = 0;
        base = std::clamp<int64_t>(index[++row] - first_channel, 0, limit) * taps;
      }
    }
  }

  void finish(const RunView& run, int64_t sample, const ConvChunk& chunk, const float* sums, const float* bias) const {
    const int64_t rows = chunk.rows.end - chunk.rows.begin;
    if (rows == 0) return;
    const bool has_residual = spec_.inputs.size() > 1;
    const float* residual = has_residual ? run.row(spec_.inputs[1], sample, chunk.rows.begin) + chunk.positions.begin : nullptr;
    kernels_.epilogue({rows, chunk.positions.end - chunk.positions.begin, sums, chunk.width, bias, residual,
                       has_residual ? spec_.inputs[1].row_stride : 0, run.row(spec_.output, sample, chunk.rows.begin) + chunk.positions.begin,
                       spec_.output.row_stride, activation_});
  }

  static int64_t align(int64_t floats) { return (floats + 15) / 16 * 16; }
  int64_t bias_offset() const { return align(chunks_->max_rows() * chunks_->max_width()); }
  int64_t offsets_offset() const { return bias_offset() + align(chunks_->max_rows()); }
  int64_t sparse_offset() const {
    return offsets_offset() + align(std::max(shape_.group_inputs() * shape_.taps() + kColumnsAhead, bf16_ ? kBf16Block : 0));
  }
  int64_t bf16_offset() const { return sparse_offset(); }
  int64_t items_offset() const { return bf16_offset() + align(2 * chunks_->max_rows()); }
  int64_t item_stride() const { return kBf16Block / kernels_.bf16_per_item * kPackedRows; }
  int64_t max_tiles() const { return std::min(chunks_->max_rows(), shape_.groups * packed_groups().tiles()); }
  int64_t panel_offset() const {
    if (sparse_) return sparse_offset() + align(sparse_->scratch_floats(chunks_->max_rows(), spec_.in_site >= 0));
    if (!bf16_) return sparse_offset();
    return items_offset() + (bf16_->pairs() ? 0 : max_tiles() * item_stride());
  }

  const KernelTable& kernels_;
  ConvShape shape_;
  bool alone_;  // one thread runs the plan
  Rows x_;
  const float* weight_;           // [out_channels][group_inputs * taps]
  AlignedBuffer<float> weights_;  // [group][group_outputs / kPackedRows][group_inputs * taps][kPackedRows]
  const float* bias_;
  bool by_means_ = false;                // what compensates inputs is their means rather than a matrix
  const float* compensation_ = nullptr;  // [in_channels] or [out_channels][in_channels]
  std::vector<float> bias_at_means_;     // what the layer gives when all inputs are at their means
  ActivationSpec activation_;
  PatchMap patches_;
  std::optional<ConvChunks> chunks_;
  std::optional<SparseWeight> sparse_;
  std::optional<Bf16Weight> bf16_;
  std::vector<int32_t> offsets_;         // the weight offsets of a whole input
  std::vector<int32_t> packed_offsets_;  // and in packed weights
};

}  // namespace

std::unique_ptr<Op> make_conv(StepSpec spec, const KernelTable& kernels, int num_threads) {
  const SpecReader reader(spec);
  const bool sparse = reader.integer("sparse", 0) != 0;
  reader.check(!sparse || reader.integer("winograd", 0) == 0, "'sparse' and 'winograd' exclude each other");
  reader.check(!sparse || reader.integer("bf16", 0) == 0, "'sparse' and 'bf16' exclude each other");
  const int64_t tile = sparse ? 0 : choose_winograd_tile(spec, read_conv_shape(spec), kernels);
  if (tile != 0) {
    return make_winograd(std::move(spec), kernels, num_threads, tile);
  }
  return std::make_unique<ConvOp>(std::move(spec), kernels, num_threads);
}

}  // namespace dynprune
