// Forward and grad_input of kernels with a single tap on arrays without gaps: every pixel times its channel's weight,
// at the speed of a copy. Where the source begins between multiples of 16 bytes, units of 16 bytes are read as they lie
// there, and shifted; weights that do are laid out in shared memory. Where there is little to do, threads have one unit
// each, so that there are enough of them.
#include <type_traits>

#include "common.cuh"
#include "device.h"
#include "launch.h"
#include "mapping.h"
#include "overlap.cuh"
#include "scale_spread.h"
#include "shifted_units.cuh"

namespace dwconv {
namespace {

constexpr int kUnitBytes = 16;  // that are read and written at once

// What the elements of a unit are multiplied by: weights that lie side by side, in whole units if the source does; at
// most two, of its plane and of the next one; or any.
enum class Weights { kSideBySide, kOfPlanes, kOfElements };

// Units that a thread has on their way at once, and threads of a block.
template <bool kFew, Weights kWeights>
constexpr int kUnitsOf = kFew                               ? 1
                         : kWeights == Weights::kOfElements ? 2
                                                            : 4;
template <bool kFew>
constexpr int kThreadsOf = kFew ? 64 : 256;

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

// kMisfit: if not negative, the words behind a multiple of 16 bytes that the source begins, with up to 3 bytes more;
// the target does not. kFew: there is little to do.
template <typename T, Weights kWeights, int kMisfit, bool kFew>
__global__ void __launch_bounds__(kThreadsOf<kFew>) scale(const __grid_constant__ Arguments a) {
  using Unit = Unit<T>;
  constexpr int kSize = Unit::kSize, kUnits = kUnitsOf<kFew, kWeights>, kThreads = kThreadsOf<kFew>;
  constexpr bool kSideBySide = kWeights == Weights::kSideBySide;
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

  constexpr bool kLaysOut = kSideBySide && kShifted;
  Unit unit[kUnits], weights[kSideBySide && !kLaysOut ? kUnits : 1];
  // Where loads are not many, and what each unit needs is known without asking where it lies, weights come beside it.
  constexpr bool kAhead = !kSideBySide && (kFew || kWeights == Weights::kOfElements);
  constexpr int kFactors = kSideBySide ? 1 : kWeights == Weights::kOfPlanes ? 2 : kSize;
  T factor[kUnits][kFactors], summand[kUnits][kFactors];
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
    if constexpr (kSideBySide && !kLaysOut) weights[u] = *reinterpret_cast<const Unit*>(weight + channel[u]);
    if constexpr (kShifted) {
      const uint4* units = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(source) - misfit);
      const auto read = [&](uint32_t n) { return n > 0 && n < end ? __ldg(units + n) : uint4{}; };
      low[u] = read(at(u) / kSize);
      if (u + 1 == kUnits && lane == 0) beyond = read(at(u) / kSize + 32);
    } else {
      unit[u] = whole(u) ? *reinterpret_cast<const Unit*>(source + at(u)) : by_elements(u);
    }
    if constexpr (kAhead) {
      uint32_t of = channel[u], place_of = inside[u];
#pragma unroll
      for (int i = 0; i < kFactors; ++i) {
        factor[u][i] = __ldg(weight + of * a.weight_stride);
        summand[u][i] = bias ? __ldg(bias + of * a.bias_stride) : T{};
        if (kWeights == Weights::kOfElements && ++place_of < a.plane) continue;
        place_of = 0;
        of = of + 1 == a.channels ? 0 : of + 1;
      }
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
    if constexpr (kSideBySide) {
      const uint32_t behind = channel[u] < first_channel ? a.channels : 0;
      const Unit& of = kLaysOut ? laid_out[(channel[u] + behind - first_channel) / kSize] : weights[kLaysOut ? 0 : u];
#pragma unroll
      for (int i = 0; i < kSize; ++i) multiply(i, widen(of.element[i]), bias_of(channel[u] + i));
    } else if constexpr (!kAhead) {
      const Accumulator<T> w = weight_of(channel[u]), b = bias_of(channel[u]);
      Accumulator<T> w_behind = w, b_behind = b;
      if (inside[u] + kSize > a.plane) {
        const uint32_t behind = channel[u] + 1 == a.channels ? 0 : channel[u] + 1;
        w_behind = weight_of(behind), b_behind = bias_of(behind);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        multiply(i, inside[u] + i < a.plane ? w : w_behind, inside[u] + i < a.plane ? b : b_behind);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const int of = kWeights == Weights::kOfElements ? i : inside[u] + i < a.plane ? 0 : 1;
        multiply(i, widen(factor[u][of]), widen(summand[u][of]));
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
  if (p.stride_h > 1 || p.stride_w > 1) return launch_scale_spread(p, stream);
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
  constexpr int64_t kFewBytes = 16 << 10;  // a multiprocessor
  const bool few = elements * size_of(p.dtype) <= kFewBytes * current_device().multiprocessors;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kSize = Unit<T>::kSize;
    const auto launch_as = [&](auto kernel, int units, int threads) {
      launch_early(kernel, a, ceil_div(elements, int64_t{kSize} * units * threads), threads, stream);
    };
    const auto launch = [&](auto misfit) {
      constexpr int kMisfit = decltype(misfit)::value;
      // Elements of 4 and 8 bytes begin at multiples of that.
      constexpr bool kExists =
          kMisfit < 0 || sizeof(T) == 2 || (kMisfit > 0 && 4 * kMisfit % static_cast<int>(sizeof(T)) == 0);
      if constexpr (kExists) {
        const auto with = [&](auto weights) {
          constexpr Weights kWeights = decltype(weights)::value;
          constexpr bool kCanBeFew = kMisfit < 0;
          if (few && kCanBeFew)
            return launch_as(scale<T, kWeights, kMisfit, kCanBeFew>, kUnitsOf<true, kWeights>, kThreadsOf<true>);
          launch_as(scale<T, kWeights, kMisfit, false>, kUnitsOf<false, kWeights>, kThreadsOf<false>);
        };
        if (a.plane == 1 && p.channels % kSize == 0 && a.weight_stride == 1 && (kMisfit >= 0 || aligned(a.weight)))
          with(std::integral_constant<Weights, Weights::kSideBySide>{});
        else if (a.plane >= kSize)
          with(std::integral_constant<Weights, Weights::kOfPlanes>{});
        else
          with(std::integral_constant<Weights, Weights::kOfElements>{});
      }
    };
    if (few && !aligned(a.source)) a.aligned = false;  // element by element
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
