// Expand - depthwise - project as one step (MobileNetV2's inverted residual; without its ends: separable and squeeze-excite blocks).
//
// A chunk is a band of output rows. Its inputs are packed once; then, some channels at a time, the rows that the band sees are
// expanded, convolved and multiplied into the band's sums, so that the wide planes in the middle never leave the second-level cache.
// Where bands overlap the expansion is computed again. Without a projection a chunk is a band of some channels.
#include "plan/ops/bottleneck.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "plan/ops/bf16_pointwise.h"
#include "plan/ops/block_op.h"
#include "plan/ops/bottleneck_bands.h"
#include "plan/ops/factories.h"
#include "plan/ops/spec_reader.h"
#include "plan/ops/window_map.h"

namespace dynprune {
namespace {

// Channels are expanded this many at a time, or so few more that their plane parts stay in a first-level cache.
constexpr int64_t kMinExpanded = 12;
constexpr int64_t kMaxExpandedFloats = 12 * 1024;
// Convolved channels wait for the projection until they fill this many floats.
constexpr int64_t kMaxConvolvedFloats = 48 * 1024;
// Packing is an eighth of an expansion of so many rows, at the speed of f32.
constexpr int64_t kMinPackedRows = 24;

// A 1x1 convolution, its constants by true channel.
struct Pointwise {
  Rows in, out;
  int64_t in_channels = 0, out_channels = 0;
  int32_t in_site = -1, out_site = -1;
  const float* weight = nullptr;  // [out_channels][in_channels]
  const float* bias = nullptr;
  ActivationSpec activation;
  bool bf16 = false;
};

Pointwise read_pointwise(const StepSpec& spec) {
  const SpecReader reader(spec);
  const ConvShape shape = read_conv_shape(spec);
  reader.check(spec.op == "conv" && shape.taps() == 1 && shape.groups == 1 && shape.stride_y == 1 && shape.stride_x == 1 &&
                   shape.pad_top == 0 && shape.pad_left == 0 && shape.in_positions() == shape.positions(),
               "only a 1x1 convolution of stride 1 runs as one step with a depthwise convolution");
  Pointwise result;
  result.in = reader.input(0);
  result.out = spec.output;
  reader.check_rows("the input", result.in, shape.in_channels, shape.in_positions());
  reader.check_rows("the output", result.out, shape.out_channels, shape.positions());
  result.in_channels = shape.in_channels;
  result.out_channels = shape.out_channels;
  result.in_site = spec.in_site;
  result.out_site = spec.out_site;
  result.weight = reader.constant("weight", {shape.out_channels, shape.in_channels});
  result.bias = reader.constant("bias", {shape.out_channels});
  result.activation = reader.activation();
  result.bf16 = reader.integer("bf16", 0) != 0;
  return result;
}

bool same_place(const Rows& a, const Rows& b) {
  return a.buffer == b.buffer && a.offset == b.offset && a.rows == b.rows && a.row_stride == b.row_stride && a.positions == b.positions;
}

struct Parts {
  const StepSpec* expand = nullptr;
  const StepSpec* depthwise = nullptr;
  const StepSpec* project = nullptr;
};

Parts sort_parts(const std::vector<StepSpec>& parts) {
  const SpecReader reader(parts.back());
  Parts result;
  const size_t middle = parts.front().op == "depthwise" ? 0 : 1;
  reader.check(parts.size() >= 2 && parts.size() <= 3 && middle < parts.size() && parts[middle].op == "depthwise" &&
                   parts.size() <= middle + 2,
               "'fused' must count the steps before it that expand and convolve depthwise");
  result.depthwise = &parts[middle];
  if (middle == 1) result.expand = &parts[0];
  if (parts.size() > middle + 1) result.project = &parts[middle + 1];
  for (size_t i = 0; i + 1 < parts.size(); ++i) {
    reader.check(parts[i].inputs.size() == 1, "only the last of fused steps may have a residual");
    reader.check(!parts[i + 1].inputs.empty() && same_place(parts[i].output, parts[i + 1].inputs[0]) &&
                     parts[i].out_site == parts[i + 1].in_site && parts[i].branches == parts[i + 1].branches,
                 "each of fused steps must read what the one before writes, under the same sites and branches");
  }
  return result;
}

class BottleneckOp final : public Op, public Compensated {
 public:
  // `speed`: as in BottleneckSizes.
  BottleneckOp(const Parts& parts, const KernelTable& kernels, std::vector<Band> bands, int num_threads, int speed)
      : Op(parts.project != nullptr ? *parts.project : *parts.depthwise),
        kernels_(kernels),
        map_(*parts.depthwise, kernels.lanes),
        clamp_(SpecReader(*parts.depthwise).activation()),
        expanded_clamp_(parts.expand != nullptr ? SpecReader(*parts.expand).activation() : ActivationSpec()),
        bands_(std::move(bands)),
        site_(parts.depthwise->out_site),
        in_(parts.depthwise->inputs[0]) {
    const SpecReader reader(*parts.depthwise);
    channels_ = map_.shape().in_channels;
    weight_ = reader.constant("weight", {channels_, map_.shape().taps()});
    bias_ = reader.constant("bias", {channels_});
    if (parts.expand != nullptr) {
      expands_ = true;
      expand_ = read_pointwise(*parts.expand);
    }
    if (parts.project != nullptr) {
      projects_ = true;
      project_ = read_pointwise(*parts.project);
      const SpecReader last(spec_);
      if (spec_.inputs.size() > 1) {
        last.check(spec_.out_site < 0, "a residual needs an output that is not gated");
        last.check_rows("the residual", last.input(1), project_.out_channels, map_.shape().positions());
      }
    }
    lay_out(num_threads, speed);
  }

