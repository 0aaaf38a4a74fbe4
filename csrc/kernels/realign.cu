#include "realign.h"

#include <algorithm>
#include <iterator>

#include "copies.cuh"
#include "device.h"
#include "overlap.cuh"
#include "shifted_units.cuh"

namespace dwconv {
namespace {

constexpr int kThreads = 256, kTurns = 4;  // units of a thread

struct Realign {
  const char* from;
  uint4* to;
  int64_t units;
};

// Units are read where they begin in memory; a thread has the next one from its neighbour. The first and the last unit
// of the array, which are not its own alone, are read element by element.
template <int kMisfit>  // bytes, a multiple of 4
__global__ void __launch_bounds__(kThreads) realign_units(const __grid_constant__ Realign a) {
  wait_for_kernel_before();
  let_next_kernel_start();
  const int misfit = static_cast<int>(reinterpret_cast<uintptr_t>(a.from) % kUnit), lane = threadIdx.x % 32;
  const uint32_t shift = misfit % 4 * 8;
  const uint4* units = reinterpret_cast<const uint4*>(a.from - misfit);
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kTurns) + threadIdx.x;
  const auto read = [&](int64_t at) { return at > 0 && at < a.units ? __ldg(units + at) : uint4{}; };
  uint4 low[kTurns], high[kTurns];
#pragma unroll
  for (int t = 0; t < kTurns; ++t) {
    low[t] = read(first + t * kThreads);
    if (lane == 31) high[t] = read(first + t * kThreads + 1);
  }
#pragma unroll
  for (int t = 0; t < kTurns; ++t) {
    const uint4 next = {__shfl_down_sync(~0u, low[t].x, 1), __shfl_down_sync(~0u, low[t].y, 1),
                        __shfl_down_sync(~0u, low[t].z, 1), __shfl_down_sync(~0u, low[t].w, 1)};
    if (lane < 31) high[t] = next;
    const int64_t at = first + t * kThreads;
    if (at >= a.units) continue;
    uint4 value = shifted<kMisfit / 4>(low[t], high[t], shift);
    if (at == 0 || at == a.units - 1) {
      const uint16_t* elements = reinterpret_cast<const uint16_t*>(a.from) + at * (kUnit / 2);
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = elements[2 * i] | static_cast<uint32_t>(elements[2 * i + 1]) << 16;
      value = {words[0], words[1], words[2], words[3]};
    }
    a.to[at] = value;
  }
}

void launch(const Realign& a, cudaStream_t stream) {
  const auto launch_by = [&](auto kernel) {
    launch_early(kernel, a, ceil_div(a.units, int64_t{kThreads} * kTurns), kThreads, stream);
  };
  switch (reinterpret_cast<uintptr_t>(a.from) % kUnit / 4) {
    case 0: launch_by(realign_units<0>); break;
    case 1: launch_by(realign_units<4>); break;
    case 2: launch_by(realign_units<8>); break;
    default: launch_by(realign_units<12>);
  }
  check_launch("realign_units");
}

// An array with gaps between pixels, rows or images, which are copied element by element.
struct Gather {
  const uint16_t* from;
  int64_t image, row, pixel;  // elements from one to the next
  uint4* to;
  int64_t units;
  Divider by_units, by_width, by_height;
};

__global__ void __launch_bounds__(kThreads) gather_units(const __grid_constant__ Gather a) {
  wait_for_kernel_before();
  let_next_kernel_start();
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= a.units) return;
  uint32_t rest = static_cast<uint32_t>(at);
  const uint32_t unit = a.by_units.split(rest), x = a.by_width.split(rest), y = a.by_height.split(rest);
  const uint16_t* from = a.from + (rest * a.image + y * a.row + x * a.pixel + unit * 8);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = from[2 * i] | static_cast<uint32_t>(from[2 * i + 1]) << 16;
  a.to[at] = {words[0], words[1], words[2], words[3]};
}

Problem realigned(const Problem& problem, const Allocate& allocate, cudaStream_t stream, bool gaps) {
  Problem p = problem;
  const auto realign = [&](View& view, int64_t channels, int64_t height, int64_t width) {
    const int64_t steps[4] = {height * width * channels, 1, width * channels, channels};
    const int64_t sizes[4] = {p.batch, channels, height, width};
    if (reinterpret_cast<uintptr_t>(view.data) % kUnit == 0 || channels * 2 % kUnit != 0) return;
    bool dense = reinterpret_cast<uintptr_t>(view.data) % 2 == 0;
    for (int d = 0; d < 4; ++d) dense = dense && (sizes[d] == 1 || view.stride[d] == steps[d]);
    if (!dense && !gaps) return;
    const int64_t bytes = p.batch * steps[0] * 2, units = bytes / kUnit;
    uint4* const to = static_cast<uint4*>(allocate(bytes));
    if (dense) {
      launch({static_cast<const char*>(view.data), to, units}, stream);
    } else {
      const Divider by_units(channels * 2 / kUnit), by_width(width), by_height(height);
      const Gather a{static_cast<const uint16_t*>(view.data),
                     view.stride[0],
                     view.stride[2],
                     view.stride[3],
                     to,
                     units,
                     by_units,
                     by_width,
                     by_height};
      launch_early(gather_units, a, ceil_div(units, int64_t{kThreads}), kThreads, stream);
      check_launch("gather_units");
    }
    view.data = to;
    std::copy(std::begin(steps), std::end(steps), std::begin(view.stride));
  };
  if (size_of(p.dtype) != 2 || p.batch == 0) return p;
  if (p.pass != Pass::kGradInput) realign(p.input, p.channels, p.height, p.width);
  if (p.pass != Pass::kForward) realign(p.output, p.filters(), p.out_height, p.out_width);
  return p;
}

}  // namespace

Problem realigned(const Problem& problem, const Allocate& allocate, cudaStream_t stream) {
  return realigned(problem, allocate, stream, false);
}

Problem realigned_with_gaps(const Problem& problem, const Allocate& allocate, cudaStream_t stream) {
  return realigned(problem, allocate, stream, true);
}

}  // namespace dwconv
