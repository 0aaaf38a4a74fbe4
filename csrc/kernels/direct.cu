// Forward and grad_input of small kernels, straight from memory: for problems so small that latency is all that counts,
// and for layouts that nothing streams. All loads of a thread are independent of each other and in flight together, so
// that it takes one latency of memory above an empty kernel; what neighbouring threads share is found in L1. Where
// memory and sizes allow, several elements are loaded at once.
//
// Only taps that meet the image are multiplied: a weight that is Inf or NaN does not meet the padding. Threads that
// load vectors multiply zeros there, and compute again what has become NaN.
#include "common.cuh"
#include "device.h"
#include "direct.cuh"
#include "direct.h"
#include "launch.h"
#include "mapping.cuh"
#include "overlap.cuh"
#include "small_kernels.h"

namespace dwconv {
namespace {

constexpr int kThreads = 128;

// Rows that a thread computes where there is work for enough threads, as registers allow. float64 comes here at a
// stride in forward alone.
template <typename T, class Kernel>
constexpr int many_rows() {
  if (sizeof(T) == sizeof(double)) return Kernel::kStride > 1 ? Kernel::kKernelH / 2 + 1 : 4;
  return Kernel::kKernelH * Kernel::kKernelW < 25 ? 4 : 2;
}

// Threads of a block that load vectors, and rows that each of them computes.
constexpr int kVectorThreads = 64, kVectorRows = 2;

struct Arguments : MappingArguments {
  int padding_h, padding_w;
  bool channels_last;
  bool flipped;  // the weights, of kernels that know them by their number
  int images;
  uint32_t units;
  Divider by_planes, by_strips, by_columns;
};

// Where along one side step `k` from `first` on leads to in the source; negative where it leads nowhere. Spread: the
// stride is that of the target.
template <class Kernel, bool kSpread>
__device__ int source_index(int first, int k) {
  if (!kSpread) return first + k;
  const int padded = first - k * Kernel::kDilation;
  return padded % Kernel::kStride == 0 ? padded / Kernel::kStride : -1;
}

template <typename T, class Kernel, bool kSpread, int kRows>
__global__ void __launch_bounds__(kThreads) direct(const __grid_constant__ Arguments a) {
  static_assert(!kSpread || kRows == 1);
  constexpr int kKernelH = Kernel::kKernelH, kKernelW = Kernel::kKernelW;
  constexpr int kStep = kSpread ? 1 : Kernel::kDilation;  // from one tap to the next
  constexpr int kSourceRows = (kRows - 1) * Kernel::kStride + (kKernelH - 1) * kStep + 1;
  uint32_t unit = blockIdx.x * kThreads + threadIdx.x;
  wait_for_kernel_before();
  let_next_kernel_start();
  if (unit >= a.units) return;
  uint32_t plane = a.channels_last ? a.by_planes.split(unit) : 0;
  const int column = a.by_columns.split(unit), row = a.by_strips.split(unit) * kRows;
  if (!a.channels_last) plane = a.by_planes.split(unit);
  const int image = unit;

  // Forward reads plane / multiplier, where fan_in is 1; grad_input reads the filters of the channel.
  uint32_t source_plane = plane * a.fan_in;
  a.by_fan_out.split(source_plane);
  const int y0 = kSpread ? row + a.padding_h : row * Kernel::kStride - a.padding_h;
  const int x0 = kSpread ? column + a.padding_w : column * Kernel::kStride - a.padding_w;
  const T* source = static_cast<const T*>(a.source) + image * a.source_stride[0] + source_plane * a.source_stride[1];
  const T* weight = static_cast<const T*>(a.weight) + static_cast<int>(plane) * a.fan_in * a.weight_filter;

  using Acc = Accumulator<T>;
  Acc sum[kRows];
#pragma unroll
  for (int o = 0; o < kRows; ++o)
    sum[o] = a.bias ? widen(static_cast<const T*>(a.bias)[static_cast<int>(plane) * a.bias_stride]) : Acc(0);
  for (int q = 0; q < a.fan_in; ++q, source += a.source_stride[1], weight += a.weight_filter) {
    T w[kKernelH][kKernelW];
#pragma unroll
    for (int i = 0; i < kKernelH; ++i)
#pragma unroll
      for (int j = 0; j < kKernelW; ++j) w[i][j] = weight[i * a.weight_row + j * a.weight_column];
#pragma unroll
    for (int r = 0; r < kSourceRows; ++r) {
      const int y = source_index<Kernel, kSpread>(y0, r);
      bool inside[kKernelW];
      T x[kKernelW];
#pragma unroll
      for (int j = 0; j < kKernelW; ++j) {
        const int column_of_tap = source_index<Kernel, kSpread>(x0, j * kStep);
        inside[j] = static_cast<uint32_t>(y) < static_cast<uint32_t>(a.height) &&
                    static_cast<uint32_t>(column_of_tap) < static_cast<uint32_t>(a.width);
        x[j] = inside[j] ? source[y * a.source_stride[2] + column_of_tap * a.source_stride[3]] : T{};
      }
#pragma unroll
      for (int o = 0; o < kRows; ++o) {
        const int reach = r - o * Kernel::kStride, i = reach / kStep;
        if (reach < 0 || reach % kStep != 0 || i >= kKernelH) continue;
#pragma unroll
        for (int j = 0; j < kKernelW; ++j)
          if (inside[j]) sum[o] = fma(widen(x[j]), widen(w[i][j]), sum[o]);
      }
    }
  }

  T* target = static_cast<T*>(a.target) + image * a.target_stride[0] + static_cast<int>(plane) * a.target_stride[1] +
              column * a.target_stride[3];
#pragma unroll
  for (int o = 0; o < kRows; ++o)
    if (row + o < a.out_height) target[(row + o) * a.target_stride[2]] = narrow<T>(sum[o]);
}

// One output, tap by tap: where zeros beside the image met a weight that is Inf or NaN. `source` and `weight` are of
// its plane, y0 and x0 where its window begins.
template <typename T, class Kernel>
__device__ float exact(const Arguments& a, const T* source, const T* weight, int y0, int x0) {
  float sum = 0;
#pragma unroll 1
  for (int t = 0; t < Kernel::kKernelH * Kernel::kKernelW; ++t) {
    const int y = y0 + t / Kernel::kKernelW, x = x0 + t % Kernel::kKernelW;
    if (static_cast<uint32_t>(y) < static_cast<uint32_t>(a.height) &&
        static_cast<uint32_t>(x) < static_cast<uint32_t>(a.width))
      sum = fmaf(widen(source[y * a.source_stride[2] + x * a.source_stride[3]]),
                 widen(weight[a.flipped ? Kernel::kKernelH * Kernel::kKernelW - 1 - t : t]), sum);
  }
  return sum;
}

template <int kRows, int kColumns>
__device__ bool are_finite(const float (&values)[kRows][kColumns]) {
  float sum = 0;  // of zeros, or NaN
#pragma unroll
  for (int o = 0; o < kRows; ++o)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum = fmaf(values[o][c], 0.f, sum);
  return sum == 0;
}

// Where elements that are loaded at once begin in memory: with a vector, or in 16 bits at least with a word, or between
// words.
enum class Begin { kVector, kWord, kOdd };

// kCount neighbouring elements from memory, as vectors of kVector, or words. Where words begin with the second element,
// the first is loaded alone, and so is the last one.
template <typename T, int kVector, int kCount, Begin kBegin>
struct Run {
  static constexpr bool kOdd = kBegin == Begin::kOdd;
  static constexpr int kAtOnce = kBegin == Begin::kVector ? kVector : 4 / sizeof(T);
  static constexpr int kParts = (kCount - (kOdd ? 2 : 0)) / kAtOnce;
  Vector<T, kAtOnce> part[kParts];
  uint32_t first, last;

