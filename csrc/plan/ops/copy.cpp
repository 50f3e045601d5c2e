// Strided copies (permutations, slices, broadcasts, concatenations that need memory) and fills, up to rank 6. Both do all their work in
// commit: a copy into scratch first would be a second copy.
//
// The dimensions are sorted by the output's strides and merged where both sides allow. The last one is the line that is written; with a
// second one it makes tiles. Where the input is contiguous along another dimension than the output, that one is the second, and a tile
// is a transpose; otherwise it is the one before the last.
#include <algorithm>
#include <cstring>

#include "plan/ops/block_op.h"
#include "plan/ops/row_factories.h"
#include "plan/ops/spec_reader.h"

namespace dynprune {
namespace {

constexpr size_t kMaxRank = 6;
constexpr int64_t kTileFloats = 4096;

struct Dimension {
  int64_t size, in_stride, out_stride;
};

std::vector<Dimension> read_dimensions(const StepSpec& spec, bool has_input) {
  const SpecReader reader(spec);
  const auto found = spec.ints.find("sizes");
  reader.check(found != spec.ints.end() && found->second.size() <= kMaxRank, "needs ints 'sizes' of rank 6 or less");
  const std::vector<int64_t>& sizes = found->second;
  const size_t rank = sizes.size();
  std::vector<Dimension> dimensions;
  if (rank == 0) return dimensions;
  const auto out = reader.ints("out_strides", rank);
  const auto in = has_input ? reader.ints("in_strides", rank) : std::vector<int64_t>(rank, 0);
  for (size_t d = 0; d < rank; ++d) {
    reader.check(sizes[d] >= 0 && in[d] >= 0, "sizes and in_strides must be >= 0");
    reader.check(sizes[d] <= 1 || out[d] >= 1, "out_strides must be >= 1, got " + std::to_string(out[d]));
    if (sizes[d] != 1) dimensions.push_back({sizes[d], in[d], out[d]});
  }
  return dimensions;
}

// Sorted by out_stride, largest first, neighbours merged; at least two dimensions, the last two of which make the tiles.
std::vector<Dimension> merge_dimensions(std::vector<Dimension> dimensions) {
  std::stable_sort(dimensions.begin(), dimensions.end(),
                   [](const Dimension& a, const Dimension& b) { return a.out_stride > b.out_stride; });
  std::vector<Dimension> merged;
  for (const Dimension& inner : dimensions) {
    if (!merged.empty() && merged.back().in_stride == inner.in_stride * inner.size &&
        merged.back().out_stride == inner.out_stride * inner.size) {
      merged.back() = {merged.back().size * inner.size, inner.in_stride, inner.out_stride};
    } else {
      merged.push_back(inner);
    }
  }
  while (merged.size() < 2) merged.insert(merged.begin(), {1, 0, 0});
  if (merged.back().in_stride != 1) {
    const auto line = merged.end() - 1;
    const auto contiguous = std::find_if(merged.begin(), line, [](const Dimension& d) { return d.in_stride == 1; });
    if (contiguous != line) std::rotate(contiguous, contiguous + 1, line);
  }
  return merged;
}

// The tiles of a list of dimensions, and how they are dealt to chunks.
class Tiles {
 public:
  struct Tile {
    int64_t in, out;        // offsets of its first element
    int64_t lines, length;  // of the last two dimensions
  };

  Tiles(std::vector<Dimension> dimensions, double ns_per_element, int num_threads) : dimensions_(std::move(dimensions)) {
    const int64_t length = line().size;
    const int64_t lines = across().size;
    // A transpose wants 16 lines, one cache line of its input, before it wants long ones.
    const int64_t fitting_length = is_transpose() ? kTileFloats / 16 : kTileFloats;
    length_parts_ = std::max<int64_t>(1, (length + fitting_length - 1) / fitting_length);
    const int64_t fitting_lines = std::max<int64_t>(1, kTileFloats * length_parts_ / std::max<int64_t>(1, length));
    line_parts_ = std::max<int64_t>(1, (lines + fitting_lines - 1) / fitting_lines);
    count_ = length_parts_ * line_parts_;
    int64_t elements = length * lines;
    for (size_t d = 0; d + 2 < dimensions_.size(); ++d) {
      count_ *= dimensions_[d].size;
      elements *= dimensions_[d].size;
    }
    if (elements == 0) count_ = 0;
    const int64_t wanted = wanted_chunks(ns_per_element * static_cast<double>(elements), num_threads);
    chunks_ = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, count_));
  }

  const Dimension& line() const { return dimensions_.back(); }
  const Dimension& across() const { return dimensions_[dimensions_.size() - 2]; }
  bool is_transpose() const { return across().in_stride == 1 && line().in_stride != 1; }
  int64_t chunks() const { return chunks_; }
  bool empty() const { return count_ == 0; }
  Range chunk(int64_t part) const { return part_of(count_, part, chunks_); }

