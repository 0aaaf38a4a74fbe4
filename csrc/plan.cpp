#include "plan.h"

#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>

namespace dwconv {
namespace {

bool claims_everything(const Problem&) {
  return true;
}

// kernels/window_nchw.cu addresses a plane with 32-bit offsets and keeps three rows of the window in registers.
bool claims_window_nchw(const Problem& p) {
  if (p.pass == Pass::kGradWeight || p.dtype == DType::kFloat64) return false;
  if (p.kernel_h != 3 || p.kernel_w != 3) return false;
  if (p.stride_h != 1 || p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  // grad_input is a forward pass over the output's gradient; with a multiplier it would have to sum over filters.
  if (p.pass == Pass::kGradInput && p.multiplier != 1) return false;
  const auto is_row_major = [](const View& view, int64_t height, int64_t width) {
    const int64_t row = view.stride[2];
    return (view.stride[3] == 1 || width == 1) && row >= 0 &&
           (height + 2) * row + width < std::numeric_limits<int32_t>::max();
  };
  const bool forward = p.pass == Pass::kForward;
  const int64_t rows = forward ? p.out_height : p.height, columns = forward ? p.out_width : p.width;
  constexpr int64_t kMaxPadding = 1 << 20;  // keeps row and column numbers far inside 32 bits
  return is_row_major(p.input, p.height, p.width) && is_row_major(p.output, p.out_height, p.out_width) &&
         p.padding_h < kMaxPadding && p.padding_w < kMaxPadding &&
         p.filters() < (int64_t{1} << 30) / (rows / 8 + 1) / columns;  // threads of one image
}

}  // namespace

const std::vector<Plan>& plans() {
  static const std::vector<Plan> table = {
      {PlanId::kWindowNchw, "window_nchw", "3x3, stride 1, rows contiguous in memory: a window of rows in registers",
       claims_window_nchw},
      {PlanId::kGeneric, "generic", "no specialised plan claims this problem", claims_everything},
  };
  return table;
}

const Plan& choose(const Problem& problem) {
  for (const Plan& plan : plans())
    if (plan.claims(problem)) return plan;
  std::abort();  // unreachable: the last plan claims everything
}

const Plan& choose(const Problem& problem, std::string_view name) {
  for (const Plan& plan : plans()) {
    if (name != plan.name) continue;
    if (plan.claims(problem)) return plan;
    throw std::runtime_error("plan '" + std::string(name) + "' does not serve this problem");
  }
  throw std::runtime_error("there is no plan '" + std::string(name) + "'");
}

}  // namespace dwconv
