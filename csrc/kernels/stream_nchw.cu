// Forward and grad_input of small kernels on contiguous planes, streamed (stream_nchw.cuh), on CUDA cores: a thread
// computes a tile in registers. Threads side by side own tiles 7 columns apart, an odd number, so that shared memory is
// free of bank conflicts for rows of 7, 14, 28, 56 and most others.
#include "stream_nchw.cuh"

#include <type_traits>
#include <utility>

#include "launch.h"
#include "small_kernels.h"

namespace dwconv {
namespace {

// What tiles that a thread computes alone have in common.
template <class Tile>
struct TileOfThread {
  static constexpr int kTiles = 1, kLanes = 1, kLoaders = 0, kFilterBytes = 0;
  static constexpr bool kWhole = false, kSoon = true;

  // The weights that the thread needs first are on their way while the chunk is.
  template <typename T>
  __device__ void prepare(const Stream& a, const Chunk& c) {
    uint32_t plane = threadIdx.x;
    a.by_units.split(plane);
    if (plane < static_cast<uint32_t>(c.targets)) static_cast<Tile*>(this)->template know<T>(a, c.target + plane);
  }

  template <typename T>
  __device__ void compute(const Stream& a, const Chunk& c, int out) {
    const uint32_t units = c.targets * a.units;
    for (uint32_t unit = threadIdx.x; unit < units; unit += workers_of(a)) {
      uint32_t plane = unit;
      const uint32_t tile = a.by_units.split(plane);
      static_cast<Tile*>(this)->template compute_tile<T>(a, c, out, plane, tile);
    }
  }
};

// The weights of one filter in registers. Returns whether all are finite: then a product with a zero is a zero.
template <int kKernelH, int kKernelW, typename T>
__device__ bool read_weight(const Stream& a, int filter, float (&weight)[kKernelH][kKernelW]) {
  const T* row = static_cast<const T*>(a.weight) + filter * a.weight_filter;
  float zero = 0;
#pragma unroll
  for (int i = 0; i < kKernelH; ++i, row += a.weight_row) {
    const T* tap = row;
#pragma unroll
    for (int j = 0; j < kKernelW; ++j, tap += a.weight_column) {
      weight[i][j] = widen(*tap);
      zero = fmaf(weight[i][j], 0.f, zero);
    }
  }
  return zero == 0.f;
}

// A tile of kRows x 7 outputs. It walks down the source rows, reads each once and adds it to the outputs whose
// window it lies in. Needs a padding below the kernel's extent, 7 output columns, and kSum where fan_in is not 1.
// kNear: whether the padding is at most half of the extent: then fewer columns may lie outside the image.
template <class Kernel, bool kSum, int kRows_ = 7, bool kNear = false>
struct Window : TileOfThread<Window<Kernel, kSum, kRows_, kNear>> {
  static constexpr int kKernelH = Kernel::kKernelH, kKernelW = Kernel::kKernelW;
  static constexpr int kStride = Kernel::kStride, kDilation = Kernel::kDilation;
  static constexpr int kRows = kRows_, kColumns = 7;
  static constexpr int kMaxThreads = kKernelH * kKernelW < 25 || kRows < 7 ? 256 : 128;
  static constexpr int kBlocks = kMaxThreads > 128 ? 2 : kKernelH * kKernelW == 25 ? 4 : 3;

  // The filter that the thread knows: the first of those a target plane is summed over.
  int known = -1;
  bool finite;
  float weight[kKernelH][kKernelW], bias;

  template <typename T>
  __device__ void know(const Stream& a, uint32_t target) {
    const int filter = a.by_filters.split(target) * a.fan_in;
    if (filter == known) return;
    known = filter;
    bias = a.bias ? widen(static_cast<const T*>(a.bias)[filter * a.bias_stride]) : 0.f;
    finite = read_weight<kKernelH, kKernelW, T>(a, filter, weight);
  }

