// grad_weight (and the bias gradient) in float64 of any kernel, where columns lie side by side.
//
// A warp has a column of the kernel, or a part of it, and walks down columns of the gradient, a lane each: the pixels
// that a gradient meets are those that the one above met, one row further down, and stay in registers. So two loads
// serve as many products as there are rows of the kernel. Loads of several rows are under way together.
//
// Only taps that meet the image are multiplied. Sums of a few strips of rows are added up by a second kernel: every sum
// has a fixed order, and none is long.
#include "columns_grad_weight.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <type_traits>

#include "common.cuh"
#include "partial_sums.h"

namespace dwconv {
namespace {

constexpr int kMaxWarps = 8;     // of a block
constexpr int kMaxRows = 7;      // of the kernel, of a warp
constexpr int kStripRows = 48;   // of the gradient, at most
constexpr int kStripsOfSum = 8;  // that a lane adds up, at most
constexpr int kBlocks = 2048;    // fills any GPU a few times over; the same on all, so that results are too

struct Columns {
  const double *input, *grad;
  double* partial;  // [split][tap, or bias behind the last tap][filter]
  int64_t input_stride[4], grad_stride[4];
  int height, width, out_height, out_width;
  int kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int filters, multiplier;
  bool with_bias;
  int lanes;   // side by side, a power of two
  int phases;  // rows of the gradient are walked down in steps of so many
  int strips, strip_rows;
  int parts, units, block_units, unit_groups;  // parts of a column of the kernel; parts of all columns, of a block
  int teams;                                   // lanes side by side that have the same part of the kernel in a block
  int items, splits;                           // strips of all columns and images; runs of these
  Divider by_unit_groups, by_filters, by_segments, by_strips, by_phases, by_multiplier, by_parts;
};

// kRows: of the kernel. kShift: rows by which pixels move on from a gradient to the next. kSteps: gradients whose loads
// are under way together.
template <int kRows, int kShift, int kSteps>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) columns_grad_weight(const __grid_constant__ Columns a) {
  constexpr int kKept = kRows > kShift ? kRows - kShift : 0;  // pixels that the next gradient meets, too
  constexpr int kWindow = kKept + kShift * kSteps;
  static_assert(kRows >= kShift && kWindow < 32);
  __shared__ double totals[kMaxWarps][kRows + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % a.lanes;
  uint32_t rest = blockIdx.x;
  const int unit_group = a.by_unit_groups.split(rest), filter = a.by_filters.split(rest), split = rest;
  const int slot = warp / a.block_units, unit = unit_group * a.block_units + warp % a.block_units;
  uint32_t quotient = unit;
  const int first_row = static_cast<int>(a.by_parts.split(quotient)) * kRows, column = quotient;
  const int team = slot * (32 / a.lanes) + threadIdx.x % 32 / a.lanes;
  const int first = static_cast<int>(int64_t{a.items} * split / a.splits);
  const int last = static_cast<int>(int64_t{a.items} * (split + 1) / a.splits);
  uint32_t channel = filter;
  a.by_multiplier.split(channel);
  const int64_t row_step = a.dilation_h * a.input_stride[2], grad_step = a.phases * a.grad_stride[2];

  double sum[kRows] = {}, bias = 0;
  for (int item = unit < a.units ? first + team : last; item < last; item += a.teams) {
    uint32_t number = item;
    const int v = static_cast<int>(a.by_segments.split(number)) * a.lanes + lane;
    const int strip = a.by_strips.split(number), phase = a.by_phases.split(number), image = number;
    if (v >= a.out_width) continue;
    const int r = phase + strip * a.strip_rows * a.phases;
    const int count = min((a.out_height - r + a.phases - 1) / a.phases, a.strip_rows);
    // Row n of those that are met is y + n * dilation: it is inside the image for n in [begin, end).
    const int y = r * a.stride_h - a.padding_h + first_row * a.dilation_h;
    const int x = v * a.stride_w - a.padding_w + column * a.dilation_w;
    const int begin = max((a.dilation_h - 1 - y) / a.dilation_h, 0);
    const int end = x >= 0 && x < a.width && y < a.height ? (a.height - 1 - y) / a.dilation_h + 1 : 0;
    const double* from = a.input + image * a.input_stride[0] + channel * a.input_stride[1] + y * a.input_stride[2] +
                         x * a.input_stride[3];
    const double* grad =
        a.grad + image * a.grad_stride[0] + filter * a.grad_stride[1] + r * a.grad_stride[2] + v * a.grad_stride[3];
    double pixels[kWindow];
#pragma unroll
    for (int n = 0; n < kKept; ++n) {
      pixels[n] = n >= begin && n < end ? from[n * row_step] : 0;
    }
    from += kKept * row_step;
    for (int k = 0; k < count; k += kSteps) {
      // A bit for each pixel inside the image.
      const auto below = [&](int n) { return n >= 32 ? ~0u : n <= 0 ? 0u : ~0u >> (32 - n); };
      const uint32_t inside = below(end - k * kShift) & ~below(begin - k * kShift);
      double gradients[kSteps];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int e = 0; e < kShift; ++e) {
          const int n = kKept + s * kShift + e;
          pixels[n] = inside >> n & 1 ? *from : 0;
          from += row_step;
        }
        gradients[s] = k + s < count ? *grad : 0;
        grad += grad_step;
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        bias += gradients[s];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          if (k + s < count && inside >> (s * kShift + i) & 1)
            sum[i] = fma(gradients[s], pixels[s * kShift + i], sum[i]);
      }
#pragma unroll
      for (int n = 0; n < kKept; ++n) pixels[n] = pixels[n + kSteps * kShift];
    }
  }

