// Forward and grad_input of 7x7 and 9x9 in float32 on contiguous planes (march_nchw.cuh). A lane marches down a strip
// of 7 columns: each source row, read once, is added to all the output rows that it reaches, whose sums are in
// registers; the oldest of them is then complete. The loop is one row, so that it stays in the instruction cache.
#include <algorithm>
#include <cmath>

#include "launch.h"
#include "mapping.h"
#include "march_nchw.cuh"
#include "overlap.cuh"
#include "small_kernels.h"

namespace dwconv {
namespace {

struct March {
  MarchCut cut;
  PlaneRows source, target;
  const float* weight;
  int64_t weight_filter;
  int weight_row, weight_column;
  int dense;  // 1 if the weights lie one after the other, -1 if those of a filter do backwards, or else 0
  const float* bias;
  int64_t bias_stride;
};

// The outputs of a strip by the taps that meet the image. For kernels with a tap that is Inf or NaN, which must not
// meet padding.
template <int kKernel>
__device__ __noinline__ void strip_by_taps(const March& a, int image, int plane, int begin, int end, int column) {
  const float* weight = a.weight + plane * a.weight_filter;
  const char* source = a.source.base + image * a.source.image_bytes + plane * a.source.plane_bytes;
  char* target = a.target.base + image * a.target.image_bytes + plane * a.target.plane_bytes;
  for (int row = begin; row < end; ++row)
    for (int v = column; v < column + kStrip; ++v) {
      float sum = a.bias ? a.bias[plane * a.bias_stride] : 0.f;
      for (int i = 0; i < kKernel; ++i)
        for (int j = 0; j < kKernel; ++j) {
          const int y = row - a.cut.padding_h + i, x = v - a.cut.padding_w + j;
          if (y < 0 || y >= a.source.height || x < 0 || x >= a.source.width) continue;
          sum = fmaf(reinterpret_cast<const float*>(source + static_cast<int64_t>(y) * a.source.row_bytes)[x],
                     weight[i * a.weight_row + j * a.weight_column], sum);
        }
      reinterpret_cast<float*>(target + static_cast<int64_t>(row) * a.target.row_bytes)[v] = sum;
    }
}

// What a warp has to know now and then, in its shared memory: registers are short, and only if there are some to spare
// do sums and pixels lie in different banks of them.
struct __align__(16) Known {
  int image, channel, planes, row, column, bytes;  // where the rows of the target go that are computed next
  int begin;                                       // the first row of the target whose source was not yet loaded,
  int done;                                        // and how many rows of that were
};

// Begins to load the next group of a warp's source rows, through all of its runs, if there is one.
template <int kKernel>
__device__ inline void load_next(const MarchCut& a, const PlaneRows& rows, int end, int span, Known& known,
                                 MarchRing& ring) {
  const int begin = known.begin, done = known.done;
  __syncwarp();
  if (begin < end) {
    const MarchRun r = run_of(a, rows.height, rows.width, begin, end, kKernel, span);
    const CopyShare share(a, rows);
    const int row = r.first + done, left = r.last + 1 - row, count = min(left, rows.group_rows);
    const char* from = rows.at(r.image, r.channel + share.piece, row, r.source_column);
    const char* image = rows.at(r.image, 0, 0, 0);
    ring.load(a, rows, share, r.planes, count, (r.source_end - r.source_column) * 4, from, image, 0);
    if (threadIdx.x % 32 == 0) {
      known.begin = count < left ? begin : begin + (r.end - r.begin);
      known.done = count < left ? done + count : 0;
    }
  }
  ring.commit(a);
}

// Blocks on a multiprocessor, as registers allow.
constexpr int blocks_of(int kernel) {
  return kernel > kMarchKernel ? 2 : kMarchBlocks;
}

// kMargin: how many columns at most lie outside the image on either side of a strip.
template <int kKernel, int kMargin>
__global__ void __launch_bounds__(32 * kMarchWarps, blocks_of(kKernel)) march_nchw(const __grid_constant__ March a) {
  constexpr int kColumns = kStrip + kKernel - 1, kTaps = kKernel * kKernel;
  const MarchCut& cut = a.cut;
  const int lane = threadIdx.x % 32;
  const int stage = kRowMargin + threadIdx.x / 32 * cut.warp_bytes;
  uint32_t worker = blockIdx.x * kMarchWarps + threadIdx.x / 32;
  const int span = cut.by_worker_spans.split(worker);
  const auto row_of = [&](int worker) {
    return static_cast<int>(static_cast<int64_t>(cut.units) * min(worker, cut.workers) / cut.workers) * cut.unit_rows;
  };
  const int begin = row_of(worker), end = row_of(worker + 1);
  uint32_t plane = lane;
  const int strip = cut.by_strips.split(plane);

  Known& known = shared<Known>(stage + cut.stage_bytes);
  if (lane == 0) known.begin = begin, known.done = 0;
  MarchRing ring(cut, stage + cut.stage_bytes + static_cast<int>(sizeof(Known)));
  __syncwarp();
  let_next_kernel_start();
  wait_for_kernel_before();
  load_next<kKernel>(cut, a.source, end, span, known, ring);

  const uint32_t weights = shared_address(stage);
  float weight[kKernel][kKernel], bias = 0;
  bool finite = true;  // then a product with a zero is a zero
  int channel = -1;
  for (int at = begin; at < end;) {
    const MarchRun r = run_of(cut, a.source.height, a.source.width, at, end, kKernel, span);
    at += r.end - r.begin;
    const bool live = static_cast<int>(plane) < r.planes;
    const int own = live ? static_cast<int>(plane) : 0;  // lanes to spare do what another one does, and store nothing
    if (r.channel != channel) {
      channel = r.channel;
      const int count = r.planes * kTaps;
      if (a.dense != 0) {  // forwards or backwards
        const float* from = a.weight + channel * kTaps - (a.dense < 0 ? kTaps - 1 : 0);
        for (int i = lane; i < count; i += 32)
          at_address<float>(weights + 4 * (a.dense > 0 ? i : 2 * (i / kTaps * kTaps) + kTaps - 1 - i)) = from[i];
      } else {
        for (int i = lane; i < count; i += 32)
          at_address<float>(weights + 4 * i) =
              a.weight[(channel + i / kTaps) * a.weight_filter + i % kTaps / kKernel * a.weight_row +
                       i % kTaps % kKernel * a.weight_column];
      }
      __syncwarp();
      float zero = 0;
#pragma unroll
      for (int i = 0; i < kKernel; ++i)
#pragma unroll
        for (int j = 0; j < kKernel; ++j) {
          weight[i][j] = at_address<float>(weights + 4 * (own * kTaps + i * kKernel + j));
          zero = fmaf(weight[i][j], 0.f, zero);
        }
      finite = zero == 0.f;
      if (a.bias) bias = a.bias[(channel + own) * a.bias_stride];
      __syncwarp();
    }

    const int column = min(r.column + (live ? strip : 0) * kStrip, cut.target_width - kStrip);
    const int x0 = column - cut.padding_w;
    ColumnMasks<kColumns, kMargin> masks;
    masks.set(x0, a.source.width);
    const uint32_t source_low = a.source.phase(r.image, r.channel + (a.source.whole ? 0 : own), 0, r.source_column);
    const uint32_t target_low = a.target.phase(r.image, r.channel + (a.target.whole ? 0 : own), 0, r.column);
    const int source_lane = own * a.source.piece_pitch + (x0 - r.source_column) * 4;
    const uint32_t target_lane = shared_address(stage) + own * a.target.piece_pitch + (column - r.column) * 4;
    if (lane == 0) {
      known.image = r.image, known.channel = r.channel, known.planes = r.planes;
      known.row = r.begin, known.column = r.column, known.bytes = (r.column_end - r.column) * 4;
    }

    RowPlace source, target;
    target.begin(target_lane, target_low + r.begin * a.target.row_bytes);
    int fresh = 0, staged = 0;
    float sum[kKernel][kStrip];  // the oldest output row first; those that lie above the run are never stored
#pragma unroll
    for (int o = 0; o < kKernel; ++o)
#pragma unroll
      for (int v = 0; v < kStrip; ++v) sum[o][v] = bias;

    // Puts a complete row beside others, and stores them when they are as many as there is room for.
    const auto store = [&](int row) {
      const uint32_t here = target.next(a.target);
      if (live)
#pragma unroll
        for (int v = 0; v < kStrip; ++v) at_address<float>(here + 4 * v) = sum[0][v];
      if (++staged < a.target.group_rows && row + 1 < r.end) return;
      __syncwarp();
      const CopyShare share(cut, a.target);
      const int planes = known.planes;
      if (share.piece < planes) {
        char* to = a.target.at(known.image, known.channel + share.piece, known.row, known.column);
        uint32_t from = shared_address(stage) + share.piece * a.target.piece_pitch;
        const int bytes = a.target.whole      ? static_cast<int>(a.target.plane_bytes) * planes
                          : a.target.together ? staged * a.target.row_bytes
                                              : known.bytes;
        const int count = a.target.together ? 1 : staged;
#pragma unroll 1
        for (int i = 0; i < count; ++i, from += a.target.row_pitch, to += a.target.row_bytes) {
          const int phase = static_cast<int>(reinterpret_cast<uintptr_t>(to) % kUnit);
          char* base = to - phase;
          each_unit(
              share, phase, phase + bytes,
              [&](int u, int next, bool both) {
                const uint4 first = at_address<uint4>(from + u);
                uint4 second;
                if (both) second = at_address<uint4>(from + next);
                *reinterpret_cast<uint4*>(base + u) = first;
                if (both) *reinterpret_cast<uint4*>(base + next) = second;
              },
              [&](int u) { *reinterpret_cast<float*>(base + u) = at_address<float>(from + u); });
        }
      }
      __syncwarp();
      if (lane == 0) known.row = row + 1;
      staged = 0;
      target.begin(target_lane, target_low + (row + 1) * a.target.row_bytes);
    };

    int row = r.first + cut.padding_h - (kKernel - 1);  // the oldest
    for (int y = r.first; y <= r.last; ++y, ++row) {
      if (fresh == 0) {
        const uint32_t group = ring.next(cut);
        load_next<kKernel>(cut, a.source, end, span, known, ring);
        fresh = min(a.source.group_rows, r.last + 1 - y);
        source.begin(group + source_lane, source_low + y * a.source.row_bytes);
      }
      --fresh;
      float x[kColumns];
      masks.read(source.next(a.source), x);
#pragma unroll
      for (int j = 0; j < kKernel; ++j)
#pragma unroll
        for (int o = 0; o < kKernel; ++o)
#pragma unroll
          for (int v = 0; v < kStrip; ++v)
            sum[o][v] = fmaf(x[v + j], weight[kKernel - 1 - o][j],
                             j > 0             ? sum[o][v]
                             : o + 1 < kKernel ? sum[o + 1][v]
                                               : bias);
      if (row >= r.begin) store(row);
    }
    // Rows below the image are zeros: in a loop of their own, or else the sums were moved for every row.
    for (; row < r.end; ++row) {
#pragma unroll
      for (int o = 0; o + 1 < kKernel; ++o)
#pragma unroll
        for (int v = 0; v < kStrip; ++v) sum[o][v] = sum[o + 1][v];
      if (row >= r.begin) store(row);
    }
    if (!finite && live) strip_by_taps<kKernel>(a, r.image, r.channel + own, r.begin, r.end, column);
  }
}

using Kernel = void (*)(March);

// How a problem is cut.
struct Decision {
  MarchCut cut;
  PlaneRows source, target;
  int blocks, shared_bytes;
};

Decision decide(const March& a, int64_t images, int side, Kernel kernel, const Device& device) {
  Decision d{a.cut, a.source, a.target, 0, 0};
  MarchCut& cut = d.cut;
  choose_lanes(cut);
  const int budget = march_budget(device, blocks_of(side));
  const int taps = static_cast<int>(round_up(cut.planes * side * side * 4, kUnit));
  const auto fill = [&](bool whole, int rows, int target_rows) {
    arrange(d.source, cut, cut.columns + side - 1, rows, whole);
    arrange(d.target, cut, cut.columns, target_rows, whole);
    cut.stage_bytes = std::max(taps, static_cast<int>(round_up(d.target.group_bytes, kUnit)));
    cut.group_bytes = d.source.group_bytes;
    cut.warp_bytes = cut.stage_bytes + static_cast<int>(sizeof(Known)) + MarchRing::kBarrierBytes +
                     MarchRing::kGroups * cut.group_bytes;
    return cut.warp_bytes <= budget;
  };
  // Planes whole if they are small enough.
  constexpr int kRows = 8, kTargetRows = 4;
  if (cut.spans > 1 || cut.target_width > 2 * kStrip || !fill(true, a.source.height, cut.target_height)) {
    int rows = std::min(kRows, a.source.height);
    while (!fill(false, rows, std::min(rows, kTargetRows)) && rows > 1) --rows;
  }
  d.shared_bytes = kMarchWarps * cut.warp_bytes + 2 * kRowMargin;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  int resident = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 32 * kMarchWarps, d.shared_bytes);
  const int64_t columns = ceil_div(cut.channels, cut.planes) * cut.spans * images, rows = columns * cut.target_height;
  const int64_t slots = int64_t{std::max(resident, 1)} * device.multiprocessors;  // for blocks
  const double turns = static_cast<double>(columns) / (slots * kMarchWarps);
  // A cut through a plane costs rows that both sides need.
  constexpr int kLeast = 8;
  const bool together = d.source.whole || std::ceil(turns) < 1.06 * turns;
  cut.unit_rows = together ? cut.target_height : 1;
  cut.units = static_cast<int>(rows / cut.unit_rows);
  d.blocks = static_cast<int>(std::min(ceil_div(together ? columns : ceil_div(rows, kLeast), kMarchWarps), slots));
  // Warps side by side take the spans of the same rows, if there are as many: memory likes to be read and written in
  // one place at a time.
  cut.workers = d.blocks * kMarchWarps;
  if (cut.workers >= cut.spans) {
    cut.by_worker_spans = cut.by_spans, cut.by_spans = Divider(1);
    cut.workers /= cut.spans, cut.units /= cut.spans;
  }
  cut.by_images = Divider(images);
  return d;
}

void launch(March a, int64_t images, int side, Kernel kernel, cudaStream_t stream) {
  const Device& device = current_device();
  static thread_local Decisions<8, Decision> decisions;
  const Decision& d = decisions(
      {device.id, side, images, a.cut.channels, a.source.height, a.source.width, a.target.height, a.target.width},
      [&] { return decide(a, images, side, kernel, device); });
  const bool bulk = a.cut.bulk;
  a.cut = d.cut, a.cut.bulk = bulk;
  a.source.arrange_as(d.source), a.target.arrange_as(d.target);
  launch_early(kernel, a, d.blocks, 32 * kMarchWarps, stream, {.shared_bytes = d.shared_bytes});
  check_launch("march_nchw");
}

}  // namespace