  template <typename T>
  __device__ void compute_tile(const Stream& a, const Chunk& c, int out, int plane, uint32_t tile) {
    // At stride 2 every other bank is read, unless all are by pairs.
    constexpr ReadBy kPairs = kKernelW / 2 % 2 == 0 ? ReadBy::kEvenPairs : ReadBy::kOddPairs;
    if constexpr (sizeof(T) == 4 && kStride == 2)
      if (a.by_pairs) return compute_tile<T, kPairs>(a, c, out, plane, tile);
    compute_tile<T, ReadBy::kOne>(a, c, out, plane, tile);
  }

  template <typename T, ReadBy kBy>
  __device__ void compute_tile(const Stream& a, const Chunk& c, int out, int plane, uint32_t tile) {
    constexpr int kExtentH = (kKernelH - 1) * kDilation + 1, kExtentW = (kKernelW - 1) * kDilation + 1;
    constexpr int kSourceRows = (kRows - 1) * kStride + kExtentH, kSourceColumns = (kColumns - 1) * kStride + kExtentW;
    uint32_t filter = c.target + plane;
    filter = a.by_filters.split(filter) * a.fan_in;
    const int strip = a.by_strips.split(tile), row = tile * kRows, rows = min(kRows, c.rows - row);
    if (rows <= 0) return;  // the last band is shorter
    // The last strip overlaps the one before, where two threads compute the same.
    const int column = min(strip * kColumns, a.out_width - kColumns);
    const int y0 = (c.row + row) * kStride - a.padding_h, x0 = column * kStride - a.padding_w;
    constexpr int kSize = sizeof(T);
    const int corner = out + (plane * c.rows + row) * a.target.row_bytes + column * kSize;
    const auto store = [&](int r, const float (&values)[kColumns]) {
      if (r >= rows) return;
      const int to = corner + r * a.target.row_bytes;
#pragma unroll
      for (int v = 0; v < kColumns; ++v) shared<T>(to + v * kSize) = narrow<T>(values[v]);
    };

    float sum[kRows][kColumns];
    if (kSum)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int v = 0; v < kColumns; ++v) sum[r][v] = 0;
    for (int q = 0; q < (kSum ? a.fan_in : 1); ++q) {
      if (kSum && q > 0)
        known = -1, finite = read_weight<kKernelH, kKernelW, T>(a, filter + q, weight);
      else
        know<T>(a, c.target + plane);
      if (!finite) return tile_by_taps<T>(a, c, corner, plane, row, rows, column, kColumns);
      const int top = ((c.group + group_of(a, plane)) * a.fan_in + q) * a.height - c.source_begin;
      RowWalk walk = walk_of(a, c, top + y0);
#pragma unroll
      for (int r = 0; r < kSourceRows; ++r) {
        const bool inside = static_cast<uint32_t>(y0 + r) < static_cast<uint32_t>(a.height);
        float x[kSourceColumns];
        constexpr int kMargin = kNear ? kExtentW / 2 : kExtentW - 1;
        read_next<T, kMargin, kSourceColumns - kMargin, kBy>(walk, inside, x0, a.width, x);
#pragma unroll
        for (int i = 0; i < kKernelH; ++i) {
          const int reach = r - i * kDilation, o = reach / kStride;
          if (reach < 0 || reach % kStride != 0 || o >= kRows) continue;
#pragma unroll
          for (int j = 0; j < kKernelW; ++j)
#pragma unroll
            for (int v = 0; v < kColumns; ++v) {
              const float before = !kSum && i == 0 && j == 0 ? bias : sum[o][v];
              sum[o][v] = fmaf(x[v * kStride + j * kDilation], weight[i][j], before);
            }
        }
        const int last = r - (kExtentH - 1);  // the last row that the output row, if any, reaches
        if (!kSum && last >= 0 && last % kStride == 0) store(last / kStride, sum[last / kStride]);
      }
    }
    if (kSum)
#pragma unroll
      for (int r = 0; r < kRows; ++r) store(r, sum[r]);
  }
};

// A tile of 7 x 7 outputs in a corner of a plane of 7 x 7 or 14 x 14 that a kernel is laid over the middle of: what
// lies outside is known at compile time, and is not computed. Other corners are mirror images of the upper left one.
template <int kKernel, int kSide>
struct Corner : TileOfThread<Corner<kKernel, kSide>> {
  static constexpr int kRows = 7, kColumns = 7;
  static constexpr int kMaxThreads = kKernel == 3 ? 256 : 128, kBlocks = kKernel == 5 ? 4 : 3;
  static constexpr int kReach = kKernel / 2;
  static constexpr int kSource = kSide == 7 ? 7 : 7 + kReach;  // rows and columns that it reads
  static constexpr bool kMirrors = kSide > 7, kWhole = true, kSoon = kKernel > 3;