  const auto put = [&](double total, int index) {
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    if (threadIdx.x % 32 == 0) totals[warp][index] = total;
  };
#pragma unroll
  for (int i = 0; i < kRows; ++i) put(sum[i], i);
  put(bias, kRows);
  __syncthreads();
  const int taps = a.kernel_h * a.kernel_w, slots = blockDim.x / 32 / a.block_units;
  for (int at = threadIdx.x; at < a.block_units * (kRows + 1); at += blockDim.x) {
    const int index = at % (kRows + 1), own = at / (kRows + 1);
    uint32_t quotient = unit_group * a.block_units + own;
    const int row = static_cast<int>(a.by_parts.split(quotient)) * kRows + index, column = quotient;
    const bool is_bias = index == kRows;
    if (column >= a.kernel_w || (is_bias ? !a.with_bias || column > 0 || row > kRows : row >= a.kernel_h)) continue;
    double total = 0;
    for (int s = 0; s < slots; ++s) total += totals[s * a.block_units + own][index];
    a.partial[(int64_t{split} * (taps + a.with_bias) + (is_bias ? taps : row * a.kernel_w + column)) * a.filters +
              filter] = total;
  }
}

template <int kRows, int kShift, int kSteps>
void launch(const Problem& p, Columns a, const Allocate& allocate, cudaStream_t stream) {
  a.parts = static_cast<int>(ceil_div(p.kernel_h, kRows)), a.units = static_cast<int>(a.parts * p.kernel_w);
  a.unit_groups = static_cast<int>(ceil_div(a.units, kMaxWarps));
  a.block_units = static_cast<int>(ceil_div(a.units, a.unit_groups));
  const int slots = kMaxWarps / a.block_units;
  for (a.lanes = 1; a.lanes < 32 && a.lanes < p.out_width;) a.lanes *= 2;
  a.teams = slots * (32 / a.lanes);
  const int64_t segments = ceil_div(p.out_width, a.lanes), rows = ceil_div(p.out_height, a.phases);
  a.strips = static_cast<int>(ceil_div(rows, kStripRows)), a.strip_rows = static_cast<int>(ceil_div(rows, a.strips));
  const int64_t items = segments * a.strips * a.phases * p.batch;
  const int64_t most = ceil_div(items, a.teams), groups = p.filters() * a.unit_groups;
  const int64_t splits = std::max(ceil_div(most, kStripsOfSum), std::min(most, ceil_div(kBlocks, groups)));
  a.items = static_cast<int>(items), a.splits = static_cast<int>(splits);
  a.by_unit_groups = Divider(a.unit_groups), a.by_filters = Divider(a.filters), a.by_segments = Divider(segments);
  a.by_strips = Divider(a.strips), a.by_phases = Divider(a.phases), a.by_multiplier = Divider(p.multiplier);
  a.by_parts = Divider(a.parts);
  const int64_t sums = (p.taps() + a.with_bias) * p.filters();
  a.partial = static_cast<double*>(allocate(splits * sums * static_cast<int64_t>(sizeof(double))));
  const int64_t blocks = groups * splits;
  if (blocks > std::numeric_limits<int32_t>::max())
    throw std::runtime_error("dwconv: the tensors are too large for one kernel launch");
  columns_grad_weight<kRows, kShift, kSteps>
      <<<static_cast<unsigned>(blocks), 32 * slots * a.block_units, 0, stream>>>(a);
  check_launch("columns_grad_weight");
  launch_add_partial_sums(p, a.partial, splits, stream);
}

}  // namespace

