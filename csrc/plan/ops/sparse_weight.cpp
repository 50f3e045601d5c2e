#include "plan/ops/sparse_weight.h"

#include <algorithm>

namespace dynprune {
namespace {

// A panel of 128 x 64 floats stays in a first-level cache, which a row that reads its panel rows in no order needs more than a dense
// one. Where a row has few nonzeros in so short a block, loading and storing its sums costs more than that, so blocks grow to 384.
constexpr int64_t kMinBlock = 128;
constexpr int64_t kMaxBlock = 384;
constexpr int64_t kNonzerosPerBlock = 24;

constexpr int64_t kRunFloats = sizeof(SparseRun) / sizeof(float);

}  // namespace

CsrWeight make_csr(const float* weight, int64_t rows, int64_t columns) {
  CsrWeight csr;
  csr.row_start.reserve(rows + 1);
  csr.row_start.push_back(0);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const float w = weight[r * columns + c];
      if (w == 0.0f) continue;
      csr.column.push_back(static_cast<int32_t>(c));
      csr.value.push_back(w);
    }
    csr.row_start.push_back(static_cast<int64_t>(csr.column.size()));
  }
  return csr;
}

SparseWeight::SparseWeight(const float* weight, int64_t rows, int64_t channels, int64_t taps) : channels_(channels), taps_(taps) {
  const CsrWeight csr = make_csr(weight, rows, channels * taps);
  const int64_t nonzeros = std::max<int64_t>(1, static_cast<int64_t>(csr.column.size()));
  const int64_t block = std::clamp(kNonzerosPerBlock * rows * channels * taps / nonzeros, kMinBlock, kMaxBlock);
  block_channels_ = std::max<int64_t>(1, block / taps);
  for (int64_t r = 0; r < rows;) {
    const int32_t together = r + kSparseMaxRows <= rows && same_columns(csr, r) ? kSparseMaxRows : 1;
    const int64_t count = csr.row_start[r + 1] - csr.row_start[r];
    groups_.push_back({static_cast<int32_t>(r), together, static_cast<int64_t>(column_.size()), count, static_cast<int64_t>(value_.size())});
    column_.insert(column_.end(), csr.column.begin() + csr.row_start[r], csr.column.begin() + csr.row_start[r + 1]);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = 0; i < together; ++i) value_.push_back(csr.value[csr.row_start[r + i] + j]);
    }
    for (int64_t i = 0; i < together; ++i) group_of_row_.push_back(static_cast<int32_t>(groups_.size() - 1));
    max_count_ = std::max(max_count_, count);
    r += together;
  }
  const int64_t num_blocks = blocks(channels_);
  column_in_block_ = column_;
  for (const Group& group : groups_) {
    for (int64_t b = 0; b <= num_blocks; ++b) block_begin_.push_back(begin_of(group, part_of(channels_, b, num_blocks).begin * taps_));
    for (int64_t b = 0; b < num_blocks; ++b) {
      const auto first = static_cast<int32_t>(part_of(channels_, b, num_blocks).begin * taps_);
      const int64_t* bounds = block_begin_.data() + block_begin_.size() - (num_blocks + 1) + b;
      for (int64_t j = bounds[0]; j < bounds[1]; ++j) column_in_block_[group.first_column + j] -= first;
    }
  }
}

int64_t SparseWeight::blocks(int64_t channels) const { return std::max<int64_t>(1, (channels + block_channels_ - 1) / block_channels_); }

bool SparseWeight::same_columns(const CsrWeight& csr, int64_t first_row) const {
  const int64_t begin = csr.row_start[first_row];
  const int64_t count = csr.row_start[first_row + 1] - begin;
  for (int64_t i = 1; i < kSparseMaxRows; ++i) {
    const int64_t other = csr.row_start[first_row + i];
    if (csr.row_start[first_row + i + 1] - other != count) return false;
    if (!std::equal(csr.column.begin() + begin, csr.column.begin() + begin + count, csr.column.begin() + other)) return false;
  }
  return true;
}

// How many nonzeros of the group stand before a column of the whole reduction.
int64_t SparseWeight::begin_of(const Group& group, int64_t column) const {
  const int32_t* first = column_.data() + group.first_column;
  return std::lower_bound(first, first + group.count, static_cast<int32_t>(column)) - first;
}

// Where the parts of a request's scratch lie: runs, then each channel's place among those that run, then columns and values of these.
int64_t SparseWeight::scratch_floats(int64_t max_rows, bool gated) const {
  const int64_t runs = align(max_rows * kRunFloats);
  return gated ? runs + align(channels_) + 2 * align(max_rows * std::min(max_count_, max_block())) : runs;
}

