// The format groups of the ops of rq.moe, in Python `FORMAT_GROUPS` of rq_compile/engine/library.py. The entry of a slot in the
// attribute `formats` is the place of its group here. A node has as inputs, in this order, the tensors of every group that one of
// its slots is in; then comes the bias, if there is one. A new group comes last, so that nodes keep their meaning.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>

namespace rq {

struct FormatGroup {
  const char* name;
  const char* weights;  // the inputs' names
  const char* scales;   // null: floats, without scales
  int bits;             // of a quantized weight
  bool exponents;       // whether scales are exponents of powers of two, in a byte, instead of fp32
  bool mixes;           // whether the GPU kernels support it in a layer with other groups

  // Whether layers with the group have GPU kernels of their own, whatever other groups they have.
  constexpr bool few_bits() const { return bits > 0 && bits < 4; }
};

constexpr FormatGroup kFormatGroups[] = {
    {"float", "float_weights", nullptr, 0, false, true},
    {"int8", "int8_packed", "int8_scales", 8, false, true},
    {"int4", "int4_packed", "int4_scales", 4, false, true},
    {"mxfp4", "mxfp4_packed", "mxfp4_scales", 4, true, false},
    {"fp8", "fp8_packed", "fp8_scales", 8, false, false},
    {"int3", "int3_packed", "int3_scales", 3, false, true},
    {"int2", "int2_packed", "int2_scales", 2, false, true},
};
constexpr size_t kGroups = std::size(kFormatGroups), kGpuGroups = 7;  // the GPU kernels read the first of them

// The most inputs that a node has for them: the tensors of all groups and the bias.
constexpr size_t most_operands() {
  size_t count = 1;
  for (const FormatGroup& group : kFormatGroups) count += group.scales ? 2 : 1;
  return count;
}

constexpr bool is_group(int64_t code, size_t groups = kGroups) { return code >= 0 && code < static_cast<int64_t>(groups); }

// "0 is float, 1 is int8, ...", for messages.
inline std::string known_groups(size_t groups = kGroups) {
  std::string text;
  for (size_t g = 0; g < groups; ++g) text += (g ? ", " : "") + std::to_string(g) + " is " + kFormatGroups[g].name;
  return text;
}

}  // namespace rq
