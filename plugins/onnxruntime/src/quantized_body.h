// Only multiply_quantized of kernels_body.h, for a set that differs from a simpler one in these products.
#include "kernels.h"

namespace rq {
namespace {

#include "loops.h"
#include "panel_groups.h"
#include "quantized_numbers.h"
#include "quantized_kernel.h"

}  // namespace
}  // namespace rq