  int64_t chunks_per_sample() const override { return static_cast<int64_t>(bands_.size()) * channel_parts_; }
  int64_t scratch_floats() const override { return layout_.end; }

  void compute(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const Chunk chunk = chunk_of(run, sample, part);
    const Inputs inputs = expands_ ? prepare_inputs(run, sample, chunk, scratch) : Inputs{};
    std::fill_n(scratch + layout_.zeros, align(map_.shape().in_width), 0.0f);
    int64_t first = chunk.channels.begin;
    do {
      const int64_t last = std::min(chunk.channels.end, first + convolved_);
      float* convolved = scratch + layout_.convolved + (projects_ ? 0 : (first - chunk.channels.begin) * out_stride_);
      for (int64_t i = first; i < last; i += expanded_) {
        const Range rows{i, std::min(last, i + expanded_)};
        if (expands_) expand(chunk, inputs, rows, scratch);
        convolve(run, sample, chunk, rows, convolved + (i - first) * out_stride_, scratch);
      }
      if (projects_) project(run, sample, chunk, {first, last}, scratch);
      first = last;
    } while (first < chunk.channels.end);
    if (projects_) fill_bias(run, sample, project_, compensation_, {0, num_outputs(run, sample)}, scratch + layout_.bias);
  }

  void commit(const RunView& run, int64_t sample, int64_t part, float* scratch) const override {
    const Chunk chunk = chunk_of(run, sample, part);
    const int64_t first = chunk.band->first_row * map_.window().out_width;
    const int64_t positions = chunk.band->num_rows * map_.window().out_width;
    if (!projects_) {
      for (int64_t i = chunk.channels.begin; i < chunk.channels.end; ++i) {
        std::memcpy(run.row(spec_.output, sample, i) + first,
                    scratch + layout_.convolved + (i - chunk.channels.begin) * out_stride_, positions * sizeof(float));
      }
      return;
    }
    const int64_t rows = num_outputs(run, sample);
    if (rows == 0) return;
    const bool has_residual = spec_.inputs.size() > 1;
    kernels_.epilogue({rows, positions, scratch + layout_.sums, out_stride_, scratch + layout_.bias,
                       has_residual ? run.row(spec_.inputs[1], sample, 0) + first : nullptr,
                       has_residual ? spec_.inputs[1].row_stride : 0, run.row(spec_.output, sample, 0) + first, spec_.output.row_stride,
                       project_.activation});
  }

