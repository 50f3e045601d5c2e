// Reads the attributes of a step with one way to word an error: the step, what was expected, what came.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "plan/op.h"

namespace dynprune {

class SpecReader {
 public:
  explicit SpecReader(const StepSpec& spec) : spec_(spec) {}

  void check(bool condition, const std::string& expectation) const {
    if (!condition) throw std::invalid_argument("step '" + spec_.name + "' (" + spec_.op + "): " + expectation + ".");
  }

  // The ints named `name`, exactly `count` of them; `fallback` where the name is absent and a fallback is given.
  std::vector<int64_t> ints(const std::string& name, size_t count, const std::vector<int64_t>& fallback = {}) const {
    const auto found = spec_.ints.find(name);
    if (found == spec_.ints.end()) {
      check(!fallback.empty(), "needs ints '" + name + "'");
      return fallback;
    }
    check(found->second.size() == count,
          "'" + name + "' must hold " + std::to_string(count) + " ints, got " + std::to_string(found->second.size()));
    return found->second;
  }

  int64_t integer(const std::string& name) const { return ints(name, 1)[0]; }
  int64_t integer(const std::string& name, int64_t fallback) const { return ints(name, 1, {fallback})[0]; }

  // The constant named `name`, of exactly these sizes; nullptr where it is absent and not required.
  const float* constant(const std::string& name, const std::vector<int64_t>& sizes, bool required = true) const {
    const auto found = spec_.constants.find(name);
    if (found == spec_.constants.end()) {
      check(!required, "needs constant '" + name + "'");
      return nullptr;
    }
    check(found->second.sizes == sizes, "constant '" + name + "' must be " + text(sizes) + ", got " + text(found->second.sizes));
    return found->second.data;
  }

  ActivationSpec activation() const {
    const int64_t kind = integer("activation", 0);
    check(kind >= 0 && kind <= static_cast<int64_t>(Activation::kLog), "unknown activation " + std::to_string(kind));
    ActivationSpec result;
    result.kind = static_cast<Activation>(kind);
    const auto found = spec_.floats.find("activation");
    if (found != spec_.floats.end()) {
      check(found->second.size() == 2, "floats 'activation' must hold 2 values");
      result.low = found->second[0];
      result.high = found->second[1];
    }
    return result;
  }

  // Input number `index`, which must exist.
  const Rows& input(size_t index) const {
    check(index < spec_.inputs.size(), "needs " + std::to_string(index + 1) + " inputs, got " + std::to_string(spec_.inputs.size()));
    return spec_.inputs[index];
  }

  void check_rows(const char* what, const Rows& rows, int64_t expected_rows, int64_t expected_positions) const {
    check(rows.rows == expected_rows && rows.positions == expected_positions,
          std::string(what) + " must have " + std::to_string(expected_rows) + " rows of " + std::to_string(expected_positions) +
              " positions, got " + std::to_string(rows.rows) + " of " + std::to_string(rows.positions));
  }

 private:
  static std::string text(const std::vector<int64_t>& sizes) {
    std::string result = "[";
    for (size_t i = 0; i < sizes.size(); ++i) result += (i ? ", " : "") + std::to_string(sizes[i]);
    return result + "]";
  }

  const StepSpec& spec_;
};

}  // namespace dynprune