  __device__ void load(const T* from, bool inside) {
    if constexpr (kOdd) first = load_one(from, inside);
#pragma unroll
    for (int n = 0; n < kParts; ++n) part[n] = dwconv::load<T, kAtOnce>(from + kOdd + n * kAtOnce, inside);
    if constexpr (kOdd) last = load_one(from + kCount - 1, inside);
  }

  __device__ float operator[](int i) const {
    if (kOdd && i == 0) return widen_one<T>(first);
    if (kOdd && i == kCount - 1) return widen_one<T>(last);
    return part[(i - kOdd) / kAtOnce][(i - kOdd) % kAtOnce];
  }
};

// In channels_last a thread computes kVector channels of a pixel, and of the one below it. The filters of these
// channels lie side by side.
template <typename T, class Kernel, int kVector, Begin kSource, Begin kWeights>
__global__ void __launch_bounds__(kVectorThreads) direct_pixels(const __grid_constant__ Arguments a) {
  constexpr int kKernelH = Kernel::kKernelH, kKernelW = Kernel::kKernelW, kTaps = kKernelH * kKernelW;
  constexpr int kSourceRows = kVectorRows + kKernelH - 1;
  using Pixel = Vector<T, kVector>;
  uint32_t unit = blockIdx.x * kVectorThreads + threadIdx.x;
  const int channel = a.by_planes.split(unit) * kVector;
  const int column = a.by_columns.split(unit), row = a.by_strips.split(unit) * kVectorRows;
  const int image = unit;
  const int y0 = row - a.padding_h, x0 = column - a.padding_w;
  const T* source = static_cast<const T*>(a.source);
  const T* weight = static_cast<const T*>(a.weight) + channel * kTaps;
  int down[kSourceRows], across[kKernelW];
#pragma unroll
  for (int r = 0; r < kSourceRows; ++r) down[r] = image * a.source_stride[0] + channel + (y0 + r) * a.source_stride[2];
#pragma unroll
  for (int j = 0; j < kKernelW; ++j) across[j] = (x0 + j) * a.source_stride[3];
  const bool exists = image < a.images;
  wait_for_kernel_before();
  let_next_kernel_start();

  Run<T, kVector, kVector * kTaps, kWeights> w;
  Run<T, kVector, kVector, kSource> x[kSourceRows][kKernelW];
  w.load(weight, exists);
#pragma unroll
  for (int r = 0; r < kSourceRows; ++r)
#pragma unroll
    for (int j = 0; j < kKernelW; ++j) {
      const bool inside = exists && static_cast<uint32_t>(y0 + r) < static_cast<uint32_t>(a.height) &&
                          static_cast<uint32_t>(x0 + j) < static_cast<uint32_t>(a.width);
      x[r][j].load(source + (down[r] + across[j]), inside);
    }
  uint32_t bias[kVector] = {};
  if (a.bias)
#pragma unroll
    for (int c = 0; c < kVector; ++c)
      bias[c] = load_one(static_cast<const T*>(a.bias) + (channel + c) * a.bias_stride, exists);
  if (!exists) return;

  float sum[kVectorRows][kVector] = {};
#pragma unroll
  for (int r = 0; r < kSourceRows; ++r)
#pragma unroll
    for (int j = 0; j < kKernelW; ++j) {
#pragma unroll
      for (int o = 0; o < kVectorRows; ++o) {
        const int i = r - o;
        if (i < 0 || i >= kKernelH) continue;
#pragma unroll
        for (int c = 0; c < kVector; ++c) sum[o][c] = fmaf(x[r][j][c], w[c * kTaps + i * kKernelW + j], sum[o][c]);
      }
    }
  T* target = static_cast<T*>(a.target) +
              (image * a.target_stride[0] + channel + row * a.target_stride[2] + column * a.target_stride[3]);
  if (!are_finite(sum)) {
    source += image * a.source_stride[0] + channel;
#pragma unroll 1
    for (int at = 0; at < kVectorRows * kVector; ++at) {
      const int o = at / kVector, c = at % kVector;
      if (row + o < a.out_height)
        target[o * a.target_stride[2] + c] =
            narrow<T>(exact<T, Kernel>(a, source + c, weight + c * kTaps, y0 + o, x0) +
                      (a.bias ? widen(static_cast<const T*>(a.bias)[(channel + c) * a.bias_stride]) : 0.f));
    }
    return;
  }
#pragma unroll
  for (int o = 0; o < kVectorRows; ++o)
#pragma unroll
    for (int c = 0; c < kVector; ++c) sum[o][c] += widen_one<T>(bias[c]);
#pragma unroll
  for (int o = 0; o < kVectorRows; ++o)
    if (row + o < a.out_height) *reinterpret_cast<Pixel*>(target + o * a.target_stride[2]) = Pixel::of(sum[o]);
}

// What a thread reads of a row to compute kVector columns: these, and kReach columns on either side, zeros beside the
// image. `from`: the first of the kVector.
template <typename T, int kVector, int kReach>
struct WholeColumns {
  Vector<T, kVector> run;
  uint32_t before[kReach], behind[kReach];