  int known = -1;  // the filter, and the corner, that the thread knows
  float weight[kKernel][kKernel], bias;
  bool begun = false;  // whether a chunk has been prepared

  // `taps`: where the filter begins.
  template <typename T>
  __device__ void know(const Stream& a, int filter, const T* taps, bool up, bool left) {
    const int key = filter * 4 + up * 2 + left;
    if (key == known) return;
    known = key;
    bias = a.bias ? widen(static_cast<const T*>(a.bias)[filter * a.bias_stride]) : 0.f;
    const T* row = taps;
    const int rows = up ? -a.weight_row : a.weight_row, columns = left ? -a.weight_column : a.weight_column;
    if (up) row += (kKernel - 1) * a.weight_row;
    if (left) row += (kKernel - 1) * a.weight_column;
#pragma unroll
    for (int i = 0; i < kKernel; ++i, row += rows) {
      const T* tap = row;
#pragma unroll
      for (int j = 0; j < kKernel; ++j, tap += columns) weight[i][j] = widen(*tap);
    }
  }

  template <typename T>
  __device__ void know(const Stream& a, uint32_t target, bool up, bool left) {
    const int filter = a.by_filters.split(target);
    know(a, filter, static_cast<const T*>(a.weight) + filter * a.weight_filter, up, left);
  }

  // Brings a chunk's filters to shared memory, from `first` on, by all threads side by side: each would read its own
  // far from the others'. They go where outputs go later. Returns where the first of them begins, or null if they do
  // not lie one after the other.
  template <typename T>
  __device__ const T* fetch(const Stream& a, const Chunk& c, int first) const {
    constexpr int kTaps = kKernel * kKernel, kPerUnit = kUnit / sizeof(T);
    static_assert(kTaps <= kSide * kSide && sizeof(T) == 4);
    const int step = a.weight_column, begin = step < 0 ? kTaps - 1 : 0, count = c.targets * kTaps;
    if ((step != 1 && step != -1) || a.weight_row != step * kKernel || a.weight_filter != kTaps ||
        first + c.targets > static_cast<int>(a.by_filters.divisor))
      return nullptr;
    T* to = &shared<T>(a.buffer_at);
    const T* from = static_cast<const T*>(a.weight) + first * kTaps - begin;
    const int in_units = reinterpret_cast<uintptr_t>(from) % kUnit == 0 ? count / kPerUnit * kPerUnit : 0;
    for (int i = threadIdx.x * kPerUnit; i < in_units; i += workers_of(a) * kPerUnit)
      copy_unit<kUnit>(shared_address(to + i), from + i);
    for (int i = in_units + threadIdx.x; i < count; i += workers_of(a))
      copy_unit<sizeof(T)>(shared_address(to + i), from + i);
    commit_copies();
    wait_copies<0>();
    meet_workers(a);
    return to + begin;
  }

