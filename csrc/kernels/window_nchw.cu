// 3x3, stride 1, rows contiguous in memory; forward, and grad_input as a forward pass with the kernel flipped.
//
// A thread owns V neighbouring columns of kRows output rows. It walks down the kRows + 2 input rows, reads each once,
// and adds it to the up to three output rows whose window it lies in, so that all its loads are independent and in
// flight together; what neighbouring threads share is found in L1. Bytes bound: one read of the input, one write of the
// output; the two rows of overlap between tiles hit L2.
#include "common.cuh"
#include "launch.h"

namespace dwconv {
namespace {

constexpr int kSide = 3;
constexpr int kRows = 8;
constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 5;  // at most 48 registers a thread: more threads in flight hide more latency

struct Arguments {
  const void* source;
  const void* weight;
  const void* bias;
  void* target;
  int64_t source_batch, source_channel;  // strides, in elements
  int64_t target_batch, target_channel;
  int64_t weight_filter, weight_row, weight_column;
  int64_t bias_stride;
  int source_row, target_row;
  int height, width, out_height, out_width;
  int padding_h, padding_w;  // negative where grad_input reads inside the gradient only
  uint32_t units;
  Divider column_groups, row_tiles, filters, multiplier;
};

template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  T element[V];
};

// Whether a weight is Inf or NaN, so that a product with a zero of the padding would be NaN.
__device__ inline bool is_finite(float value) {
  return fabsf(value) <= 3.402823466e38f;
}

// The outputs of one thread, tap by tap and none outside the image. Only for weights that are not finite.
template <typename T, int V>
__device__ void window_by_taps(const Arguments& a, const T* source, T* target, const float (&weight)[kSide][kSide],
                               float bias, int row, int column) {
  for (int r = row; r < min(row + kRows, a.out_height); ++r)
    for (int c = column; c < column + V; ++c) {
      float sum = bias;
#pragma unroll
      for (int i = 0; i < kSide; ++i)
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
          const int y = r - a.padding_h + i, x = c - a.padding_w + j;
          if (y >= 0 && y < a.height && x >= 0 && x < a.width)
            sum = fmaf(widen(source[y * a.source_row + x]), weight[i][j], sum);
        }
      target[r * a.target_row + c] = narrow<T>(sum);
    }
}

// kShift columns are read before the window, so that vectors start at even columns.
template <typename T, int V, int kShift>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) window_nchw(const Arguments a) {
  uint32_t unit = blockIdx.x * kThreads + threadIdx.x;
  if (unit >= a.units) return;
  const int column = a.column_groups.split(unit) * V;
  const int row = a.row_tiles.split(unit) * kRows;
  const uint32_t filter = a.filters.split(unit);
  const int64_t image = unit;
  uint32_t channel = filter;
  a.multiplier.split(channel);

  const T* source = static_cast<const T*>(a.source) + image * a.source_batch + channel * a.source_channel;
  T* target = static_cast<T*>(a.target) + image * a.target_batch + filter * a.target_channel;

  const T* taps = static_cast<const T*>(a.weight) + filter * a.weight_filter;
  float weight[kSide][kSide];
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kSide; ++i)
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      weight[i][j] = widen(taps[i * a.weight_row + j * a.weight_column]);
      finite &= is_finite(weight[i][j]);
    }
  const float bias = a.bias ? widen(static_cast<const T*>(a.bias)[filter * a.bias_stride]) : 0.f;
  if (!finite) return window_by_taps<T, V>(a, source, target, weight, bias, row, column);

  constexpr int kVectors = (V + kSide - 1 + kShift + V - 1) / V;
  using Vec = Vector<T, V>;
  const int first = column - a.padding_w - kShift;
  float sum[kRows][V];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < V; ++c) sum[r][c] = bias;

#pragma unroll
  for (int r = 0; r < kRows + kSide - 1; ++r) {
    const int y = row - a.padding_h + r;
    float x[kVectors * V];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int begin = first + v * V;
      Vec vec{};
      if (y >= 0 && y < a.height && begin >= 0 && begin < a.width)
        vec = *reinterpret_cast<const Vec*>(source + y * a.source_row + begin);
#pragma unroll
      for (int e = 0; e < V; ++e) x[v * V + e] = widen(vec.element[e]);
    }
