#include "plan/ops/window_map.h"

#include <string>

namespace dynprune {
namespace {

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

void check_axis(const SpecReader& reader, const char* axis, int64_t in, int64_t out, int64_t stride, int64_t pad) {
  reader.check((out - 1) * stride < in + pad, std::string("the last window must begin before the end of the input's ") + axis + " " +
                                                  std::to_string(in) + ", got out_size " + std::to_string(out) + " at stride " +
                                                  std::to_string(stride));
}

}  // namespace

WindowMap::WindowMap(const StepSpec& spec, int lanes) : shape_(read_conv_shape(spec)) {
  const SpecReader reader(spec);
  reader.check(shape_.in_channels == shape_.out_channels, "in_size and out_size must have the same channels, got " +
                                                              std::to_string(shape_.in_channels) + " and " +
                                                              std::to_string(shape_.out_channels));
  reader.check(spec.in_site == spec.out_site, "in_site must equal out_site, got " + std::to_string(spec.in_site) + " and " +
                                                  std::to_string(spec.out_site));
  reader.check_rows("the input", reader.input(0), shape_.in_channels, shape_.in_positions());
  reader.check_rows("the output", spec.output, shape_.out_channels, shape_.positions());
  check_axis(reader, "height", shape_.in_height, shape_.out_height, shape_.stride_y, shape_.pad_top);
  check_axis(reader, "width", shape_.in_width, shape_.out_width, shape_.stride_x, shape_.pad_left);
  window_ = {shape_.in_height, shape_.in_width, shape_.out_height, shape_.out_width, shape_.kernel_height, shape_.kernel_width,
             shape_.stride_y,  shape_.stride_x, shape_.pad_top,    shape_.pad_left,  shape_.dilation_y,    shape_.dilation_x};
  const int64_t reach = (shape_.kernel_width - 1) * shape_.dilation_x / shape_.stride_x;
  const int64_t phase_width = round_up(round_up(shape_.out_width, lanes) + reach, lanes);
  for (int64_t s = 0; s < shape_.kernel_width; ++s) {
    const int64_t column = s * shape_.dilation_x;
    tap_offset_.push_back(static_cast<int32_t>(column % shape_.stride_x * phase_width + column / shape_.stride_x));
  }
  lines_ = {tap_offset_.data(), phase_width, shape_.stride_x * phase_width};
}

}  // namespace dynprune
