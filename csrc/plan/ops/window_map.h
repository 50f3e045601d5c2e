// The window of a depthwise or pool step, and the lines its input rows are laid out in, worked out once per plan.
#pragma once

#include <vector>

#include "kernels.h"
#include "plan/ops/conv_tiling.h"
#include "plan/ops/spec_reader.h"

namespace dynprune {

class WindowMap {
 public:
  // Checks the operands too: both have the channels and positions that the sizes say.
  WindowMap(const StepSpec& spec, int lanes);
  WindowMap(const WindowMap&) = delete;
  WindowMap& operator=(const WindowMap&) = delete;

  const ConvShape& shape() const { return shape_; }
  const Window& window() const { return window_; }
  const WindowLines& lines() const { return lines_; }
  // How many input rows `num_rows` output rows see, padding included.
  int64_t rows_seen(int64_t num_rows) const {
    return (num_rows - 1) * window_.stride_y + (window_.kernel_height - 1) * window_.dilation_y + 1;
  }

 private:
  ConvShape shape_;
  Window window_;
  std::vector<int32_t> tap_offset_;
  WindowLines lines_;
};

}  // namespace dynprune