#pragma unroll
    for (int i = 0; i < kSide; ++i) {
      const int out = r - i;
      if (out < 0 || out >= kRows) continue;
#pragma unroll
      for (int j = 0; j < kSide; ++j)
#pragma unroll
        for (int c = 0; c < V; ++c) sum[out][c] = fmaf(x[c + j + kShift], weight[i][j], sum[out][c]);
    }
    const int done = r - (kSide - 1);
    if (done >= 0 && row + done < a.out_height) {
      Vec vec;
#pragma unroll
      for (int c = 0; c < V; ++c) vec.element[c] = narrow<T>(sum[done][c]);
      *reinterpret_cast<Vec*>(target + (row + done) * a.target_row + column) = vec;
    }
  }
}

// Whether every row starts on a multiple of two elements and holds a whole number of pairs.
bool comes_in_pairs(const View& view, int64_t width, int64_t element_size) {
  return width % 2 == 0 && view.stride[0] % 2 == 0 && view.stride[1] % 2 == 0 && view.stride[2] % 2 == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % (2 * element_size) == 0;
}

template <typename T>
void launch(const Arguments& a, int columns_per_thread, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(a.units, kThreads));
  if (columns_per_thread == 1)
    window_nchw<T, 1, 0><<<blocks, kThreads, 0, stream>>>(a);
  else if (a.padding_w % 2 == 0)
    window_nchw<T, 2, 0><<<blocks, kThreads, 0, stream>>>(a);
  else
    window_nchw<T, 2, 1><<<blocks, kThreads, 0, stream>>>(a);
  check_launch("window_nchw");
}

}  // namespace

void launch_window_nchw(const Problem& p, cudaStream_t stream) {
  const bool forward = p.pass == Pass::kForward;
  const View& source = forward ? p.input : p.output;
  const View& target = forward ? p.output : p.input;
  const int64_t width = forward ? p.width : p.out_width;
  const int64_t out_width = forward ? p.out_width : p.width;

  Arguments a{};
  a.weight_filter = p.weight.stride[0];
  a.weight_row = p.weight.stride[2];
  a.weight_column = p.weight.stride[3];
  if (forward) {
    a.weight = p.weight.data;
    a.height = static_cast<int>(p.height), a.out_height = static_cast<int>(p.out_height);
    a.padding_h = static_cast<int>(p.padding_h), a.padding_w = static_cast<int>(p.padding_w);
  } else {  // flipped: from the last tap backwards
    a.weight =
        static_cast<const char*>(p.weight.data) + size_of(p.dtype) * (kSide - 1) * (a.weight_row + a.weight_column);
    a.weight_row = -a.weight_row, a.weight_column = -a.weight_column;
    a.height = static_cast<int>(p.out_height), a.out_height = static_cast<int>(p.height);
    a.padding_h = static_cast<int>(kSide - 1 - p.padding_h), a.padding_w = static_cast<int>(kSide - 1 - p.padding_w);
  }
  a.width = static_cast<int>(width), a.out_width = static_cast<int>(out_width);
  a.bias = forward ? p.bias : nullptr;
  a.bias_stride = p.bias_stride;
  a.source_batch = source.stride[0], a.source_channel = source.stride[1];
  a.target_batch = target.stride[0], a.target_channel = target.stride[1];
  a.source_row = static_cast<int>(source.stride[2]), a.target_row = static_cast<int>(target.stride[2]);

  const bool pairs =
      comes_in_pairs(source, width, size_of(p.dtype)) && comes_in_pairs(target, out_width, size_of(p.dtype));
  const int columns_per_thread = pairs ? 2 : 1;
  const int64_t column_groups = out_width / columns_per_thread;
  const int64_t row_tiles = ceil_div(a.out_height, kRows);
  a.column_groups = Divider(column_groups);
  a.row_tiles = Divider(row_tiles);
  a.filters = Divider(p.filters());
  a.multiplier = Divider(p.multiplier);

  // Thread numbers are 32 bits wide: a larger batch goes in slices.
  const int64_t units_per_image = p.filters() * row_tiles * column_groups;
  const int64_t slice = ((int64_t{1} << 31) - 1 - kThreads) / units_per_image;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4) {
      for (int64_t first = 0; first < p.batch; first += slice) {
        a.source = static_cast<const T*>(source.data) + first * a.source_batch;
        a.target = static_cast<T*>(target.data) + first * a.target_batch;
        a.units = static_cast<uint32_t>(units_per_image * (p.batch - first < slice ? p.batch - first : slice));
        launch<T>(a, columns_per_thread, stream);
      }
    }
  });
}

}  // namespace dwconv