  void skip(const RunView& run, int64_t sample, int64_t part) const override {
    if (!hands_over()) return;
    const Band& band = bands_[part];
    const int64_t first = band.first_row * map_.window().out_width;
    kernels_.epilogue({project_.out_channels, band.num_rows * map_.window().out_width, run.row(spec_.inputs[1], sample, 0) + first,
                       spec_.inputs[1].row_stride, nullptr, nullptr, 0, run.row(spec_.output, sample, 0) + first,
                       spec_.output.row_stride, project_.activation});
  }

  bool hands_over() const override { return projects_ && spec_.inputs.size() > 1; }

  void set_compensation(const float* compensation) override { compensation_ = compensation; }
  std::vector<int64_t> compensation_sizes() const override {
    return projects_ ? std::vector<int64_t>{project_.out_channels, channels_} : std::vector<int64_t>{};
  }
  // Of inputs of the expansion that do not run.
  void set_expand_compensation(const float* compensation) { expand_compensation_ = compensation; }

 private:
  struct Chunk {
    const Band* band;
    const std::vector<PositionTile>* in_tiles;
    const std::vector<PositionTile>* out_tiles;
    Range channels;        // among the active ones
    const int32_t* index;  // of the active ones; nullptr: the i-th is channel i

    int64_t channel(int64_t i) const { return index != nullptr ? index[i] : i; }
  };

  // The inputs of the expansion: how many rows, the weight column of each, and what the chunk's channels begin with.
  struct Inputs {
    int64_t count = 0;
    const int32_t* columns = nullptr;
    const float* bias = nullptr;
    Bf16GemmArgs product{};  // of the chunk's channels, in bfloat16
  };

  struct Layout {
    int64_t zeros, stage, inputs, expand_bias, expand_weight, expanded, lines, convolved, project_weight, panel, sums, bias, end;
  };

  void lay_out(int num_threads, int speed) {
    const Window& window = map_.window();
    int64_t most_in = 0;
    int64_t most_out = 0;
    int64_t most_rows = 0;
    for (const Band& band : bands_) {
      most_in = std::max(most_in, band.window.in_height * window.in_width);
      most_out = std::max(most_out, band.num_rows * window.out_width);
      most_rows = std::max(most_rows, band.num_rows);
      in_tiles_.push_back(make_tiles(band.window.in_height * window.in_width, kernels_.lanes, kernels_.gemm_max_vectors, 0));
      out_tiles_.push_back(make_tiles(band.num_rows * window.out_width, kernels_.lanes, kernels_.gemm_max_vectors, 0));
    }
    const int64_t unit = std::max(16, kernels_.lanes);
    in_stride_ = (most_in + unit - 1) / unit * unit;
    out_stride_ = (most_out + unit - 1) / unit * unit;
    expanded_ = expands_ ? std::clamp(kMaxExpandedFloats / in_stride_ / kMinExpanded * kMinExpanded, kMinExpanded, 4 * kMinExpanded) : kMinExpanded;
    if (projects_) {
      convolved_ = std::max<int64_t>(1, kMaxConvolvedFloats / out_stride_ / expanded_) * expanded_;
    } else {
      const auto bands = static_cast<int64_t>(bands_.size());
      const int64_t floats = channels_ * most_out * bands;
      int64_t wanted = std::max<int64_t>(num_threads > 1 ? 2 * num_threads : 1, floats / (2 * kMaxConvolvedFloats));
      // Every part packs the inputs for itself.
      if (expands_ && channels_ < wanted * kMinPackedRows * speed) wanted = num_threads;
      channel_parts_ = std::clamp<int64_t>((wanted + bands - 1) / bands, 1, std::max<int64_t>(1, channels_ / expanded_));
      convolved_ = (channels_ + channel_parts_ - 1) / channel_parts_;
    }
    for (int64_t i = 0; i < std::max(channels_, expand_.in_channels); ++i) columns_.push_back(static_cast<int32_t>(i));
    if (expand_.bf16) expand_bf16_.emplace(expand_.weight, channels_, expand_.in_channels, expand_.in_channels, kernels_);
    if (project_.bf16) project_bf16_.emplace(project_.weight, project_.out_channels, channels_, convolved_, kernels_);
    const int64_t max_width = int64_t{kernels_.gemm_max_vectors} * kernels_.lanes;
    layout_.zeros = 0;
    layout_.stage = align(window.in_width);
    layout_.inputs = layout_.stage + (expand_bf16_ ? align(expand_.in_channels * max_width) : 0);
    layout_.expand_bias = layout_.inputs + align(expand_.in_channels * in_stride_);
    layout_.expand_weight = layout_.expand_bias + (expands_ ? align(channels_) : 0);
    layout_.expanded = layout_.expand_weight + (expand_bf16_ ? align(expand_bf16_->scratch_floats()) : 0);
    layout_.lines = layout_.expanded + (expands_ ? align(expanded_ * in_stride_) : 0);
    layout_.convolved = layout_.lines + align(map_.rows_seen(most_rows) * map_.lines().stride);
    layout_.project_weight = layout_.convolved + align(convolved_ * out_stride_);
    layout_.panel = layout_.project_weight + (project_bf16_ ? align(project_bf16_->scratch_floats()) : 0);
    layout_.sums = layout_.panel + (project_bf16_ ? align(project_bf16_->items_of(convolved_) * max_width) : 0);
    layout_.bias = layout_.sums + align(project_.out_channels * out_stride_);
    layout_.end = layout_.bias + align(project_.out_channels);
  }

