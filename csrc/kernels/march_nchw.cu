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

// A warp's source rows on their way to its ring, through all of its runs.
template <int kKernel>
class Feed {
 public:
  __device__ Feed(const CopyShare& share, int begin, int end) : share_(share), begin_(begin), end_(end) {}

  // Begins to load the next group, if there is one.
  __device__ void load(const MarchCut& a, const PlaneRows& rows, MarchRing& ring) {
    if (left_ == 0 && begin_ < end_) {
      const MarchRun r = run_of(a, rows.height, rows.width, begin_, end_, kKernel);
      begin_ += r.end - r.begin;
      left_ = r.last - r.first + 1, planes_ = r.planes;
      bytes_ = (r.source_end - r.source_column) * 4;
      from_ = rows.at(r.image, r.channel + share_.piece, r.first, r.source_column);
      image_ = rows.at(r.image, 0, 0, 0);
    }
    const int count = min(left_, rows.group_rows);
    ring.load(a, rows, share_, planes_, count, bytes_, from_, image_, 0);
    left_ -= count;
    ring.commit(a);
  }

 private:
  const CopyShare share_;
  int begin_, end_;  // rows of the target whose source was not yet loaded
  int left_ = 0, planes_ = 0, bytes_ = 0;
  const char *from_ = nullptr, *image_ = nullptr;
};

// Blocks on a multiprocessor, as registers allow.
constexpr int blocks_of(int kernel) {
  return kernel > kMarchKernel ? 2 : kMarchBlocks;
}

// kMargin: how many columns at most lie outside the image on either side of a strip.
template <int kKernel, int kMargin>
__global__ void __launch_bounds__(32 * kMarchWarps, blocks_of(kKernel)) march_nchw(const __grid_constant__ March a) {
  constexpr int kColumns = kStrip + kKernel - 1, kTaps = kKernel * kKernel;
  const MarchCut& cut = a.cut;
  const int lane = threadIdx.x % 32, worker = blockIdx.x * kMarchWarps + threadIdx.x / 32;
  const int stage = kRowMargin + threadIdx.x / 32 * cut.warp_bytes;
  const int begin = static_cast<int>(static_cast<int64_t>(cut.units) * worker / cut.workers) * cut.unit_rows;
  const int end = static_cast<int>(static_cast<int64_t>(cut.units) * (worker + 1) / cut.workers) * cut.unit_rows;
  uint32_t plane = lane;
  const int strip = cut.by_strips.split(plane);

  MarchRing ring(cut, stage + cut.stage_bytes);
  Feed<kKernel> feed(CopyShare(cut, a.source), begin, end);
  const CopyShare share(cut, a.target);
  let_next_kernel_start();
  wait_for_kernel_before();
  feed.load(cut, a.source, ring);

  const uint32_t weights = shared_address(stage);
  float weight[kKernel][kKernel], bias = 0;
  bool finite = true;  // then a product with a zero is a zero
  int channel = -1;
  for (int at = begin; at < end;) {
    const MarchRun r = run_of(cut, a.source.height, a.source.width, at, end, kKernel);
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
    const int piece = r.channel + (a.target.whole ? 0 : own);
    const uint32_t source_low = a.source.phase(r.image, r.channel + (a.source.whole ? 0 : own), 0, r.source_column);
    const uint32_t target_low = a.target.phase(r.image, piece, 0, r.column);
    const int source_lane = own * a.source.piece_pitch + (x0 - r.source_column) * 4;
    const uint32_t target_lane = shared_address(stage) + own * a.target.piece_pitch + (column - r.column) * 4;
    char* to = a.target.at(r.image, piece, r.begin, r.column);

    RowPlace source, target;
    target.begin(target_lane, target_low + r.begin * a.target.row_bytes);
    int fresh = 0, staged = 0;
    float sum[kKernel][kStrip];  // the oldest output row first; those that lie above the run are never stored
#pragma unroll
    for (int o = 0; o < kKernel; ++o)
#pragma unroll
      for (int v = 0; v < kStrip; ++v) sum[o][v] = bias;

    const int stop = r.end - cut.padding_h + kKernel - 1;  // rows below the image are zeros
    for (int y = r.first; y < stop; ++y) {
      if (y <= r.last) {
        if (fresh == 0) {
          const uint32_t group = ring.next(cut);
          feed.load(cut, a.source, ring);
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
      } else {
#pragma unroll
        for (int o = 0; o + 1 < kKernel; ++o)
#pragma unroll
          for (int v = 0; v < kStrip; ++v) sum[o][v] = sum[o + 1][v];
      }

      const int row = y + cut.padding_h - (kKernel - 1);
      if (row < r.begin) continue;
      const uint32_t here = target.next(a.target);
      if (live)
#pragma unroll
        for (int v = 0; v < kStrip; ++v) at_address<float>(here + 4 * v) = sum[0][v];
      if (++staged < a.target.group_rows && row + 1 < r.end) continue;
      __syncwarp();
      if (share.piece < r.planes) {
        uint32_t from = shared_address(stage) + share.piece * a.target.piece_pitch;
        const int bytes = a.target.whole      ? static_cast<int>(a.target.plane_bytes) * r.planes
                          : a.target.together ? staged * a.target.row_bytes
                                              : (r.column_end - r.column) * 4;
        const int count = a.target.together ? 1 : staged;
#pragma unroll 1
        for (int i = 0; i < count; ++i, from += a.target.row_pitch) {
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
          to += a.target.together ? bytes : a.target.row_bytes;
        }
      }
      __syncwarp();
      staged = 0;
      target.begin(target_lane, target_low + (row + 1) * a.target.row_bytes);
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
    cut.warp_bytes = cut.stage_bytes + MarchRing::kBarrierBytes + MarchRing::kGroups * cut.group_bytes;
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
  cut.workers = d.blocks * kMarchWarps;
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
  a.source = plane_rows(map.source, map.height, map.width);
  a.target = plane_rows(map.target, map.out_height, map.out_width);
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
