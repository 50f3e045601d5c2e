// Operations on single elements: activations, per-channel affine maps, and binary operations with broadcasting.
#include "plan/ops/block_op.h"
#include "plan/ops/row_factories.h"
#include "plan/ops/spec_reader.h"

namespace dynprune {
namespace {

// Expected nanoseconds of an element read and written, by how much arithmetic goes with it.
constexpr double kElementNs = 0.15;
constexpr double kActivationNs = 0.4;

void check_sites(const SpecReader& reader, const StepSpec& spec) {
  reader.check(spec.in_site == spec.out_site,
               "in_site must equal out_site, got " + std::to_string(spec.in_site) + " and " + std::to_string(spec.out_site));
}

double elements(const StepSpec& spec) { return static_cast<double>(spec.output.rows * spec.output.positions); }

class UnaryOp final : public BlockOp {
 public:
  UnaryOp(StepSpec step, const KernelTable& kernels, int num_threads)
      : BlockOp(std::move(step), kernels), activation_(SpecReader(spec_).activation()) {
    const SpecReader reader(spec_);
    check_sites(reader, spec_);
    reader.check_rows("the input", reader.input(0), spec_.output.rows, spec_.output.positions);
    BlockLimits limits;
    const bool cheap = FusedClamp(activation_).is_whole() || activation_.kind == Activation::kHardSwish;
    limits.total_ns = (cheap ? kElementNs : kActivationNs) * elements(spec_);
    limits.direct = cheap ? Direct::kCheap : Direct::kAlone;
    cut(limits, spec_.out_site, num_threads);
  }

 protected:
  void compute_block(const RunView& run, int64_t sample, const Block& block, float* out, float*) const override {
    const Rows& in = spec_.inputs[0];
    kernels_.epilogue({block.rows.end - block.rows.begin, block.positions.end - block.positions.begin,
                       run.row(in, sample, block.rows.begin) + block.positions.begin, in.row_stride, nullptr, nullptr, 0, out,
                       block.stride, activation_});
  }

 private:
  ActivationSpec activation_;
};

class AffineOp final : public BlockOp {
 public:
  AffineOp(StepSpec step, const KernelTable& kernels, int num_threads)
      : BlockOp(std::move(step), kernels), clamp_(SpecReader(spec_).activation()) {
    const SpecReader reader(spec_);
    check_sites(reader, spec_);
    reader.check_rows("the input", reader.input(0), spec_.output.rows, spec_.output.positions);
    scale_ = reader.constant("scale", {spec_.output.rows});
    shift_ = reader.constant("shift", {spec_.output.rows});
    BlockLimits limits;
    limits.total_ns = (kElementNs + (clamp_.is_whole() ? 0.0 : kActivationNs)) * elements(spec_);
    limits.direct = clamp_.is_whole() ? Direct::kCheap : Direct::kAlone;
    cut(limits, spec_.out_site, num_threads);
  }

 protected:
  void compute_block(const RunView& run, int64_t sample, const Block& block, float* out, float*) const override {
    const Rows& in = spec_.inputs[0];
    const int64_t rows = block.rows.end - block.rows.begin;
    kernels_.affine({rows, block.positions.end - block.positions.begin,
                     run.row(in, sample, block.rows.begin) + block.positions.begin, in.row_stride, scale_, shift_,
                     block.index != nullptr ? block.index + block.rows.begin : nullptr, block.rows.begin, clamp_.low, clamp_.high, out,
                     block.stride});
    clamp_.apply_rest(kernels_, rows, block.positions.end - block.positions.begin, out, block.stride);
  }

 private:
  FusedClamp clamp_;
  const float* scale_;
  const float* shift_;
};

class BinaryOp final : public BlockOp {
 public:
  BinaryOp(StepSpec step, const KernelTable& kernels, int num_threads)
      : BlockOp(std::move(step), kernels), activation_(SpecReader(spec_).activation()), clamp_(activation_) {
    const SpecReader reader(spec_);
    check_sites(reader, spec_);
    const Rows& out = spec_.output;
    const int64_t kind = reader.integer("kind");
    reader.check(kind >= 0 && kind <= static_cast<int64_t>(Binary::kMin), "kind must be 0 to 5, got " + std::to_string(kind));
    kind_ = static_cast<Binary>(kind);
    reverse_ = reader.integer("reverse", 0) != 0;
    reader.check_rows("the first input", reader.input(0), out.rows, out.positions);
    constant_ = spec_.constants.count("operand") != 0;
    const size_t inputs = constant_ ? 1 : 2;
    reader.check(spec_.inputs.size() == inputs,
                 "must have " + std::to_string(inputs) + " inputs, got " + std::to_string(spec_.inputs.size()));
    if (constant_) {
      read_constant(reader);
    } else {
      read_second_input(reader);
    }
    handover_ = reader.integer("handover", -1);
    reader.check(handover_ >= -1 && handover_ < static_cast<int64_t>(inputs),
                 "handover must name an input, got " + std::to_string(handover_));
    if (handover_ >= 0) reader.check_rows("the input handed over", spec_.inputs[handover_], out.rows, out.positions);
    BlockLimits limits;
    limits.total_ns = (1.5 * kElementNs + (clamp_.is_whole() ? 0.0 : kActivationNs)) * elements(spec_);
    limits.direct = clamp_.is_whole() ? Direct::kCheap : Direct::kAlone;
    cut(limits, spec_.out_site, num_threads);
  }