  Chunk chunk_of(const RunView& run, int64_t sample, int64_t part) const {
    const int64_t band = part % static_cast<int64_t>(bands_.size());
    Chunk chunk;
    chunk.band = &bands_[band];
    chunk.in_tiles = &in_tiles_[band];
    chunk.out_tiles = &out_tiles_[band];
    const int64_t count = std::min(run.num_active(site_, sample, channels_), channels_);
    chunk.channels = part_of(count, part / static_cast<int64_t>(bands_.size()), channel_parts_);
    chunk.index = site_ < 0 ? nullptr : run.active(site_, sample).index;
    return chunk;
  }

  int64_t num_outputs(const RunView& run, int64_t sample) const {
    return std::min(run.num_active(project_.out_site, sample, project_.out_channels), project_.out_channels);
  }

  // Packs the rows of the inputs that the band sees, tile by tile: [tile][input or item][lanes of the tile].
  Inputs prepare_inputs(const RunView& run, int64_t sample, const Chunk& chunk, float* scratch) const {
    Inputs inputs;
    inputs.count = std::min(run.num_active(expand_.in_site, sample, expand_.in_channels), expand_.in_channels);
    inputs.columns = expand_.in_site < 0 ? columns_.data() : run.active(expand_.in_site, sample).index;
    inputs.bias = fill_bias(run, sample, expand_, expand_compensation_, chunk.channels, scratch + layout_.expand_bias);
    if (expand_bf16_) {
      inputs.product = expand_bf16_->select(chunk.index, chunk.channels, inputs.columns, inputs.count,
                                            inputs.count == expand_.in_channels ? 0 : -1, scratch + layout_.expand_weight);
    }
    const int64_t first = chunk.band->first_in * map_.window().in_width;
    float* panel = scratch + layout_.inputs;
    for (const PositionTile& tile : *chunk.in_tiles) {
      const int64_t width = tile.vectors * kernels_.lanes;
      const float* rows = run.row(expand_.in, sample, 0) + first + tile.first;
      int64_t stride = expand_.in.row_stride;
      if (!expand_bf16_ || tile.count < width) {
        float* copies = expand_bf16_ ? scratch + layout_.stage : panel;
        for (int64_t k = 0; k < inputs.count; ++k) {
          std::memcpy(copies + k * width, rows + k * stride, tile.count * sizeof(float));
          std::fill(copies + k * width + tile.count, copies + (k + 1) * width, 0.0f);
        }
        rows = copies;
        stride = width;
      }
      if (expand_bf16_) kernels_.bf16_panel({inputs.count, width, rows, stride, reinterpret_cast<uint32_t*>(panel)});
      panel += panel_rows(inputs) * width;
    }
    return inputs;
  }