bool launch_columns_grad_weight(const Problem& p, const Allocate& allocate, cudaStream_t stream) {
  // Rows of the kernel are so far apart; one row may be said to be as far from the next as gradients are.
  const int64_t dilation_h = p.kernel_h == 1 ? p.stride_h : p.dilation_h;
  const int64_t common = std::gcd(p.stride_h, dilation_h), shift = p.stride_h / common;
  constexpr int64_t kMany = 1 << 28;  // rows and columns, with what is beside them, and items are counted in 32 bits
  if (p.dtype != DType::kFloat64 || p.batch == 0 || shift > 2 || !has_rows(p.input, p.width) ||
      !has_rows(p.output, p.out_width))
    return false;
  const auto far = [](int64_t size, int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    return std::max({size, out, padding, kernel * dilation + out * stride}) > kMany / 4;
  };
  if (far(p.height, p.out_height, p.kernel_h + kMaxRows, p.stride_h, p.padding_h, dilation_h) ||
      far(p.width, p.out_width, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w) ||
      p.batch > kMany / p.out_height / p.out_width || p.filters() > kMany)
    return false;
  Columns a{};
  a.input = static_cast<const double*>(p.input.data), a.grad = static_cast<const double*>(p.output.data);
  for (int i = 0; i < 4; ++i) a.input_stride[i] = p.input.stride[i], a.grad_stride[i] = p.output.stride[i];
  a.height = static_cast<int>(p.height), a.width = static_cast<int>(p.width);
  a.out_height = static_cast<int>(p.out_height), a.out_width = static_cast<int>(p.out_width);
  a.kernel_h = static_cast<int>(p.kernel_h), a.kernel_w = static_cast<int>(p.kernel_w);
  a.stride_h = static_cast<int>(p.stride_h), a.stride_w = static_cast<int>(p.stride_w);
  a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  a.dilation_h = static_cast<int>(dilation_h), a.dilation_w = static_cast<int>(p.dilation_w);
  a.filters = static_cast<int>(p.filters()), a.multiplier = static_cast<int>(p.multiplier);
  a.phases = static_cast<int>(std::min(dilation_h / common, p.out_height)), a.with_bias = p.bias != nullptr;
  // Parts of as many rows as leave the fewest idle; each loads gradients and pixels of its own.
  const auto cost = [&](int rows) { return ceil_div(p.kernel_h, rows) * (rows + 2); };
  const auto go = [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    if constexpr (kRows > 1)
      if (shift == 2) return launch<kRows, 2, 4>(p, a, allocate, stream);
    launch < kRows, 1, kRows<5 ? 6 : kRows>(p, a, allocate, stream);
  };
  if (p.kernel_h == 1)
    go(std::integral_constant<int, 1>{});
  else if (cost(kMaxRows) <= std::min(cost(5), cost(3)))
    go(std::integral_constant<int, kMaxRows>{});
  else if (cost(5) <= cost(3))
    go(std::integral_constant<int, 5>{});
  else
    go(std::integral_constant<int, 3>{});
  return true;
}

}  // namespace dwconv