void launch_march_nchw(const Problem& p, bool bulk, cudaStream_t stream) {
  const Mapping map(p);
  March a{};
  a.source = plane_rows(map.source, map.targets, map.height, map.width);
  a.target = plane_rows(map.target, map.targets, map.out_height, map.out_width);
  a.weight = static_cast<const float*>(map.weight.data), a.weight_filter = map.weight.stride[0];
  a.weight_row = static_cast<int>(map.weight.stride[2]), a.weight_column = static_cast<int>(map.weight.stride[3]);
  const int64_t step = map.weight.stride[3];
  if ((step == 1 || step == -1) && map.weight.stride[2] == step * p.kernel_w && a.weight_filter == p.taps())
    a.dense = static_cast<int>(step);
  a.bias = static_cast<const float*>(map.bias), a.bias_stride = map.bias_stride;
  a.cut.bulk = bulk && current_device().capability >= 90;
  a.cut.channels = map.targets, a.cut.target_height = map.out_height, a.cut.target_width = map.out_width;
  a.cut.padding_h = map.padding_h, a.cut.padding_w = map.padding_w;
  static_assert(kMarchKernel == 7 && March9x9::kKernelH == 9);
  const int side = static_cast<int>(p.kernel_h);
  const bool wide = map.padding_w > side / 2;
  if (side == kMarchKernel)
    launch(a, p.batch, side, wide ? march_nchw<7, 6> : march_nchw<7, 3>, stream);
  else
    launch(a, p.batch, side, wide ? march_nchw<9, 8> : march_nchw<9, 4>, stream);
}

}  // namespace dwconv