  __device__ void load(const T* from, int column, int width, bool inside) {
    run = dwconv::load<T, kVector>(from, inside);
#pragma unroll
    for (int j = 0; j < kReach; ++j) {
      before[j] = load_one(from - 1 - j, inside && column > j);
      behind[j] = load_one(from + kVector + j, inside && column + kVector + j < width);
    }
  }

  __device__ float operator[](int at) const {
    return at < 0 ? widen_one<T>(before[-1 - at]) : at >= kVector ? widen_one<T>(behind[at - kVector]) : run[at];
  }
};

// The same in words, where the columns do not begin with a vector, and in 16 bits a word lies an odd number of columns
// before them. There the words at both ends of a row are half another row's.
template <typename T, int kVector, int kReach>
struct ShiftedColumns {
  static constexpr int kInWord = 4 / sizeof(T);
  static constexpr int kLead = kInWord == 1 ? kReach : kReach | 1;
  static constexpr int kWords = (kVector + 2 * kLead) / kInWord;
  static_assert(kInWord == 1 || kLead < kVector + kInWord);  // so that a row ends in the words next to the columns
  Vector<T, kInWord> word[kWords];

  __device__ void load(const T* from, int column, int width, bool inside) {
#pragma unroll
    for (int n = 0; n < kWords; ++n) {
      const int first = kInWord * n - kLead, last = first + kInWord - 1;
      const bool begins = column + first >= 0, ends = column + last < width;
      word[n] = dwconv::load<T, kInWord>(from + first, inside && begins && ends);
      if (first < 0 && last == 0) word[n].words[0] |= load_one(from, inside && !begins) << 16;
      if (first == kVector - 1 && last > first) word[n].words[0] |= load_one(from + first, inside && !ends);
    }
  }