  int64_t panel_rows(const Inputs& inputs) const { return expand_bf16_ ? inputs.product.items : inputs.count; }

  void expand(const Chunk& chunk, const Inputs& inputs, Range rows, float* scratch) const {
    const int64_t count = rows.end - rows.begin;
    const int64_t before = rows.begin - chunk.channels.begin;
    float* out = scratch + layout_.expanded;
    const float* panel = scratch + layout_.inputs;
    for (const PositionTile& tile : *chunk.in_tiles) {
      const int64_t width = tile.vectors * kernels_.lanes;
      if (expand_bf16_) {
        Bf16GemmArgs product = inputs.product;
        product.m = count;
        product.row_offset += before;
        product.width = product.panel_stride = width;
        product.panel = reinterpret_cast<const uint32_t*>(panel);
        product.out = out + tile.first;
        product.out_stride = in_stride_;
        product.bias = inputs.bias + before;
        product.low = expanded_clamp_.low;
        product.high = expanded_clamp_.high;
        kernels_.bf16_gemm(product);
      } else {
        kernels_.pointwise({count, inputs.count, width, expand_.weight, expand_.in_channels,
                            chunk.index != nullptr ? chunk.index + rows.begin : nullptr, rows.begin, inputs.columns, panel, width,
                            inputs.bias + before, expanded_clamp_.low, expanded_clamp_.high, out + tile.first, in_stride_});
      }
      panel += panel_rows(inputs) * width;
    }
    expanded_clamp_.apply_rest(kernels_, count, chunk.band->window.in_height * map_.window().in_width, out, in_stride_);
  }

  void convolve(const RunView& run, int64_t sample, const Chunk& chunk, Range rows, float* out, float* scratch) const {
    const int64_t first = chunk.band->first_in * map_.window().in_width;
    const float* planes = expands_ ? scratch + layout_.expanded : run.row(in_, sample, rows.begin) + first;
    kernels_.depthwise({&chunk.band->window, &map_.lines(), rows.end - rows.begin, planes, expands_ ? in_stride_ : in_.row_stride, 0,
                        chunk.band->num_rows, weight_, bias_, chunk.index != nullptr ? chunk.index + rows.begin : nullptr, rows.begin,
                        clamp_.low, clamp_.high, scratch + layout_.zeros, scratch + layout_.lines, out, out_stride_});
    clamp_.apply_rest(kernels_, rows.end - rows.begin, chunk.band->num_rows * map_.window().out_width, out, out_stride_);
  }

  // Adds the products of the convolved channels to the band's sums.
  void project(const RunView& run, int64_t sample, const Chunk& chunk, Range channels, float* scratch) const {
    const int32_t* rows = project_.out_site < 0 ? nullptr : run.active(project_.out_site, sample).index;
    const int32_t* columns = (chunk.index != nullptr ? chunk.index : columns_.data()) + channels.begin;
    const int64_t num_rows = num_outputs(run, sample);
    const int64_t count = channels.end - channels.begin;
    const float* convolved = scratch + layout_.convolved;
    float* sums = scratch + layout_.sums;
    const bool accumulate = channels.begin > chunk.channels.begin;
    if (!project_bf16_) {
      for (const PositionTile& tile : *chunk.out_tiles) {
        kernels_.gather_gemm({num_rows, count, tile.vectors * kernels_.lanes, 0, project_.weight, channels_, false, rows, 0, columns,
                              convolved + tile.first, out_stride_, sums + tile.first, out_stride_, accumulate});
      }
      return;
    }
    auto* panel = reinterpret_cast<uint32_t*>(scratch + layout_.panel);
    const bool all_run = run.num_active(site_, sample, channels_) >= channels_;
    Bf16GemmArgs product =
        project_bf16_->select(rows, {0, num_rows}, columns, count, all_run ? channels.begin : -1, scratch + layout_.project_weight);
    product.panel = panel;
    product.out_stride = out_stride_;
    product.accumulate = accumulate;
    for (const PositionTile& tile : *chunk.out_tiles) {
      product.width = product.panel_stride = tile.vectors * kernels_.lanes;
      product.out = sums + tile.first;
      kernels_.bf16_panel({count, product.width, convolved + tile.first, out_stride_, panel});
      kernels_.bf16_gemm(product);
    }
  }

