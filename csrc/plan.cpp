#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels/stream.h"

namespace dwconv {
namespace {

bool claims_everything(const Problem&) {
  return true;
}

// Whether rows and planes of an array (N, planes, height, width) follow each other without a gap, so that they can
// stream: images may lie apart, if all of them lie alike within the 16 bytes that are copied at once.
bool is_stream(const View& view, int64_t batch, int64_t planes, int64_t height, int64_t width, int64_t element) {
  const int64_t image = planes * height * width;
  if (!(view.stride[3] == 1 || width == 1) || !(view.stride[2] == width || height == 1) ||
      !(view.stride[1] == height * width || planes == 1))
    return false;
  // Rows are counted, and a row's bytes added up, in 32 bits.
  if (width > (1 << 20) || height > (1 << 30) || planes > (1 << 30) / height || batch > (1 << 30) / (planes * height))
    return false;
  return batch == 1 || view.stride[0] == image ||
         (view.stride[0] * element % kUnit == 0 && image * element % kUnit == 0 && view.stride[0] > image);
}

bool is_joined(const View& view, int64_t batch, int64_t image) {
  return batch == 1 || view.stride[0] == image;
}

// The kernels that kernels/stream_nchw.cu and kernels/stream_grad_weight_nchw.cu are compiled for.
bool has_tile(const Problem& p, bool spread) {
  const auto is = [&](int64_t h, int64_t w, int64_t stride, int64_t dilation) {
    return p.kernel_h == h && p.kernel_w == w && p.stride_h == stride && p.stride_w == stride &&
           p.dilation_h == dilation && p.dilation_w == dilation;
  };
  for (const int64_t side : {3, 5, 7})
    if (is(side, side, 2, 1)) return !spread || p.padding_h % 2 == p.padding_w % 2;
  if (spread) return false;
  return is(1, 1, 1, 1) || is(3, 3, 1, 1) || is(5, 5, 1, 1) || is(7, 7, 1, 1) || is(3, 3, 1, 2) || is(1, 11, 1, 1) ||
         is(11, 1, 1, 1);
}

// What all kernels that stream have in common.
bool can_stream(const Problem& p) {
  const int64_t element = size_of(p.dtype);
  return p.dtype != DType::kFloat64 && p.batch > 0 && p.padding_h <= (p.kernel_h - 1) * p.dilation_h &&
         p.padding_w <= (p.kernel_w - 1) * p.dilation_w &&
         is_stream(p.input, p.batch, p.channels, p.height, p.width, element) &&
         is_stream(p.output, p.batch, p.filters(), p.out_height, p.out_width, element);
}

// What kernels/stream_nchw.cuh asks for, and `filter_bytes` more of shared memory for each filter.
bool fits_stream_nchw(const Problem& p, int64_t filter_bytes) {
  const bool forward = p.pass == Pass::kForward;
  const int64_t element = size_of(p.dtype), extent = (p.kernel_h - 1) * p.dilation_h + 1;
  // If one of the arrays is not joined, both go image by image.
  const int64_t in_image = p.channels * p.height * p.width, out_image = p.filters() * p.out_height * p.out_width;
  if ((is_joined(p.input, p.batch, in_image) != is_joined(p.output, p.batch, out_image)) &&
      (in_image * element % kUnit != 0 || out_image * element % kUnit != 0))
    return false;
  const auto fits_int = [](int64_t stride) {
    return stride < std::numeric_limits<int32_t>::max() / 16 && stride > std::numeric_limits<int32_t>::min() / 16;
  };
  if (!fits_int(p.weight.stride[2]) || !fits_int(p.weight.stride[3])) return false;

  const int64_t source_bytes = (forward ? p.width : p.out_width) * element;
  const int64_t target_bytes = (forward ? p.out_width : p.width) * element;
  const int64_t source_height = forward ? p.height : p.out_height, target_height = forward ? p.out_height : p.height;
  constexpr int64_t kDepth = 2;
  if (!forward && p.multiplier > 1) {  // a sum over filters: whole planes only
    const int64_t rows = rows_for_planes(kDepth, p.multiplier * source_height, source_bytes);
    return kHead + ring_bytes(rows, source_bytes) + round_up(target_height * target_bytes + kUnit, 128) +
               p.multiplier * filter_bytes <=
           p.shared_memory;
  }
  const int64_t rows = std::min<int64_t>(kLeastRows, target_height);
  const int64_t step = forward ? rows * p.stride_h : (rows + p.stride_h - 1) / p.stride_h;
  const int64_t ring = rows_for_bands(kDepth, (target_height + rows - 1) / rows, step, extent, source_bytes);
  return kHead + ring_bytes(ring, source_bytes) + round_up(rows * target_bytes + kUnit, 128) + filter_bytes <=
         p.shared_memory;
}

int64_t target_width(const Problem& p) {
  return p.pass == Pass::kGradInput ? p.width : p.out_width;
}

constexpr int64_t kTileColumns = 7;  // of kernels/stream_nchw.cu and kernels/stream_grad_weight_nchw.cu

bool claims_stream_nchw(const Problem& p) {
  const bool spread = p.pass == Pass::kGradInput && p.stride_h > 1;
  if (p.pass == Pass::kGradWeight || !has_tile(p, spread) || target_width(p) < kTileColumns) return false;
  if (p.pass == Pass::kGradInput && p.multiplier > 1 && !spread)  // sums over filters are compiled for some tiles only
    if (p.kernel_h != p.kernel_w || p.kernel_h == 1 || p.dilation_h > 1) return false;
  return can_stream(p) && fits_stream_nchw(p, 0);
}

bool claims_toeplitz_nchw(const Problem& p) {
  if (size_of(p.dtype) != 2 || p.capability < 80 || p.pass == Pass::kGradWeight) return false;
  if (p.stride_h != p.stride_w || p.stride_h > 2 || (p.stride_h == 2 && p.pass == Pass::kGradInput)) return false;
  if (p.dilation_h != 1 || p.dilation_w != 1) return false;
  // The columns of a band matrix, and the rows that it is compiled for.
  const bool rows =
      p.stride_h == 1 ? p.kernel_h <= 7 || p.kernel_h == 11 : p.kernel_h == 3 || p.kernel_h == 5 || p.kernel_h == 7;
  if (p.kernel_w > kMaxBandColumns || !rows) return false;
  // A warp computes 8 tiles of 16 columns at once: small planes do not fill it. Where CUDA cores have a tile, they are
  // as fast for small kernels, and for 5x5 unless pixels can be read in pairs.
  const int64_t pixels = target_width(p) * (p.pass == Pass::kForward ? p.out_height : p.height);
  if (pixels < (p.stride_h == 1 ? 196 : 512)) return false;
  const int64_t width = p.pass == Pass::kForward ? p.width : p.out_width;
  const bool pays = p.taps() >= 36 || (p.taps() >= 25 && p.stride_h == 1 && width % 2 == 0);
  if (!pays && claims_stream_nchw(p)) return false;
  return can_stream(p) && fits_stream_nchw(p, kChunkBytes + kBandHeadBytes + p.kernel_h * kBandRowBytes);
}

bool claims_stream_grad_weight_nchw(const Problem& p) {
  if (p.pass != Pass::kGradWeight || !has_tile(p, false) || p.out_width < kTileColumns || !can_stream(p)) return false;
  if (p.filters() > (1 << 30) / (p.taps() + 1)) return false;  // sums are counted in 32 bits
  const int64_t source_bytes = p.width * size_of(p.dtype), grad_bytes = p.out_width * size_of(p.dtype);
  const int64_t extent = (p.kernel_h - 1) * p.dilation_h + 1, rows = std::min<int64_t>(kLeastRows, p.out_height);
  constexpr int64_t kDepth = 2, kThreads = 256 + 32;
  const int64_t source =
      rows_for_bands(kDepth, (p.out_height + rows - 1) / rows, rows * p.stride_h, extent, source_bytes);
  const int64_t grad = rows_for_planes(kDepth, rows, grad_bytes);
  return kHead + std::max(ring_bytes(source, source_bytes) + ring_bytes(grad, grad_bytes) + 256,
                          4 * (p.taps() + 1) * kThreads) <=
         p.shared_memory;
}

bool claims_toeplitz_grad_weight_nchw(const Problem& p) {
  if (size_of(p.dtype) != 2 || p.capability < 80 || p.kernel_h < 5 || p.stride_h != 1) return false;
  return p.kernel_h == p.kernel_w && claims_stream_grad_weight_nchw(p);
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
      {PlanId::kToeplitzNchw, "toeplitz_nchw",
       "a small kernel in 16 bits on contiguous planes: rows stream through shared memory to tensor cores",
       claims_toeplitz_nchw},
      {PlanId::kStreamNchw, "stream_nchw", "a small kernel on contiguous planes: rows stream through shared memory",
       claims_stream_nchw},
      {PlanId::kStreamGradWeightNchw, "stream_grad_weight_nchw",
       "a small kernel on contiguous planes: input and gradient stream through shared memory",
       claims_stream_grad_weight_nchw},
      {PlanId::kToeplitzGradWeightNchw, "toeplitz_grad_weight_nchw",
       "a small kernel in 16 bits on contiguous planes: input and gradient stream through shared memory to tensor "
       "cores",
       claims_toeplitz_grad_weight_nchw},
      {PlanId::kWindowNchw, "window_nchw", "3x3, stride 1, rows contiguous in memory: a window of rows in registers",
       claims_window_nchw},
      {PlanId::kToeplitzNchwPortable, "toeplitz_nchw_portable", "toeplitz_nchw as GPUs before sm_90 run it",
       claims_toeplitz_nchw},
      {PlanId::kToeplitzGradWeightNchwPortable, "toeplitz_grad_weight_nchw_portable",
       "toeplitz_grad_weight_nchw as GPUs before sm_90 run it", claims_toeplitz_grad_weight_nchw},
      {PlanId::kStreamNchwPortable, "stream_nchw_portable", "stream_nchw as GPUs before sm_90 run it",
       claims_stream_nchw},
      {PlanId::kStreamGradWeightNchwPortable, "stream_grad_weight_nchw_portable",
       "stream_grad_weight_nchw as GPUs before sm_90 run it", claims_stream_grad_weight_nchw},
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
