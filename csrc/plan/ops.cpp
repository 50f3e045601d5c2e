#include "plan/ops.h"

#include <stdexcept>
#include <string>

#include "plan/ops/factories.h"
#include "plan/ops/row_factories.h"

namespace dynprune {
namespace {

struct Factory {
  const char* op;
  std::unique_ptr<Op> (*make)(StepSpec spec, const KernelTable& kernels, int num_threads);
};

constexpr Factory kFactories[] = {
    {"conv", make_conv},
    {"linear", make_linear},
    {"depthwise", make_depthwise},
    {"pool", make_pool},
    {"adaptive_pool", make_adaptive_pool},
    {"mean", make_mean},
    {"unary", make_unary},
    {"affine", make_affine},
    {"binary", make_binary},
    {"layer_norm", make_layer_norm},
    {"rms_norm", make_rms_norm},
    {"softmax", make_softmax},
    {"attention", make_attention},
    {"matmul", make_matmul},
    {"embedding", make_embedding},
    {"resample", make_resample},
    {"copy", make_copy},
    {"fill", make_fill},
};

}  // namespace

std::unique_ptr<Op> make_op(StepSpec spec, const KernelTable& kernels, int num_threads) {
  for (const Factory& factory : kFactories) {
    if (spec.op == factory.op) return factory.make(std::move(spec), kernels, num_threads);
  }
  std::string known;
  for (const Factory& factory : kFactories) known += (known.empty() ? "" : ", ") + std::string(factory.op);
  throw std::invalid_argument("step '" + spec.name + "': op must be one of " + known + ", got '" + spec.op + "'.");
}

}  // namespace dynprune