  // Writes the biases of some of the active outputs of a 1x1 convolution, one after the other, with what its inactive inputs add.
  const float* fill_bias(const RunView& run, int64_t sample, const Pointwise& layer, const float* compensation, Range outputs, float* bias) const {
    const int32_t* index = layer.out_site < 0 ? nullptr : run.active(layer.out_site, sample).index + outputs.begin;
    const int64_t count = outputs.end - outputs.begin;
    if (compensation != nullptr && run.num_active(layer.in_site, sample, layer.in_channels) < layer.in_channels) {
      kernels_.dot_rows({count, layer.in_channels, compensation, layer.in_channels, index, outputs.begin,
                         run.active(layer.in_site, sample).inactive, layer.bias, bias});
    } else {
      for (int64_t i = 0; i < count; ++i) bias[i] = layer.bias[index != nullptr ? index[i] : outputs.begin + i];
    }
    return bias;
  }

  const KernelTable& kernels_;
  WindowMap map_;
  FusedClamp clamp_, expanded_clamp_;
  std::vector<Band> bands_;
  std::vector<std::vector<PositionTile>> in_tiles_, out_tiles_;  // of each band
  int32_t site_;
  Rows in_;  // of the depthwise convolution, read where nothing expands
  int64_t channels_ = 0;
  const float* weight_ = nullptr;
  const float* bias_ = nullptr;
  bool expands_ = false;
  bool projects_ = false;
  Pointwise expand_, project_;
  std::optional<Bf16Pointwise> expand_bf16_, project_bf16_;
  const float* compensation_ = nullptr;
  const float* expand_compensation_ = nullptr;
  std::vector<int32_t> columns_;  // 0, 1, 2, ...
  int64_t channel_parts_ = 1;
  int64_t in_stride_ = 0, out_stride_ = 0;    // floats of a row in scratch
  int64_t expanded_ = 1, convolved_ = 1;      // channels at a time
  Layout layout_{};
};

// A step that `taker` runs. What compensates its inputs goes there too.
class AbsorbedOp final : public Op, public Compensated {
 public:
  AbsorbedOp(StepSpec spec, BottleneckOp& taker) : Op(std::move(spec)), taker_(taker) {}
  int64_t chunks_per_sample() const override { return 0; }
  int64_t scratch_floats() const override { return 0; }
  void compute(const RunView&, int64_t, int64_t, float*) const override {}
  void commit(const RunView&, int64_t, int64_t, float*) const override {}
  void set_compensation(const float* compensation) override { taker_.set_expand_compensation(compensation); }
  std::vector<int64_t> compensation_sizes() const override {
    if (spec_.op != "conv") return {};
    const Pointwise layer = read_pointwise(spec_);
    return {layer.out_channels, layer.in_channels};
  }

 private:
  BottleneckOp& taker_;
};

}  // namespace

std::unique_ptr<Op> make_bottleneck(const std::vector<StepSpec>& specs, const KernelTable& kernels, int num_threads) {
  const Parts parts = sort_parts(specs);
  const WindowMap map(*parts.depthwise, kernels.lanes);
  const Pointwise expand = parts.expand != nullptr ? read_pointwise(*parts.expand) : Pointwise{};
  const Pointwise project = parts.project != nullptr ? read_pointwise(*parts.project) : Pointwise{};
  const BottleneckSizes sizes{expand.in_channels, map.shape().in_channels, project.out_channels, map.window(),
                              expand.bf16 || project.bf16 ? kernels.bf16_per_item : 1};
  const int64_t bands = choose_bands(sizes, kernels, num_threads);
  if (bands == 0) return nullptr;
  return std::make_unique<BottleneckOp>(parts, kernels, make_bands(map.window(), bands), num_threads, sizes.speed);
}

std::unique_ptr<Op> make_absorbed(StepSpec spec, Op& taker) {
  return std::make_unique<AbsorbedOp>(std::move(spec), dynamic_cast<BottleneckOp&>(taker));
}

}  // namespace dynprune
