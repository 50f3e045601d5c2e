// The nonzeros of a weight, found once when a plan is built, in the two forms that its products take.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "plan/op.h"

namespace dynprune {

// Row by row: the nonzeros of row r are column[j], value[j] for j from row_start[r] to row_start[r + 1].
struct CsrWeight {
  std::vector<int64_t> row_start;
  std::vector<int32_t> column;
  std::vector<float> value;
};
CsrWeight make_csr(const float* weight, int64_t rows, int64_t columns);

// The weight of a convolution whose reduction is cut into blocks of whole channels. kSparseMaxRows rows side by side that have the
// same nonzero columns form a group and share one list; any other row is a group of its own.
class SparseWeight {
 public:
  // weight: [rows][channels * taps].
  SparseWeight(const float* weight, int64_t rows, int64_t channels, int64_t taps);

  // How many blocks a reduction over `channels` channels has, and the longest one there can be.
  int64_t blocks(int64_t channels) const;
  int64_t max_block() const { return block_channels_ * taps_; }

  // The rows of a chunk and the input channels that run: all of them where `in_index` is null.
  struct Request {
    Range rows;
    const int32_t* row_index;  // nullptr: row i is i
    const int32_t* in_index;
    int64_t in_count;
  };
  // Private memory for requests of at most `max_rows` rows, in floats; more with a list of inputs.
  int64_t scratch_floats(int64_t max_rows, bool gated) const;
  // To be called once for each request, before `select`.
  void prepare(const Request& request, float* scratch) const;
  // The product of the request's rows with block `block` of its inputs; columns count from the block's first. Out rows count from the
  // request's first. Valid until the next call with this scratch. The lists may hold anything: a late reader finds those of another run.
  SparseGemmArgs select(const Request& request, int64_t block, int64_t max_rows, float* scratch) const;

 private:
  struct Group {
    int32_t first_row;
    int32_t rows;
    int64_t first_column;  // in column_
    int64_t count;
    int64_t first_value;  // in value_, [count][rows]
  };

  bool same_columns(const CsrWeight& csr, int64_t first_row) const;
  int64_t channel_of(const Request& request, int64_t row) const;
  SparseRun run_of(const Request& request, int64_t row) const;
  int64_t begin_of(const Group& group, int64_t column) const;
  void keep_active(const Request& request, Range channels, const int32_t* position, SparseRun& run, int32_t* column, float* value) const;

  int64_t channels_;
  int64_t taps_;
  int64_t block_channels_ = 1;
  int64_t max_count_ = 0;  // nonzeros of a row
  std::vector<Group> groups_;
  std::vector<int32_t> group_of_row_;
  std::vector<int32_t> column_;           // of the whole reduction
  std::vector<int32_t> column_in_block_;  // counted from the first of its block, for inputs of which all run
  std::vector<int64_t> block_begin_;      // [group][block]: where the group's nonzeros of the block begin, and one end more
  std::vector<float> value_;
};

}  // namespace dynprune