void SparseWeight::prepare(const Request& request, float* scratch) const {
  if (request.in_index == nullptr) return;
  auto* position = reinterpret_cast<int32_t*>(scratch);
  std::fill_n(position, channels_, -1);
  for (int64_t i = 0; i < request.in_count; ++i) {
    const int32_t channel = request.in_index[i];
    if (channel >= 0 && channel < channels_) position[channel] = static_cast<int32_t>(i);
  }
}

int64_t SparseWeight::channel_of(const Request& request, int64_t row) const {
  const int64_t channel = request.row_index != nullptr ? request.row_index[row] : row;
  return std::clamp<int64_t>(channel, 0, static_cast<int64_t>(group_of_row_.size()) - 1);
}

// The run that begins at row `row` of the request, with all its columns: the rows of a group where all of them run, else one.
SparseRun SparseWeight::run_of(const Request& request, int64_t row) const {
  const int64_t channel = channel_of(request, row);
  const Group& group = groups_[group_of_row_[channel]];
  const bool whole = group.rows > 1 && channel == group.first_row && row + group.rows <= request.rows.end &&
                     channel_of(request, row + group.rows - 1) == channel + group.rows - 1;
  return {static_cast<int32_t>(row - request.rows.begin),
          whole ? group.rows : 1,
          static_cast<int32_t>(group.count),
          group.rows,
          group.first_column,
          group.first_value + (channel - group.first_row)};
}

SparseGemmArgs SparseWeight::select(const Request& request, int64_t block, int64_t max_rows, float* scratch) const {
  auto* position = reinterpret_cast<int32_t*>(scratch);
  float* rest = scratch + (request.in_index != nullptr ? align(channels_) : 0);
  auto* runs = reinterpret_cast<SparseRun*>(rest);
  auto* column = reinterpret_cast<int32_t*>(rest + align(max_rows * kRunFloats));
  auto* value = reinterpret_cast<float*>(column) + align(max_rows * std::min(max_count_, max_block()));
  const int64_t num_blocks = blocks(request.in_count);
  const Range channels = part_of(request.in_count, block, num_blocks);
  int64_t num_runs = 0;
  int64_t first_column = 0;
  int64_t first_value = 0;
  for (int64_t row = request.rows.begin; row < request.rows.end; row += runs[num_runs++].rows) {
    SparseRun& run = runs[num_runs];
    run = run_of(request, row);
    if (request.in_index == nullptr) {
      const int64_t* bounds = block_begin_.data() + group_of_row_[channel_of(request, row)] * (num_blocks + 1) + block;
      run.count = static_cast<int32_t>(bounds[1] - bounds[0]);
      run.first_column += bounds[0];
      run.first_value += bounds[0] * run.value_stride;
    } else {
      keep_active(request, channels, position, run, column + first_column, value + first_value);
      run.first_column = first_column;
      run.first_value = first_value;
      first_column += run.count;
      first_value += run.count * run.rows;
    }
  }
  const bool gated = request.in_index != nullptr;
  SparseGemmArgs product{};
  product.runs = runs;
  product.num_runs = num_runs;
  product.column = gated ? column : column_in_block_.data();
  product.value = gated ? value : value_.data();
  product.accumulate = block > 0;
  return product;
}

// Copies the nonzeros whose channel runs and lies in the block; they become the run's.
void SparseWeight::keep_active(const Request& request, Range channels, const int32_t* position, SparseRun& run, int32_t* column,
                               float* value) const {
  const int32_t* all = column_.data() + run.first_column;
  const float* weight = value_.data() + run.first_value;
  const int64_t total = run.count;
  int64_t kept = 0;
  if (channels.end > channels.begin) {
    const auto true_channel = [&](int64_t i) { return std::clamp<int64_t>(request.in_index[i], 0, channels_ - 1); };
    const auto first = static_cast<int32_t>(true_channel(channels.begin) * taps_);
    const auto last = static_cast<int32_t>((true_channel(channels.end - 1) + 1) * taps_);
    for (int64_t j = std::lower_bound(all, all + total, first) - all; j < total && all[j] < last; ++j) {
      const int64_t channel = all[j] / taps_;
      const int64_t place = position[channel];
      if (place < channels.begin || place >= channels.end) continue;
      column[kept] = static_cast<int32_t>((place - channels.begin) * taps_ + all[j] - channel * taps_);
      for (int64_t i = 0; i < run.rows; ++i) value[kept * run.rows + i] = weight[j * run.value_stride + i];
      ++kept;
    }
  }
  run.count = static_cast<int32_t>(kept);
  run.value_stride = run.rows;
}

}  // namespace dynprune