  __device__ float operator[](int at) const { return word[(at + kLead) / kInWord][(at + kLead) % kInWord]; }
};

// In NCHW, where as many columns as the kernel reaches out are padded, a thread computes kVector columns of kVectorRows
// rows. kShifted: they begin with a vector in the target alone.
template <typename T, class Kernel, int kVector, bool kShifted>
__global__ void __launch_bounds__(kVectorThreads) direct_columns(const __grid_constant__ Arguments a) {
  constexpr int kKernelH = Kernel::kKernelH, kKernelW = Kernel::kKernelW, kReach = kKernelW / 2;
  constexpr int kSourceRows = kVectorRows + kKernelH - 1, kTaps = kKernelH * kKernelW;
  using Columns = std::conditional_t<kShifted, ShiftedColumns<T, kVector, kReach>, WholeColumns<T, kVector, kReach>>;
  using Run = Vector<T, kVector>;
  uint32_t unit = blockIdx.x * kVectorThreads + threadIdx.x;
  const int column = a.by_columns.split(unit) * kVector, row = a.by_strips.split(unit) * kVectorRows;
  const int plane = a.by_planes.split(unit), image = unit;
  const int y0 = row - a.padding_h;
  uint32_t source_plane = plane;
  a.by_fan_out.split(source_plane);
  const T* source = static_cast<const T*>(a.source);
  const int offset = image * a.source_stride[0] + static_cast<int>(source_plane) * a.source_stride[1];
  const T* weight = static_cast<const T*>(a.weight) + plane * kTaps;
  const bool exists = image < a.images;
  wait_for_kernel_before();
  let_next_kernel_start();

  uint32_t w[kTaps];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) w[t] = load_one(weight + t, exists);
  Columns x[kSourceRows];
#pragma unroll
  for (int r = 0; r < kSourceRows; ++r) {
    const bool inside = exists && static_cast<uint32_t>(y0 + r) < static_cast<uint32_t>(a.height);
    x[r].load(source + (offset + (y0 + r) * a.source_stride[2] + column), column, a.width, inside);
  }
  uint32_t b = 0;
  if (a.bias) b = load_one(static_cast<const T*>(a.bias) + plane * a.bias_stride, exists);
  if (!exists) return;

