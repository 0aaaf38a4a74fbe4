// Forward and grad_input of kernels with a single tap on arrays without gaps: every pixel times its channel's weight,
// at the speed of a copy. Where the source begins between multiples of 16 bytes, units of 16 bytes are read as they lie
// there, and shifted; weights that do are laid out in shared memory.
#include <type_traits>

#include "common.cuh"
#include "launch.h"
#include "mapping.h"
#include "overlap.cuh"
#include "shifted_units.cuh"

namespace dwconv {
namespace {

constexpr int kThreads = 256;
constexpr int kUnits = 4;       // that a thread has on their way at once
constexpr int kUnitBytes = 16;  // that are read and written at once

struct Arguments {
  const void* source;
  const void* weight;
  const void* bias;
  void* target;
  int64_t weight_stride, bias_stride;
  uint32_t elements, channels, plane;  // `plane`: neighbouring elements of one channel
  bool aligned;                        // whether the target lies in whole units
  Divider by_plane, by_channels;
};

template <typename T>
struct alignas(kUnitBytes) Unit {
  static constexpr int kSize = kUnitBytes / sizeof(T);
  T element[kSize];
};

// kWeights: each element of a unit has a weight of its own, and they lie side by side, in whole units, if the source
// does. kMisfit: if not negative, the words behind a multiple of 16 bytes that the source begins, with up to 3 bytes
// more; the target does not.
template <typename T, bool kWeights, int kMisfit>
__global__ void __launch_bounds__(kThreads) scale(const __grid_constant__ Arguments a) {
  using Unit = Unit<T>;
  constexpr int kSize = Unit::kSize;
  // Of a source that is shifted, a warp's units follow each other.
  constexpr bool kShifted = kMisfit >= 0;
  constexpr uint32_t kStep = kShifted ? 32 : kThreads;  // from one of a thread's units to the next
  const uint32_t lane = threadIdx.x % 32, place = kShifted ? threadIdx.x / 32 * kUnits * 32 + lane : threadIdx.x;
  const uint32_t first = (blockIdx.x * kUnits * kThreads + place) * kSize;
  const T* source = static_cast<const T*>(a.source);
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  T* target = static_cast<T*>(a.target);
  const auto at = [&](int u) { return first + u * kStep * kSize; };
  const auto whole = [&](int u) { return a.aligned && at(u) + kSize <= a.elements; };
  const auto by_elements = [&](int u) {
    Unit unit;
#pragma unroll
    for (int i = 0; i < kSize; ++i) unit.element[i] = at(u) + i < a.elements ? source[at(u) + i] : T{};
    return unit;
  };

  constexpr bool kLaysOut = kWeights && kShifted;
  Unit unit[kUnits], weights[kWeights && !kLaysOut ? kUnits : 1];
  uint32_t inside[kUnits], channel[kUnits];  // of the first element: its place in its plane, and its channel
  uint4 low[kUnits], beyond{};               // of a source that is shifted; what the first lane has for the last one
  const int misfit = static_cast<int>(reinterpret_cast<uintptr_t>(source) % kUnitBytes);
  // The source has units [1, end) alone, the ones beside with what lies around.
  const auto end = static_cast<uint32_t>((uint64_t{a.elements} * sizeof(T) + misfit) / kUnitBytes);
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    channel[u] = at(u);
    inside[u] = a.by_plane.split(channel[u]);
    channel[u] = a.by_channels.split(channel[u]);
  }
  // Weights of the block's elements, from its first one on, in whole units.
  constexpr uint32_t kMost = kUnits * kThreads * kSize;
  __shared__ Unit laid_out[kLaysOut ? kMost / kSize : 1];
  uint32_t rest = blockIdx.x * kMost;
  const uint32_t first_channel = a.by_channels.split(rest);
  wait_for_kernel_before();
  let_next_kernel_start();
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if constexpr (kWeights && !kLaysOut) weights[u] = *reinterpret_cast<const Unit*>(weight + channel[u]);
    if constexpr (kShifted) {
      const uint4* units = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(source) - misfit);
      const auto read = [&](uint32_t n) { return n > 0 && n < end ? __ldg(units + n) : uint4{}; };
      low[u] = read(at(u) / kSize);
      if (u + 1 == kUnits && lane == 0) beyond = read(at(u) / kSize + 32);
    } else {
      unit[u] = whole(u) ? *reinterpret_cast<const Unit*>(source + at(u)) : by_elements(u);
    }
  }
  if constexpr (kLaysOut) {
    for (uint32_t i = threadIdx.x; i < min(kMost, a.channels); i += kThreads) {
      const uint32_t of = first_channel + i;
      laid_out[i / kSize].element[i % kSize] = weight[of < a.channels ? of : of - a.channels];
    }
    __syncthreads();
  }
  if constexpr (kShifted) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const uint4 high = unit_of_next_lane(low[u], u + 1 < kUnits ? low[u + 1] : beyond);
      const uint32_t n = at(u) / kSize;
      if (n > 0 && n + 1 < end)
        *reinterpret_cast<uint4*>(&unit[u]) = shifted<kMisfit>(low[u], high, misfit % 4 * 8);
      else
        unit[u] = by_elements(u);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    if (at(u) >= a.elements) return;
    const auto weight_of = [&](uint32_t c) { return widen(__ldg(weight + c * a.weight_stride)); };
    const auto bias_of = [&](uint32_t c) { return bias ? widen(__ldg(bias + c * a.bias_stride)) : Accumulator<T>{}; };
    const auto multiply = [&](int i, Accumulator<T> w, Accumulator<T> b) {
      unit[u].element[i] = narrow<T>(fma(widen(unit[u].element[i]), w, b));
    };
    if constexpr (kWeights) {
      const uint32_t behind = channel[u] < first_channel ? a.channels : 0;
      const Unit& of = kLaysOut ? laid_out[(channel[u] + behind - first_channel) / kSize] : weights[kLaysOut ? 0 : u];
#pragma unroll
      for (int i = 0; i < kSize; ++i) multiply(i, widen(of.element[i]), bias_of(channel[u] + i));
    } else if (inside[u] + kSize <= a.plane) {
      const Accumulator<T> w = weight_of(channel[u]), b = bias_of(channel[u]);
#pragma unroll
      for (int i = 0; i < kSize; ++i) multiply(i, w, b);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        multiply(i, weight_of(channel[u]), bias_of(channel[u]));
        if (++inside[u] < a.plane) continue;
        inside[u] = 0;
        if (++channel[u] == a.channels) channel[u] = 0;
      }
    }
    if (whole(u))
      *reinterpret_cast<Unit*>(target + at(u)) = unit[u];
    else
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (at(u) + i < a.elements) target[at(u) + i] = unit[u].element[i];
  }
}

}  // namespace