  template <typename T>
  __device__ void prepare(const Stream& a, const Chunk& c) {
    uint32_t plane = threadIdx.x;
    const uint32_t tile = a.by_units.split(plane);
    const bool has_plane = plane < static_cast<uint32_t>(c.targets), up = tile > 1, left = tile & 1;
    if constexpr (kKernel > 5)  // fewer weights come as fast from memory
      if (!std::exchange(begun, true)) {
        uint32_t first = c.target;
        first = a.by_filters.split(first);
        if (const T* taps = fetch<T>(a, c, first)) {
          if (has_plane) know(a, first + plane, taps + plane * (kKernel * kKernel), up, left);
          return;
        }
      }
    if (has_plane) know<T>(a, c.target + plane, up, left);
  }

  template <typename T>
  __device__ void compute_tile(const Stream& a, const Chunk& c, int out, int plane, uint32_t tile) {
    const bool up = kMirrors && tile > 1, left = kMirrors && tile & 1;
    know<T>(a, c.target + plane, up, left);
    constexpr int kSize = sizeof(T);
    const int step = left ? -kSize : kSize, down = up ? -kSide * kSize : kSide * kSize;
    const int first = left ? (kSide - 1) * kSize : 0, top = group_of(a, plane) * kSide + (up ? kSide - 1 : 0);
    int from = c.source_at + top * (kSide * kSize) + first;
    int to = out + (plane * kSide + (up ? kSide - 1 : 0)) * (kSide * kSize) + first;

    float sum[kRows][kColumns];
#pragma unroll
    for (int r = 0; r < kSource; ++r) {
      float x[kSource];
#pragma unroll
      for (int s = 0; s < kSource; ++s) x[s] = widen(shared<T>(kMirrors ? from + s * step : from + s * kSize));
      from += kMirrors ? down : kSide * kSize;
#pragma unroll
      for (int i = kKernel - 1; i >= 0; --i) {
        const int o = r - i + kReach;
        if (o < 0 || o >= kRows) continue;
#pragma unroll
        for (int j = 0; j < kKernel; ++j)
#pragma unroll
          for (int v = 0; v < kColumns; ++v) {
            const int s = v + j - kReach;
            if (s < 0 || s >= kSource) continue;
            const bool starts = (r == 0 || i == 0) && (j == 0 || s == 0);
            sum[o][v] = fmaf(x[s], weight[i][j], starts ? bias : sum[o][v]);
          }
      }
#pragma unroll
      for (int o = 0; o < kRows; ++o)
        if (r == (o + kReach < kSource ? o + kReach : kSource - 1)) {
#pragma unroll
          for (int v = 0; v < kColumns; ++v)
            shared<T>(kMirrors ? to + v * step : to + v * kSize) = narrow<T>(sum[o][v]);
          to += kMirrors ? down : kSide * kSize;
        }
    }
  }
};

// The filters of a chunk whose planes are summed over, in shared memory: a thread needs them in turn for each of its
// tiles, and memory is far away. Behind each lies a zero if all of its weights are finite.
template <int kKernel>
struct SummedFilters {
  static constexpr int kTaps = kKernel * kKernel, kBytes = (4 * (kTaps + 1) + kUnit - 1) / kUnit * kUnit;

  int first = -1;  // of those that are there

