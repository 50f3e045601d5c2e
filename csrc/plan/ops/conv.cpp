// Convolution (and, with one row of tokens as its plane, a linear layer) over any lists of input and output channels.
//
// A chunk is some rows by some tiles of positions. For each block of the reduction it packs the patches of a tile into a panel, then
// multiplies the chosen weight rows with it; the sums stay in scratch, and commit adds bias and residual, activates and stores.
#include <algorithm>
#include <cstring>
#include <optional>

#include "base/aligned_buffer.h"
#include "plan/ops/bf16_weight.h"
#include "plan/ops/conv_tiling.h"
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
      : Op(std::move(step)), kernels_(kernels), shape_(read_conv_shape(spec_)) {
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
    tiles_ = make_conv_tiles(shape_, kernels, sparse_ ? 0 : kernels.gemm_max_tail);
    patches_ = make_patch_map(shape_, tiles_, kernels.lanes, x_);
    grid_ = make_chunk_grid(shape_, tiles_, pack_cycles_per_k(), num_threads, bf16_ ? kernels.bf16_per_item : 1);
    for (int64_t i = 0; i < shape_.group_inputs() * shape_.taps(); ++i) {
      offsets_.push_back(static_cast<int32_t>(i));
      packed_offsets_.push_back(static_cast<int32_t>(i * kPackedRows));
    }
    for (int64_t part = 0; part < grid_.position_parts; ++part) {
      max_width_ = std::max(max_width_, chunk_width(part_of(tile_count(), part, grid_.position_parts)));
    }
    max_rows_ = (shape_.out_channels + grid_.row_parts - 1) / grid_.row_parts + 2 * kPackedRows;
  }

  int64_t chunks_per_sample() const override { return grid_.position_parts * grid_.row_parts; }

  int64_t scratch_floats() const override {
    const int64_t vectors = kernels_.gemm_max_vectors;
    const int64_t panel = sparse_ ? sparse_->max_block() * vectors : bf16_ ? (kBf16Block + kBf16Stage) * (vectors + 1) : kBlock * (vectors + 1);
    return panel_offset() + panel * kernels_.lanes;
  }

  void compute(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const Chunk chunk = chunk_of(run, sample, part);
    float* panel = scratch + panel_offset();
    auto* offsets = reinterpret_cast<int32_t*>(scratch + offsets_offset());
    const int64_t in_count = std::min(run.num_active(spec_.in_site, sample, shape_.in_channels), shape_.in_channels);
    const int32_t* in_index = spec_.in_site < 0 ? nullptr : run.active(spec_.in_site, sample).index;
    if (sparse_) multiply_sparse(run, sample, chunk, in_index, in_count, scratch, panel);
    for (int64_t row = chunk.rows.begin; row < chunk.rows.end && !sparse_;) {
      const int64_t group = chunk.channel(row) / shape_.group_outputs();
      const int64_t rows_end = end_of_group(chunk, row, group);
      const Range inputs = inputs_of_group(in_index, in_count, group);
      if (bf16_) {
        multiply_bf16(run, sample, chunk, {row, rows_end}, inputs, in_index, group, scratch);
      } else {
        multiply(run, sample, chunk, {row, rows_end}, inputs, in_index, group, scratch, panel, offsets);
      }
      row = rows_end;
    }
    if (compensation_ != nullptr && spec_.in_site >= 0) {
      kernels_.dot_rows({chunk.rows.end - chunk.rows.begin, shape_.in_channels, compensation_, shape_.in_channels,
                         chunk.index != nullptr ? chunk.index + chunk.rows.begin : nullptr, chunk.rows.begin,
                         run.active(spec_.in_site, sample).inactive, bias_, scratch + bias_offset()});
    } else {
      for (int64_t row = chunk.rows.begin; row < chunk.rows.end; ++row) {
        scratch[bias_offset() + row - chunk.rows.begin] = bias_[chunk.channel(row)];
      }
    }
  }

  void commit(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const Chunk chunk = chunk_of(run, sample, part);
    finish(run, sample, chunk, scratch, scratch + bias_offset());
  }

  void skip(const RunView& run, int64_t sample, int64_t part) const override {
    if (spec_.inputs.size() < 2) return;
    const Chunk chunk = chunk_of(run, sample, part);
    const Rows& residual = spec_.inputs[1];
    for (int64_t row = chunk.rows.begin; row < chunk.rows.end; ++row) {
      kernels_.epilogue({1, chunk.positions.end - chunk.positions.begin, run.row(residual, sample, row) + chunk.positions.begin, 0, nullptr,
                         nullptr, 0, run.row(spec_.output, sample, row) + chunk.positions.begin, 0, activation_});
    }
  }

  bool hands_over() const override { return spec_.inputs.size() > 1; }

  void set_compensation(const float* matrix) override { compensation_ = matrix; }
  std::vector<int64_t> compensation_sizes() const override { return {shape_.out_channels, shape_.in_channels}; }

 private:
  struct Chunk {
    Range tiles;
    Range positions;
    Range rows;            // among the active rows
    const int32_t* index;  // of all active rows; nullptr: row i is channel i
    int64_t width;
    bool packed;  // which weights are read

    int64_t channel(int64_t row) const { return index != nullptr ? index[row] : row; }
  };

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

  int64_t tile_count() const { return static_cast<int64_t>(tiles_.size()); }

  int64_t chunk_width(Range tiles) const {
    int64_t vectors = 0;
    for (int64_t t = tiles.begin; t < tiles.end; ++t) vectors += tiles_[t].packed_vectors();
    return vectors * kernels_.lanes;
  }

  Chunk chunk_of(const RunView& run, int64_t sample, int64_t part) const {
    Chunk chunk;
    chunk.tiles = part_of(tile_count(), grid_.position_part(part), grid_.position_parts);
    const PositionTile& last = tiles_[chunk.tiles.end - 1];
    chunk.positions = {tiles_[chunk.tiles.begin].first, last.first + last.count};
    const int64_t count = std::min(run.num_active(spec_.out_site, sample, shape_.out_channels), shape_.out_channels);
    chunk.rows = rows_of_part(count, grid_.row_part(part));
    chunk.index = spec_.out_site < 0 ? nullptr : run.active(spec_.out_site, sample).index;
    chunk.width = chunk_width(chunk.tiles);
    // A line of packed weights holds 16 rows, active or not. With few of them active, rows by themselves are less to read.
    chunk.packed = weights_.size() > 0 && 5 * count >= 3 * shape_.out_channels;
    return chunk;
  }

  // Parts begin with a packed tile where they can.
  Range rows_of_part(int64_t count, int64_t part) const {
    if (count < grid_.row_parts * kPackedRows) return part_of(count, part, grid_.row_parts);
    const Range tiles = part_of(count / kPackedRows, part, grid_.row_parts);
    return {tiles.begin * kPackedRows, part + 1 == grid_.row_parts ? count : tiles.end * kPackedRows};
  }

  int64_t end_of_group(const Chunk& chunk, int64_t row, int64_t group) const {
    if (shape_.groups == 1) return chunk.rows.end;
    const int64_t first_of_next = (group + 1) * shape_.group_outputs();
    if (chunk.index == nullptr) return std::min(chunk.rows.end, first_of_next);
    const int32_t* found = std::lower_bound(chunk.index + row, chunk.index + chunk.rows.end, static_cast<int32_t>(first_of_next));
    return std::max<int64_t>(row + 1, found - chunk.index);  // a late reader's list may be out of order; always move on
  }

  // Which of the compact input rows belong to the group.
  Range inputs_of_group(const int32_t* index, int64_t count, int64_t group) const {
    const int64_t first = group * shape_.group_inputs();
    const int64_t end = first + shape_.group_inputs();
    if (index == nullptr) return {first, end};
    if (shape_.groups == 1) return {0, count};
    const int64_t begin = std::lower_bound(index, index + count, static_cast<int32_t>(first)) - index;
    const int64_t stop = std::lower_bound(index + begin, index + count, static_cast<int32_t>(end)) - index;
    return {begin, std::min(stop, begin + shape_.group_inputs())};
  }

  void multiply(const RunView& run, int64_t sample, const Chunk& chunk, Range rows, Range inputs, const int32_t* in_index, int64_t group,
                float* sums, float* panel, int32_t* offsets) const {
    const int64_t taps = shape_.taps();
    const int64_t reduction = (inputs.end - inputs.begin) * taps;
    const int64_t blocks = std::max<int64_t>(1, (reduction + kBlock - 1) / kBlock);
    const float* planes = run.row(x_, sample, inputs.begin);
    for (int64_t block = 0; block < blocks; ++block) {
      const Range k = part_of(reduction, block, blocks);
      const int32_t* weight_offset = (chunk.packed ? packed_offsets_ : offsets_).data() + k.begin;
      if (in_index != nullptr) {
        fill_offsets(in_index + inputs.begin, group * shape_.group_inputs(), k, chunk.packed ? kPackedRows : 1, offsets);
        weight_offset = offsets;
      }
      GatherGemmArgs product{};
      product.m = rows.end - rows.begin;
      product.k = k.end - k.begin;
      product.weight = chunk.packed ? weights_.data() : weight_;
      product.weight_stride = chunk.packed ? tile_stride() : shape_.group_inputs() * taps;
      product.packed = chunk.packed;
      product.row_index = chunk.index != nullptr ? chunk.index + rows.begin : nullptr;
      product.row_shift = (chunk.packed ? group * packed_groups().padding() : 0) + (chunk.index != nullptr ? 0 : rows.begin);
      product.weight_offset = weight_offset;
      product.out = sums + (rows.begin - chunk.rows.begin) * chunk.width;
      product.out_stride = chunk.width;
      product.accumulate = block > 0;
      for (int64_t t = chunk.tiles.begin; t < chunk.tiles.end; ++t) {
        const PositionTile& tile = tiles_[t];
        const Panel patches = pack(planes, t, k, panel);
        product.panel = patches.data;
        product.panel_stride = patches.stride;
        product.width = tile.vectors * kernels_.lanes;
        product.tail = chunk.packed ? tile.tail : 0;
        int64_t rest = chunk.packed ? 0 : tile.packed_vectors() - tile.vectors;  // vectors still to come
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
    }
  }

  void multiply_bf16(const RunView& run, int64_t sample, const Chunk& chunk, Range rows, Range inputs, const int32_t* in_index,
                     int64_t group, float* scratch) const {
    const int64_t taps = shape_.taps();
    const int64_t per_item = kernels_.bf16_per_item;
    const int64_t reduction = (inputs.end - inputs.begin) * taps;
    const int64_t blocks = std::max<int64_t>(1, (reduction + kBf16Block - 1) / kBf16Block);
    const float* planes = run.row(x_, sample, inputs.begin);
    auto* row_offset = reinterpret_cast<int32_t*>(scratch + bf16_offset());
    int32_t* tile_index = row_offset + max_rows_;
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
        const PositionTile& tile = tiles_[t];
        product.width = tile.vectors * kernels_.lanes;
        product.tail = tile.tail;
        product.panel_stride = tile.packed_vectors() * kernels_.lanes;
        pack_bf16(planes, t, k, panel, stage);
        kernels_.bf16_gemm(product);
        product.out += product.panel_stride;
      }
    }
  }

  void multiply_sparse(const RunView& run, int64_t sample, const Chunk& chunk, const int32_t* in_index, int64_t in_count, float* sums,
                       float* panel) const {
    float* scratch = sums + sparse_offset();
    const SparseWeight::Request request{chunk.rows, chunk.index, in_index, in_count};
    const float* planes = run.row(x_, sample, 0);
    const int64_t blocks = sparse_->blocks(in_count);
    sparse_->prepare(request, scratch);
    for (int64_t block = 0; block < blocks; ++block) {
      const Range channels = part_of(in_count, block, blocks);
      SparseGemmArgs product = sparse_->select(request, block, max_rows_, scratch);
      product.out_stride = chunk.width;
      product.out = sums;
      for (int64_t t = chunk.tiles.begin; t < chunk.tiles.end; ++t) {
        product.width = tiles_[t].vectors * kernels_.lanes;
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
    const int64_t width = tiles_[t].packed_vectors() * kernels_.lanes;
    switch (patches_.packing) {
      case Packing::kDirect:
        return {planes + k.begin * x_.row_stride + tiles_[t].first, x_.row_stride};
      case Packing::kShifted:
        kernels_.pack_shifted({planes + tiles_[t].first, x_.row_stride, taps, k.begin, k.end - k.begin, patches_.shifts.data(),
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
  double pack_cycles_per_k() const {
    const double round_cycles = patches_.packing == Packing::kShifted ? -1.0 : 1.5;  // of a vector; both in one pass cost less than one
    return patches_.cycles_per_k + (bf16_ ? round_cycles * static_cast<double>(tiles_[0].packed_vectors()) : 0.0);
  }

  // The same in items of bfloat16; `stage` holds some of it as f32 on the way.
  void pack_bf16(const float* planes, int64_t t, Range k, uint32_t* panel, float* stage) const {
    const int64_t vectors = tiles_[t].packed_vectors();
    const int64_t width = vectors * kernels_.lanes;
    if (patches_.packing == Packing::kShifted) {
      kernels_.bf16_pack_shifted({planes + tiles_[t].first, x_.row_stride, shape_.taps(), k.begin, k.end - k.begin, patches_.shifts.data(),
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

  void finish(const RunView& run, int64_t sample, const Chunk& chunk, const float* sums, const float* bias) const {
    const int64_t rows = chunk.rows.end - chunk.rows.begin;
    if (rows == 0) return;
    const bool has_residual = spec_.inputs.size() > 1;
    const float* residual = has_residual ? run.row(spec_.inputs[1], sample, chunk.rows.begin) + chunk.positions.begin : nullptr;
    kernels_.epilogue({rows, chunk.positions.end - chunk.positions.begin, sums, chunk.width, bias, residual,
                       has_residual ? spec_.inputs[1].row_stride : 0, run.row(spec_.output, sample, chunk.rows.begin) + chunk.positions.begin,
                       spec_.output.row_stride, activation_});
  }

  static int64_t align(int64_t floats) { return (floats + 15) / 16 * 16; }
  int64_t bias_offset() const { return align(max_rows_ * max_width_); }
  int64_t offsets_offset() const { return bias_offset() + align(max_rows_); }
  int64_t sparse_offset() const { return offsets_offset() + align(std::max(kBlock, kBf16Block)); }
  int64_t bf16_offset() const { return sparse_offset(); }
  int64_t items_offset() const { return bf16_offset() + align(2 * max_rows_); }
  int64_t item_stride() const { return kBf16Block / kernels_.bf16_per_item * kPackedRows; }
  int64_t max_tiles() const { return std::min(max_rows_, shape_.groups * packed_groups().tiles()); }
  int64_t panel_offset() const {
    if (sparse_) return sparse_offset() + align(sparse_->scratch_floats(max_rows_, spec_.in_site >= 0));
    if (!bf16_) return sparse_offset();
    return items_offset() + (bf16_->pairs() ? 0 : max_tiles() * item_stride());
  }

  const KernelTable& kernels_;
  ConvShape shape_;
  Rows x_;
  const float* weight_;           // [out_channels][group_inputs * taps]
  AlignedBuffer<float> weights_;  // [group][group_outputs / kPackedRows][group_inputs * taps][kPackedRows]
  const float* bias_;
  const float* compensation_ = nullptr;
  ActivationSpec activation_;
  std::vector<PositionTile> tiles_;
  PatchMap patches_;
  ChunkGrid grid_;
  std::optional<SparseWeight> sparse_;
  std::optional<Bf16Weight> bf16_;
  std::vector<int32_t> offsets_;         // the weight offsets of a whole input
  std::vector<int32_t> packed_offsets_;  // and in packed weights
  int64_t max_width_ = 0;
  int64_t max_rows_ = 0;
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