void launch_scale(const Problem& p, cudaStream_t stream) {
  const Mapping map(p);
  const int64_t elements = p.batch * p.channels * p.height * p.width;
  const bool channels_last = p.channels > 1 && map.source.stride[1] == 1 && p.height * p.width > 1;
  Arguments a{};
  a.source = map.source.data, a.target = map.target.data;
  a.weight = map.weight.data, a.weight_stride = map.weight.stride[0];
  a.bias = map.bias, a.bias_stride = map.bias_stride;
  a.elements = static_cast<uint32_t>(elements), a.channels = static_cast<uint32_t>(p.channels);
  a.plane = channels_last ? 1 : static_cast<uint32_t>(p.height * p.width);
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % kUnitBytes == 0; };
  a.aligned = aligned(a.target);
  a.by_plane = Divider(a.plane), a.by_channels = Divider(a.channels);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kSize = Unit<T>::kSize;
    const int64_t blocks = ceil_div(elements, int64_t{kSize} * kUnits * kThreads);
    const auto launch = [&](auto misfit) {
      constexpr int kMisfit = decltype(misfit)::value;
      // Elements of 4 and 8 bytes begin at multiples of that.
      constexpr bool kExists =
          kMisfit < 0 || sizeof(T) == 2 || (kMisfit > 0 && 4 * kMisfit % static_cast<int>(sizeof(T)) == 0);
      if constexpr (kExists) {
        const bool weights =
            a.plane == 1 && p.channels % kSize == 0 && a.weight_stride == 1 && (kMisfit >= 0 || aligned(a.weight));
        launch_early(weights ? scale<T, true, kMisfit> : scale<T, false, kMisfit>, a, blocks, kThreads, stream);
      }
    };
    if (!a.aligned || aligned(a.source)) return launch(std::integral_constant<int, -1>{});
    switch (reinterpret_cast<uintptr_t>(a.source) % kUnitBytes / 4) {
      case 0: return launch(std::integral_constant<int, 0>{});
      case 1: return launch(std::integral_constant<int, 1>{});
      case 2: return launch(std::integral_constant<int, 2>{});
      default: return launch(std::integral_constant<int, 3>{});
    }
  });
  check_launch("scale");
}

}  // namespace dwconv