  // By a warp for each filter.
  template <typename T>
  __device__ void load(const Stream& a, const Chunk& c) {
    const auto number = [&](int index) {
      uint32_t filter = c.target * a.fan_in + index;
      return a.by_weights.split(filter);
    };
    if (std::exchange(first, static_cast<int>(number(0))) == static_cast<int>(number(0))) return;
    constexpr int kTurns = (kTaps + 31) / 32;
    const int lane = threadIdx.x % 32;
    for (int index = threadIdx.x / 32; index < c.targets * a.fan_in; index += workers_of(a) / 32) {
      const T* taps = static_cast<const T*>(a.weight) + number(index) * a.weight_filter;
      const int at = a.filters_at + index * kBytes;
      float weight[kTurns] = {}, zero = 0;
#pragma unroll
      for (int t = 0; t < kTurns; ++t)
        if (const int tap = lane + 32 * t; tap < kTaps)
          weight[t] = widen(__ldg(taps + tap / kKernel * a.weight_row + tap % kKernel * a.weight_column));
#pragma unroll
      for (int t = 0; t < kTurns; ++t) {
        if (const int tap = lane + 32 * t; tap < kTaps) shared<float>(at + 4 * tap) = weight[t];
        zero = fmaf(weight[t], 0.f, zero);
      }
      const bool finite = __all_sync(~0u, zero == 0.f);
      if (lane == 0) shared<float>(at + 4 * kTaps) = finite ? 0.f : 1.f;
    }
  }

  // Reads the weights of one of the chunk's source planes; returns whether all are finite.
  static __device__ bool read(const Stream& a, int plane, float (&weight)[kKernel][kKernel]) {
    float zero = 0;
#pragma unroll
    for (int unit = 0; unit < kBytes / kUnit; ++unit) {
      const float4 taps = shared<float4>(a.filters_at + plane * kBytes + unit * kUnit);
      const float four[] = {taps.x, taps.y, taps.z, taps.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int tap = 4 * unit + k;
        if (tap < kTaps) weight[tap / kKernel][tap % kKernel] = four[k];
        if (tap == kTaps) zero = four[k];
      }
    }
    return zero == 0.f;
  }
};

// grad_input at stride 2: a tile of kPairs x 7 pairs of rows and columns. Which taps reach a row depends on whether the
// row plus the padding is even: known at compile time, given whether the padding is (kOdd). kMiddle: whether the kernel
// is laid over the middle, and tiles fill the rows: then few columns may lie outside the image.
template <int kKernel, int kOdd, bool kMiddle = false>
struct Spread : TileOfThread<Spread<kKernel, kOdd, kMiddle>> {
  static constexpr bool kSoon = kKernel > 5;
  static constexpr int kPairs = kKernel == 3 ? 3 : 2;
  static constexpr int kRows = 2 * kPairs, kColumns = 14;
  static constexpr int kMaxThreads = 128, kBlocks = 3;
  using Filters = SummedFilters<kKernel>;
  static constexpr bool kShares = kKernel > 5;  // where planes are summed over; fewer weights come as fast from memory
  static constexpr int kFilterBytes = kShares ? Filters::kBytes : 0;

  // The filter that the thread knows: the first of those a target plane is summed over.
  int known = -1;
  bool finite;
  float weight[kKernel][kKernel];
  Filters filters;

  template <typename T>
  __device__ void prepare(const Stream& a, const Chunk& c) {
    if (kShares && a.fan_in > 1)
      filters.template load<T>(a, c);
    else
      TileOfThread<Spread>::template prepare<T>(a, c);
  }

  template <typename T>
  __device__ void know(const Stream& a, uint32_t target) {
    const int filter = a.by_filters.split(target) * a.fan_in;
    if (filter == known) return;
    known = filter;
    finite = read_weight<kKernel, kKernel, T>(a, filter, weight);
  }