  Tile tile(int64_t number) const {
    const Range length = part_of(line().size, number % length_parts_, length_parts_);
    number /= length_parts_;
    const Range lines = part_of(across().size, number % line_parts_, line_parts_);
    number /= line_parts_;
    Tile tile{length.begin * line().in_stride + lines.begin * across().in_stride,
              length.begin * line().out_stride + lines.begin * across().out_stride, lines.end - lines.begin, length.end - length.begin};
    for (size_t d = dimensions_.size() - 2; d-- > 0;) {
      const int64_t i = number % dimensions_[d].size;
      number /= dimensions_[d].size;
      tile.in += i * dimensions_[d].in_stride;
      tile.out += i * dimensions_[d].out_stride;
    }
    return tile;
  }

 private:
  std::vector<Dimension> dimensions_;
  int64_t length_parts_, line_parts_;
  int64_t count_;
  int64_t chunks_;
};

class CopyOp final : public Op {
 public:
  CopyOp(StepSpec step, const KernelTable& kernels, int num_threads)
      : Op(std::move(step)), kernels_(kernels), tiles_(merge_dimensions(read_dimensions(spec_, true)), 0.8, num_threads) {
    const SpecReader reader(spec_);
    const auto source = spec_.constants.find("source");
    if (source == spec_.constants.end()) {
      reader.input(0);
      return;
    }
    reader.check(spec_.inputs.empty(), "takes an input or the constant 'source', not both");
    source_ = source->second.data;
    int64_t elements = 1;
    for (const int64_t size : source->second.sizes) elements *= size;
    int64_t last = 0;
    for (const Dimension& d : read_dimensions(spec_, true)) last += std::max<int64_t>(0, d.size - 1) * d.in_stride;
    reader.check(last < elements || tiles_.empty(), "constant 'source' must have more than " + std::to_string(last) +
                                                                    " elements, got " + std::to_string(elements));
  }

  int64_t chunks_per_sample() const override { return tiles_.chunks(); }
  int64_t scratch_floats() const override { return 0; }
  void compute(const RunView&, int64_t, int64_t, float*) const override {}

  void commit(const RunView& run, int64_t sample, int64_t part, float*) const override {
    const float* in = source_ != nullptr ? source_ : run.row(spec_.inputs[0], sample, 0);
    float* out = run.row(spec_.output, sample, 0);
    const Range range = tiles_.chunk(part);
    for (int64_t t = range.begin; t < range.end; ++t) {
      const Tiles::Tile tile = tiles_.tile(t);
      copy_tile(tile, in + tile.in, out + tile.out);
    }
  }

 private:
  void copy_tile(const Tiles::Tile& tile, const float* in, float* out) const {
    const Dimension& line = tiles_.line();
    const Dimension& across = tiles_.across();
    if (tiles_.is_transpose() && line.out_stride == 1) {
      kernels_.transpose({tile.length, tile.lines, in, line.in_stride, out, across.out_stride});
      return;
    }
    for (int64_t j = 0; j < tile.lines; ++j) {
      const float* from = in + j * across.in_stride;
      float* to = out + j * across.out_stride;
      if (line.in_stride == 1 && line.out_stride == 1) {
        std::memcpy(to, from, tile.length * sizeof(float));
      } else {
        for (int64_t i = 0; i < tile.length; ++i) to[i * line.out_stride] = from[i * line.in_stride];
      }
    }
  }

  const KernelTable& kernels_;
  Tiles tiles_;
  const float* source_ = nullptr;
};

class FillOp final : public Op {
 public:
  FillOp(StepSpec step, int num_threads)
      : Op(std::move(step)), tiles_(merge_dimensions(read_dimensions(spec_, false)), 0.4, num_threads) {
    const auto value = spec_.floats.find("value");
    SpecReader(spec_).check(value != spec_.floats.end() && value->second.size() == 1, "needs floats 'value', one value");
    value_ = value->second[0];
  }

  int64_t chunks_per_sample() const override { return tiles_.chunks(); }
  int64_t scratch_floats() const override { return 0; }
  void compute(const RunView&, int64_t, int64_t, float*) const override {}

  void commit(const RunView& run, int64_t sample, int64_t part, float*) const override {
    float* out = run.row(spec_.output, sample, 0);
    const Range range = tiles_.chunk(part);
    const int64_t stride = tiles_.line().out_stride;
    for (int64_t t = range.begin; t < range.end; ++t) {
      const Tiles::Tile tile = tiles_.tile(t);
      for (int64_t j = 0; j < tile.lines; ++j) {
        float* to = out + tile.out + j * tiles_.across().out_stride;
        for (int64_t i = 0; i < tile.length; ++i) to[i * stride] = value_;
      }
    }
  }

 private:
  Tiles tiles_;
  float value_;
};

}  // namespace

std::unique_ptr<Op> make_copy(StepSpec spec, const KernelTable& kernels, int num_threads) {
  return std::make_unique<CopyOp>(std::move(spec), kernels, num_threads);
}
std::unique_ptr<Op> make_fill(StepSpec spec, const KernelTable&, int num_threads) {
  return std::make_unique<FillOp>(std::move(spec), num_threads);
}

}  // namespace dynprune