  float factor[kTaps], sum[kVectorRows][kVector] = {};
#pragma unroll
  for (int t = 0; t < kTaps; ++t) factor[t] = widen_one<T>(a.flipped ? w[kTaps - 1 - t] : w[t]);
#pragma unroll
  for (int r = 0; r < kSourceRows; ++r)
#pragma unroll
    for (int at = -kReach; at < kVector + kReach; ++at) {  // columns, from the thread's first one on
      const float pixel = x[r][at];
#pragma unroll
      for (int o = 0; o < kVectorRows; ++o)
#pragma unroll
        for (int c = 0; c < kVector; ++c) {
          const int i = r - o, j = at - c + kReach;
          if (i < 0 || i >= kKernelH || j < 0 || j >= kKernelW) continue;
          sum[o][c] = fmaf(pixel, factor[i * kKernelW + j], sum[o][c]);
        }
    }
  T* target = static_cast<T*>(a.target) +
              (image * a.target_stride[0] + plane * a.target_stride[1] + row * a.target_stride[2] + column);
  const float bias = widen_one<T>(b);
  if (!are_finite(sum)) {
    source += offset;
#pragma unroll 1
    for (int at = 0; at < kVectorRows * kVector; ++at) {
      const int o = at / kVector, c = at % kVector;
      if (row + o < a.out_height)
        target[o * a.target_stride[2] + c] =
            narrow<T>(exact<T, Kernel>(a, source, weight, y0 + o, column + c - kReach) + bias);
    }
    return;
  }
#pragma unroll
  for (int o = 0; o < kVectorRows; ++o) {
#pragma unroll
    for (int c = 0; c < kVector; ++c) sum[o][c] += bias;
    if (row + o < a.out_height) *reinterpret_cast<Run*>(target + o * a.target_stride[2]) = Run::of(sum[o]);
  }
}

template <typename T, class Kernel, bool kSpread, int kRows>
void launch(Arguments a, int64_t images, int64_t planes, cudaStream_t stream) {
  const int64_t strips = ceil_div(a.out_height, kRows);
  a.by_planes = Divider(planes), a.by_strips = Divider(strips), a.by_columns = Divider(a.out_width);
  a.units = static_cast<uint32_t>(images * planes * strips * a.out_width);
  launch_early(direct<T, Kernel, kSpread, kRows>, a, ceil_div(a.units, kThreads), kThreads, stream);
  check_launch("direct");
}

// Launches a kernel that loads kVector elements at once, if all of them lie at multiples of that, or in NCHW those of
// the source as far from one as `ShiftedColumns` asks for, or in channels_last wherever `Run` loads them.
// Returns whether it did.
template <typename T, class Kernel, int kVector>
bool launch_vectors(const Problem& p, const Mapping& map, Arguments a, cudaStream_t stream) {
  const auto is_aligned = [](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % (kVector * sizeof(T)) == 0;
  };
  const auto has_vectors = [&](const View& view) {
    const int along = a.channels_last ? 1 : 3, across = 4 - along;
    return view.stride[along] == 1 &&
           ((p.batch > 1 ? view.stride[0] : 0) | view.stride[2] | view.stride[across]) % kVector == 0;
  };
  const auto& filter = p.weight.stride;
  if (filter[0] != p.taps() || filter[2] != p.kernel_w || filter[3] != 1) return false;
  if (!has_vectors(map.source) || !has_vectors(map.target) || !is_aligned(map.target.data)) return false;
  // Of the largest kernels, words and what is beside them take more registers than there are.
  constexpr bool kCanShift = kVector * sizeof(T) == 8,
                 kCanShiftPixels = kCanShift && (sizeof(T) == 4 || Kernel::kKernelH < 7);
  a.weight = p.weight.data, a.images = static_cast<int>(p.batch);
  const int64_t strips = ceil_div(a.out_height, kVectorRows);
  a.by_strips = Divider(strips);
  if (a.channels_last) {
    const int64_t groups = map.targets / kVector;
    if (p.multiplier > 1 || map.targets % kVector != 0) return false;
    if (p.pass == Pass::kGradInput) {  // the filters as they lie, on images from the last pixel backwards
      a.source = static_cast<const T*>(a.source) + (a.height - 1) * map.source.stride[2] +
                 (a.width - 1) * map.source.stride[3];
      a.target = static_cast<T*>(a.target) + (a.out_height - 1) * map.target.stride[2] +
                 (a.out_width - 1) * map.target.stride[3];
      for (int d = 2; d < 4; ++d) a.source_stride[d] *= -1, a.target_stride[d] *= -1;
    }
    a.by_planes = Divider(groups), a.by_columns = Divider(a.out_width);
    const auto kernel = [&]() -> void (*)(Arguments) {
      const auto begin_of = [&](const void* data) {
        if (is_aligned(data)) return Begin::kVector;
        return reinterpret_cast<uintptr_t>(data) % 4 == 0 ? Begin::kWord : Begin::kOdd;
      };
      const Begin source = begin_of(map.source.data), weights = begin_of(p.weight.data);
      const auto pixels = [&](auto source, auto weights) { return direct_pixels<T, Kernel, kVector, source, weights>; };
      constexpr std::integral_constant<Begin, Begin::kVector> kAsVectors{};
      constexpr std::integral_constant<Begin, Begin::kWord> kAsWords{};
      constexpr std::integral_constant<Begin, Begin::kOdd> kBetween{};
      if (source == Begin::kVector && weights == Begin::kVector) return pixels(kAsVectors, kAsVectors);
      if constexpr (kCanShiftPixels && sizeof(T) == 4) {
        return pixels(kAsWords, kAsWords);
      } else if constexpr (kCanShiftPixels) {  // where all words are whole, they serve as vectors
        if (source == Begin::kOdd && weights == Begin::kOdd) return pixels(kBetween, kBetween);
        if (source == Begin::kOdd) return pixels(kBetween, kAsWords);
        if (weights == Begin::kOdd) return pixels(kAsWords, kBetween);
      }
      return nullptr;
    }();
    if (kernel == nullptr) return false;
    launch_early(kernel, a, ceil_div(p.batch * groups * strips * a.out_width, kVectorThreads), kVectorThreads, stream);
  } else {
    const int64_t runs = a.out_width / kVector;
    const bool shifted = !is_aligned(map.source.data);
    if (shifted && !(kCanShift && reinterpret_cast<uintptr_t>(map.source.data) % 4 == sizeof(T) % 4)) return false;
    if (a.fan_in > 1 || a.padding_w != Kernel::kKernelW / 2 || a.width % kVector != 0) return false;
    a.flipped = p.pass == Pass::kGradInput;
    a.by_planes = Divider(map.targets), a.by_columns = Divider(runs);
    const auto kernel =
        shifted ? direct_columns<T, Kernel, kVector, kCanShift> : direct_columns<T, Kernel, kVector, false>;
    launch_early(kernel, a, ceil_div(p.batch * map.targets * strips * runs, kVectorThreads), kVectorThreads, stream);
  }
  check_launch("direct");
  return true;
}

template <typename T, class Kernel>
void launch_kernel(const Problem& p, const Mapping& map, const Arguments& a, cudaStream_t stream) {
  if constexpr (sizeof(T) <= 4 && Kernel::kStride == 1 && Kernel::kDilation == 1 && Kernel::kSquare &&
                Kernel::kKernelH > 1) {
    if (launch_vectors<T, Kernel, 8 / sizeof(T)>(p, map, a, stream)) return;
    if constexpr (sizeof(T) == 2)
      if (launch_vectors<T, Kernel, 4 / sizeof(T)>(p, map, a, stream)) return;
  }
  if constexpr (Kernel::kStride > 1 && sizeof(T) <= 4)
    if (map.spread) return launch<T, Kernel, true, 1>(a, p.batch, map.targets, stream);
  const int64_t outputs = p.batch * map.targets * a.out_height * a.out_width;
  const int64_t threads = int64_t{512} * current_device().multiprocessors;
  constexpr int kManyRows = many_rows<T, Kernel>();
  if (outputs > threads * kManyRows)
    launch<T, Kernel, false, kManyRows>(a, p.batch, map.targets, stream);
  else
    launch<T, Kernel, false, 1>(a, p.batch, map.targets, stream);
}

}  // namespace

void launch_direct(const Problem& p, cudaStream_t stream) {
  const Mapping map(p);
  Arguments a{map};
  a.padding_h = map.padding_h, a.padding_w = map.padding_w;
  a.channels_last = map.targets > 1 && map.target.stride[1] == 1;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    visit_small_kernel(p, [&](auto kernel) {
      using Kernel = decltype(kernel);
      if constexpr (sizeof(T) <= 4 || Kernel::kKernelH * Kernel::kKernelW <= kDirectFloat64Taps)
        launch_kernel<T, Kernel>(p, map, a, stream);
    });
  });
}

}  // namespace dwconv