  template <typename T>
  __device__ void compute_tile(const Stream& a, const Chunk& c, int out, int plane, uint32_t tile) {
    constexpr int kLow = (kOdd - kKernel + 1) / 2, kSpan = kOdd - kLow;  // source rows from kLow to kOdd off
    constexpr int kSourceRows = kPairs + kSpan, kSourceColumns = kColumns / 2 + kSpan;
    uint32_t filter = c.target + plane;
    filter = a.by_filters.split(filter) * a.fan_in;
    // The last strip overlaps the one before, where two threads compute the same, and begins at an even column, too.
    const int last_column = max((a.out_width - kColumns + 1) & ~1, 0);
    const int column = min(static_cast<int>(a.by_strips.split(tile)) * kColumns, last_column), row = tile * kRows;
    if (row >= c.rows) return;  // the last band is shorter
    const int rows = min(kRows, c.rows - row), columns = min(kColumns, a.out_width - column);
    const int y0 = (c.row + row) / 2 + a.padding_h / 2 + kLow, x0 = column / 2 + a.padding_w / 2 + kLow;
    constexpr int kSize = sizeof(T);
    const int corner = out + (plane * c.rows + row) * a.target.row_bytes + column * kSize;
    float sum[kRows][kColumns] = {};

    for (int q = 0; q < a.fan_in; ++q) {
      if (kShares && a.fan_in > 1)
        finite = Filters::read(a, plane * a.fan_in + q, weight);
      else if (q > 0)
        known = -1, finite = read_weight<kKernel, kKernel, T>(a, filter + q, weight);
      else
        know<T>(a, c.target + plane);
      if (!finite) return tile_by_taps<T>(a, c, corner, plane, row, rows, column, columns);
      const int top = ((c.group + (a.bands > 1 ? 0 : plane)) * a.fan_in + q) * a.height - c.source_begin;
      RowWalk walk = walk_of(a, c, top + y0);
#pragma unroll
      for (int r = 0; r < kSourceRows; ++r) {
        const bool inside = static_cast<uint32_t>(y0 + r) < static_cast<uint32_t>(a.height);
        float x[kSourceColumns];
        constexpr int kPadding = kKernel / 2;
        constexpr int kSure = kMiddle ? -(kPadding / 2 + kLow) : 0;
        constexpr int kSureEnd = kMiddle ? kSourceColumns - (kPadding + 1) / 2 : 0;
        read_next<T, kSure, kSureEnd>(walk, inside, x0, a.width, x);
#pragma unroll
        for (int o = 0; o < kRows; ++o) {
          const int i = o % 2 + kOdd - 2 * (r + kLow - o / 2);
          if (i < 0 || i >= kKernel) continue;
#pragma unroll
          for (int v = 0; v < kColumns; ++v)
#pragma unroll
            for (int s = 0; s <= kSpan; ++s) {
              const int j = v % 2 + kOdd - 2 * (s + kLow);
              if (j >= 0 && j < kKernel) sum[o][v] = fmaf(x[v / 2 + s], weight[i][j], sum[o][v]);
            }
        }
      }
    }

    const int row_bytes = a.target.row_bytes;
    const bool full = columns == kColumns;
    const auto one = [&](int r, int v) { shared<T>(corner + r * row_bytes + v * kSize) = narrow<T>(sum[r][v]); };
    if (kSize == 4 && full && corner % 8 == 0 && row_bytes % 8 == 0) {
      // Tiles below each other would write to the same banks: every other one writes its rows in another order.
      int turn = 0;
      if constexpr (kRows % 4 == 0)
        if (kRows * row_bytes % 128 == 0) {
          turn = row / kRows % 2;
#pragma unroll
          for (int r = 0; r < kRows; r += 2)
#pragma unroll
            for (int v = 0; v < kColumns; ++v) {
              const float even = sum[r][v], odd = sum[r + 1][v];
              sum[r][v] = turn ? odd : even, sum[r + 1][v] = turn ? even : odd;
            }
        }
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if ((r ^ turn) < rows)
#pragma unroll
          for (int v = 0; v < kColumns; v += 2)
            shared<float2>(corner + (r ^ turn) * row_bytes + v * kSize) = {sum[r][v], sum[r][v + 1]};
      return;
    }
    if (columns >= kColumns - 1) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
#pragma unroll
        for (int v = 0; v < kColumns - 1; ++v) one(r, v);
        if (full) one(r, kColumns - 1);
      }
      return;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
        if (v < columns) one(r, v);
    }
  }
};

struct Setting {
  int* counters;
  int value;
};