  void skip(const RunView& run, int64_t sample, int64_t part) const override {
    if (handover_ < 0) return;
    const Block block = block_of(run, sample, part);
    const Rows& in = spec_.inputs[handover_];
    kernels_.epilogue({block.rows.end - block.rows.begin, block.positions.end - block.positions.begin,
                       run.row(in, sample, block.rows.begin) + block.positions.begin, in.row_stride, nullptr, nullptr, 0,
                       run.row(spec_.output, sample, block.rows.begin) + block.positions.begin, spec_.output.row_stride, activation_});
  }

  bool hands_over() const override { return handover_ >= 0; }

 protected:
  void compute_block(const RunView& run, int64_t sample, const Block& block, float* out, float*) const override {
    const Rows& a = spec_.inputs[0];
    const int64_t rows = block.rows.end - block.rows.begin;
    const float* b = constant_ ? operand_ : run.row(spec_.inputs[1], sample, 0);
    const bool by_channel = constant_ && block.index != nullptr;  // a constant's rows are true channels, an input's are compact
    kernels_.binary({kind_, reverse_, rows, block.positions.end - block.positions.begin,
                     run.row(a, sample, block.rows.begin) + block.positions.begin, a.row_stride,
                     b + (b_scalar_ ? 0 : block.positions.begin), b_stride_, b_scalar_,
                     by_channel ? block.index + block.rows.begin : nullptr, block.rows.begin, clamp_.low, clamp_.high, out, block.stride});
    clamp_.apply_rest(kernels_, rows, block.positions.end - block.positions.begin, out, block.stride);
  }

 private:
  void read_constant(const SpecReader& reader) {
    const std::vector<int64_t>& sizes = spec_.constants.at("operand").sizes;
    const Rows& out = spec_.output;
    reader.check(sizes.size() == 2 && (sizes[0] == 1 || sizes[0] == out.rows) && (sizes[1] == 1 || sizes[1] == out.positions),
                 "constant 'operand' must be [1 or " + std::to_string(out.rows) + ", 1 or " + std::to_string(out.positions) + "]");
    operand_ = spec_.constants.at("operand").data;
    b_stride_ = sizes[0] == 1 ? 0 : sizes[1];
    b_scalar_ = sizes[1] == 1;
  }

  void read_second_input(const SpecReader& reader) {
    const Rows& b = spec_.inputs[1];
    const Rows& out = spec_.output;
    reader.check((b.rows == out.rows || b.rows == 1 || b.row_stride == 0) && (b.positions == out.positions || b.positions == 1),
                 "the second input must have " + std::to_string(out.rows) + " rows or repeat one, of " + std::to_string(out.positions) +
                     " positions or 1, got " + std::to_string(b.rows) + " of " + std::to_string(b.positions));
    b_stride_ = b.rows == 1 ? 0 : b.row_stride;
    b_scalar_ = b.positions == 1;
  }

  ActivationSpec activation_;
  FusedClamp clamp_;
  Binary kind_;
  bool reverse_;
  bool constant_;
  const float* operand_ = nullptr;
  int64_t b_stride_ = 0;
  bool b_scalar_ = false;
  int64_t handover_;
};

}  // namespace

std::unique_ptr<Op> make_unary(StepSpec spec, const KernelTable& kernels, int num_threads) {
  return std::make_unique<UnaryOp>(std::move(spec), kernels, num_threads);
}
std::unique_ptr<Op> make_affine(StepSpec spec, const KernelTable& kernels, int num_threads) {
  return std::make_unique<AffineOp>(std::move(spec), kernels, num_threads);
}
std::unique_ptr<Op> make_binary(StepSpec spec, const KernelTable& kernels, int num_threads) {
  return std::make_unique<BinaryOp>(std::move(spec), kernels, num_threads);
}

}  // namespace dynprune