__global__ void write_counters(const __grid_constant__ Setting setting) {
  let_next_kernel_start();
  wait_for_kernel_before();
  setting.counters[threadIdx.x] = setting.value;
}

}  // namespace

void set_counters(int* counters, int count, int value, cudaStream_t stream) {
  launch_early(write_counters, Setting{counters, value}, 1, count, stream);
  check_launch("set_counters");
}

void launch_stream_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  Stream a;
  int64_t images;
  std::tie(a, images) = stream_of(p, bulk);
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4) {
      const bool compiled = visit_small_kernel(p, [&](auto kernel) {
        using Kernel = decltype(kernel);
        constexpr int kSide = Kernel::kKernelH;
        const auto window = [&](auto rows) {
          constexpr int kRows = decltype(rows)::value;
          if constexpr (sizeof(T) == 4 && Kernel::kKernelW > 1)  // in 16 bits few problems are left to CUDA cores
            if (2 * a.padding_w <= (Kernel::kKernelW - 1) * Kernel::kDilation)
              return launch<T, Window<Kernel, false, kRows, true>>(a, images, allocate, stream);
          launch<T, Window<Kernel, false, kRows>>(a, images, allocate, stream);
        };
        // Of long rows shared memory holds a block or two, which then have to be large ones.
        constexpr int kLongRow = 2800;  // bytes
        if constexpr (sizeof(T) == 4 && kSide == 7 && Kernel::kStride == 1)
          if (a.fan_in == 1 && a.source.row_bytes > kLongRow) return window(std::integral_constant<int, 4>{});
        if constexpr (sizeof(T) == 4 && Kernel::kSquare && kSide > 1 && Kernel::kStride == 1 && Kernel::kDilation == 1)
          if (a.fan_in == 1 && a.padding_h == kSide / 2 && a.padding_w == kSide / 2 && a.height == a.width) {
            if (kSide == 7) a.bulk = false;  // a warp that loads is faster where so much is computed
            if (a.height == 7) return launch<T, Corner<kSide, 7>>(a, images, allocate, stream);
            if (a.height == 14) return launch<T, Corner<kSide, 14>>(a, images, allocate, stream);
          }
        // Where planes are one tile, shared memory holds too few of them to keep a multiprocessor's threads busy.
        if constexpr (sizeof(T) == 4 && kSide == 5 && Kernel::kStride == 2)
          if (!a.spread && a.fan_in == 1 && a.out_height <= 7 && a.out_width == 7)
            return window(std::integral_constant<int, 4>{});
        // Nor do the few planes of a large kernel at stride 2. Tiles of 3 rows begin 6 source rows apart: where a plane
        // is 56 columns wide, say, those below each other lie in different banks, unlike 8 rows.
        constexpr int kRows = sizeof(T) == 4 && kSide == 7 && Kernel::kStride == 2 ? 3 : 7;
        if (!a.spread && a.fan_in == 1) return window(std::integral_constant<int, kRows>{});
        if constexpr (Kernel::kSquare && Kernel::kKernelH > 1 && Kernel::kDilation == 1) {
          if constexpr (Kernel::kStride == 1) {
            launch<T, Window<Kernel, true>>(a, images, allocate, stream);
          } else {
            constexpr int kMiddle = kSide / 2, kColumns = 14;
            if (a.padding_h % 2 == kMiddle % 2 && a.padding_w == kMiddle && a.out_width >= kColumns)
              launch<T, Spread<kSide, kMiddle % 2, true>>(a, images, allocate, stream);
            else if (a.padding_h % 2 == 0)
              launch<T, Spread<kSide, 0>>(a, images, allocate, stream);
            else
              launch<T, Spread<kSide, 1>>(a, images, allocate, stream);
          }
        }
      });
      if (!compiled) throw std::runtime_error("dwconv: no tile of stream_nchw is compiled for this kernel");
    }
  });
}

}  // namespace dwconv
