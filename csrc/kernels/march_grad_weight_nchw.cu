// grad_weight (and the bias gradient) of 7x7 and 9x9 in float32 on contiguous planes (march_nchw.cuh). A lane marches
// down a strip of 7 columns of the gradient: the last rows of it are in registers, and so are the sums of all taps.
// Each source row, read once, is multiplied with all of these. A gradient row stays in its registers until a new one
// takes its place; so the sums go round, from one row's registers to the next, which costs nothing as they are added to
// anyway.
//
// What is not part of a sum is multiplied by zero, which is exact unless the other factor is Inf or NaN. So sums that
// are finite are right, and the others are taken again, product by product.
#include <cmath>

#include "launch.h"
#include "march_nchw.cuh"
#include "overlap.cuh"
#include "partial_sums.h"
#include "small_kernels.h"

namespace dwconv {
namespace {

struct MarchGrad {
  MarchCut cut;
  PlaneRows source, grad;
  float* partial;  // [split][tap, or bias behind the last tap][filter]
  int kernel;      // its side
  int parts;       // that the rows of a group and a span are shared by: a split is a part of a span
  bool with_bias;
  int grad_at;  // in a group, behind the source
  Divider by_parts;
};

// Rows of source and gradient on their way to the ring. A step is a source row y, and the gradient row y + padding.
template <int kKernel>
class Feed {
 public:
  __device__ Feed(const CopyShare& share, int begin, int end) : share_(share), begin_(begin), end_(end) {}

  // Begins to load the next group, if there is one.
  __device__ void load(const MarchGrad& a, MarchRing& ring) {
    const MarchCut& cut = a.cut;
    if (y_ >= stop_ && begin_ < end_) {
      const MarchRun r = run_of(cut, a.source.height, a.source.width, begin_, end_, kKernel);
      begin_ += r.end - r.begin;
      y_ = r.begin - cut.padding_h, stop_ = r.last + 1, first_ = r.first, grad_end_ = r.end - cut.padding_h;
      planes_ = r.planes;
      source_bytes_ = (r.source_end - r.source_column) * 4, grad_bytes_ = (r.column_end - r.column) * 4;
      source_ = a.source.at(r.image, r.channel + share_.piece, r.first, r.source_column);
      grad_ = a.grad.at(r.image, r.channel + share_.piece, r.begin, r.column);
      source_image_ = a.source.at(r.image, 0, 0, 0), grad_image_ = a.grad.at(r.image, 0, 0, 0);
    }
    const int end = min(y_ + a.source.group_rows, stop_);
    ring.load(cut, a.source, share_, planes_, end - max(y_, first_), source_bytes_, source_, source_image_, 0);
    ring.load(cut, a.grad, share_, planes_, min(end, grad_end_) - y_, grad_bytes_, grad_, grad_image_, a.grad_at);
    y_ = end;
    ring.commit(cut);
  }

 private:
  const CopyShare share_;                            // of both
  int begin_, end_;                                  // rows of the gradient that were not yet begun
  int y_ = 0, stop_ = 0, first_ = 0, grad_end_ = 0;  // steps: the next one, their end, the first with a source row, the
                                                     // end of those with a gradient row
  int planes_ = 0, source_bytes_ = 0, grad_bytes_ = 0;
  const char *source_ = nullptr, *grad_ = nullptr, *source_image_ = nullptr, *grad_image_ = nullptr;
};

// The sum of one tap over rows [begin, end) in a span, by a warp, of products inside the image only.
template <int kKernel>
__device__ __noinline__ float sum_by_products(const MarchGrad& a, int begin, int end, int plane, int tap) {
  float sum = 0;
  for (int at = begin; at < end;) {
    const MarchRun r = run_of(a.cut, a.source.height, a.source.width, at, end, kKernel);
    at += r.end - r.begin;
    for (int row = r.begin; row < r.end; ++row) {
      const int y = row - a.cut.padding_h + tap / kKernel;
      if (y < 0 || y >= a.source.height) continue;
      const auto* x = reinterpret_cast<const float*>(a.source.at(r.image, r.channel + plane, y, 0));
      const auto* g = reinterpret_cast<const float*>(a.grad.at(r.image, r.channel + plane, row, 0));
      for (int v = r.own_column + static_cast<int>(threadIdx.x % 32); v < r.column_end; v += 32) {
        const int k = v - a.cut.padding_w + tap % kKernel;
        if (k >= 0 && k < a.source.width) sum = fmaf(x[k], g[v], sum);
      }
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

// Blocks on a multiprocessor, as registers allow.
constexpr int blocks_of(int kernel) {
  return kernel > kMarchKernel ? 2 : kMarchBlocks;
}

// kMargin: how many columns at most lie outside the image on either side of a strip.
template <int kKernel, int kMargin>
__global__ void __launch_bounds__(32 * kMarchWarps, blocks_of(kKernel))
    march_grad_weight_nchw(const __grid_constant__ MarchGrad a) {
  constexpr int kColumns = kStrip + kKernel - 1, kTaps = kKernel * kKernel;
  const MarchCut& cut = a.cut;
  const int lane = threadIdx.x % 32;
  let_next_kernel_start();
  wait_for_kernel_before();
  uint32_t split = blockIdx.x * kMarchWarps + threadIdx.x / 32;
  if (static_cast<int>(split) >= cut.workers) return;
  const int part = a.by_parts.split(split);  // `split` is now the group and the span
  const auto row_of = [&](int part) {        // where a part of the group and the span begins
    const int64_t unit = static_cast<int64_t>(cut.units) * part / a.parts;
    return (static_cast<int>(split) * cut.units + static_cast<int>(unit)) * cut.unit_rows;
  };
  const int begin = row_of(part), end = row_of(part + 1);
  uint32_t plane = lane;
  const int strip = cut.by_strips.split(plane);

  MarchRing ring(cut, kRowMargin + threadIdx.x / 32 * cut.warp_bytes);
  Feed<kKernel> feed(CopyShare(cut, a.source), begin, end);
  feed.load(a, ring);

  float sum[kKernel][kKernel] = {};  // of the tap rows that meet the gradient rows in the registers of the same number
  double bias = 0;
  int youngest = 0;  // where the next gradient row goes
  for (int at = begin; at < end;) {
    const MarchRun r = run_of(cut, a.source.height, a.source.width, at, end, kKernel);
    at += r.end - r.begin;
    // Sums of lanes to spare are left out.
    const int own = static_cast<int>(plane) < r.planes ? static_cast<int>(plane) : 0;
    const int column = min(r.column + strip * kStrip, cut.target_width - kStrip);
    const int x0 = column - cut.padding_w;
    const int overlap = max(r.own_column, r.column + strip * kStrip) - column;  // columns that others own
    ColumnMasks<kColumns, kMargin> masks;
    masks.set(x0, a.source.width);
    const int piece = r.channel + (a.source.whole ? 0 : own);
    const uint32_t source_low = a.source.phase(r.image, piece, 0, r.source_column);
    const uint32_t grad_low = a.grad.phase(r.image, piece, 0, r.column);
    const int source_lane = own * a.source.piece_pitch + (x0 - r.source_column) * 4;
    const int grad_lane = a.grad_at + own * a.grad.piece_pitch + (column - r.column) * 4;

    float g[kKernel][kStrip] = {};
    RowPlace source, grad;
    int fresh = 0;
    // Rows above the image meet no tap: the first gradient rows only take their places.
    const int start = r.begin - cut.padding_h;
    youngest -= r.first - start;
    if (youngest < 0) youngest += kKernel;
    for (int y = start; y <= r.last; ++y) {
      if (fresh == 0) {
        const uint32_t group = ring.next(cut);
        feed.load(a, ring);
        fresh = min(a.source.group_rows, r.last + 1 - y);
        source.begin(group + source_lane, source_low + max(y, r.first) * a.source.row_bytes);
        grad.begin(group + grad_lane, grad_low + (y + cut.padding_h) * a.grad.row_bytes);
      }
      --fresh;
      const bool inside = y + cut.padding_h < r.end;
      const uint32_t from = inside ? grad.next(a.grad) : 0;
      float part_of_bias = 0;
#pragma unroll
      for (int s = 0; s < kKernel; ++s)
        if (s == youngest) {
          if (inside)
#pragma unroll
            for (int v = 0; v < kStrip; ++v) g[s][v] = at_address<float>(from + 4 * v);
          else
#pragma unroll
            for (int v = 0; v < kStrip; ++v) g[s][v] = 0;
          if (overlap > 0)
#pragma unroll
            for (int v = 0; v < kStrip; ++v)
              if (v < overlap) g[s][v] = 0;
          if (a.with_bias)
#pragma unroll
            for (int v = 0; v < kStrip; ++v) part_of_bias += g[s][v];
        }
      if (a.with_bias) bias += part_of_bias;
      if (++youngest == kKernel) youngest = 0;
      if (y < r.first) continue;

      float x[kColumns], last[kKernel];
      masks.read(source.next(a.source), x);
#pragma unroll
      for (int j = 0; j < kKernel; ++j) last[j] = sum[kKernel - 1][j];
#pragma unroll
      for (int v = 0; v < kStrip; ++v)
#pragma unroll
        for (int s = kKernel - 1; s >= 0; --s)
#pragma unroll
          for (int j = 0; j < kKernel; ++j)
            sum[s][j] = fmaf(x[v + j], g[s][v], v > 0 ? sum[s][j] : s > 0 ? sum[s - 1][j] : last[j]);
    }
  }

  // The ring has served: its memory takes the sums of all lanes, tap by tap.
  __syncwarp();
  const int sums = ring.memory();
#pragma unroll
  for (int s = 0; s < kKernel; ++s) {
    const int i = (youngest + 2 * kKernel - 1 - s) % kKernel;  // the tap row that was with this gradient row last
#pragma unroll
    for (int j = 0; j < kKernel; ++j) shared<float>(sums + 4 * ((i * kKernel + j) * 32 + lane)) = sum[s][j];
  }
  shared<float>(sums + 4 * (kTaps * 32 + lane)) = static_cast<float>(bias);
  __syncwarp();
  const int slots = kTaps + a.with_bias;
  uint32_t group = split;
  const int span = cut.by_spans.split(group), channel = static_cast<int>(group) * cut.planes;
  const int planes = min(cut.planes, cut.channels - channel);
  float* partial = a.partial + static_cast<int64_t>(span * a.parts + part) * slots * cut.channels + channel;
  bool again = false;
  for (int i = lane; i < slots * planes; i += 32) {
    const int tap = i / planes, filter = i - tap * planes;
    float total = 0;
    for (int k = 0; k < cut.strips; ++k) total += shared<float>(sums + 4 * (tap * 32 + filter * cut.strips + k));
    partial[static_cast<int64_t>(tap) * cut.channels + filter] = total;
    shared<float>(sums + 4 * (tap * 32 + filter * cut.strips)) = total;  // read by this lane alone
    again |= tap < kTaps && !is_finite(total);
  }
  if (!__any_sync(~0u, again)) return;
  __syncwarp();
  for (int i = 0; i < kTaps * planes; ++i) {
    const int tap = i / planes, filter = i - tap * planes;
    if (is_finite(shared<float>(sums + 4 * (tap * 32 + filter * cut.strips)))) continue;  // the same for all lanes
    const float exact = sum_by_products<kKernel>(a, begin, end, filter, tap);
    if (lane == 0) partial[static_cast<int64_t>(tap) * cut.channels + filter] = exact;
  }
}

using Kernel = void (*)(MarchGrad);

// How a problem is cut.
struct Decision {
  MarchCut cut;
  PlaneRows source, grad;
  int parts, grad_at, shared_bytes;
};

Decision decide(const MarchGrad& a, int64_t images, Kernel kernel, const Device& device) {
  Decision d{a.cut, a.source, a.grad, 1, 0, 0};
  MarchCut& cut = d.cut;
  choose_lanes(cut);
  const int budget = march_budget(device, blocks_of(a.kernel));
  const auto fill = [&](int rows) {
    arrange(d.source, cut, cut.columns + a.kernel - 1, rows, false);
    arrange(d.grad, cut, cut.columns, rows, false);
    d.grad_at = d.source.group_bytes, cut.group_bytes = d.source.group_bytes + d.grad.group_bytes;
    cut.warp_bytes =
        MarchRing::kBarrierBytes + std::max(MarchRing::kGroups * cut.group_bytes, (a.kernel * a.kernel + 1) * 32 * 4);
    return cut.warp_bytes <= budget;
  };
  int rows_of_group = 8;
  while (!fill(rows_of_group) && rows_of_group > 1) --rows_of_group;
  d.shared_bytes = kMarchWarps * cut.warp_bytes + 2 * kRowMargin;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  int resident = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 32 * kMarchWarps, d.shared_bytes);
  const int64_t rows = images * cut.target_height, columns = ceil_div(cut.channels, cut.planes) * cut.spans;
  const int64_t slots = int64_t{std::max(resident, 1)} * device.multiprocessors * kMarchWarps;
  // Parts that fill the GPU; a cut through a plane costs rows that both sides need.
  constexpr int64_t kLeast = 8;
  double least = 0;
  const int64_t most = std::min(ceil_div(rows, kLeast), ceil_div(4 * slots, columns));
  for (int64_t parts = 1; parts <= most; ++parts) {
    const bool together = images % parts == 0;
    const double each = together ? static_cast<double>(ceil_div(images, parts)) * cut.target_height
                                 : static_cast<double>(rows) / parts + a.kernel - 1;
    const double cost = std::ceil(static_cast<double>(columns * parts) / slots) * each;
    if (parts > 1 && cost > least * .99) continue;
    least = cost, d.parts = static_cast<int>(parts), cut.unit_rows = together ? cut.target_height : 1;
  }
  cut.units = static_cast<int>(rows / cut.unit_rows), cut.workers = static_cast<int>(columns * d.parts);
  cut.by_images = Divider(images);
  return d;
}

void launch(const Problem& p, MarchGrad a, Kernel kernel, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  static thread_local Decisions<8, Decision> decisions;
  const Decision& d =
      decisions({device.id, a.kernel, p.batch, p.channels, p.height, p.width, p.out_height, p.out_width},
                [&] { return decide(a, p.batch, kernel, device); });
  const bool bulk = a.cut.bulk;
  a.cut = d.cut, a.cut.bulk = bulk, a.parts = d.parts, a.grad_at = d.grad_at, a.by_parts = Divider(d.parts);
  a.source.arrange_as(d.source), a.grad.arrange_as(d.grad);
  const int64_t splits = int64_t{a.cut.spans} * a.parts, sums = (p.taps() + a.with_bias) * p.filters();
  a.partial = static_cast<float*>(allocate(splits * sums * static_cast<int64_t>(sizeof(float))));
  launch_early(kernel, a, ceil_div(a.cut.workers, kMarchWarps), 32 * kMarchWarps, stream,
               {.shared_bytes = d.shared_bytes});
  check_launch("march_grad_weight_nchw");
  launch_add_partial_sums(p, a.partial, splits, stream);
}

}  // namespace

void launch_march_grad_weight_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  MarchGrad a{};
  a.source = plane_rows(p.input, static_cast<int>(p.height), static_cast<int>(p.width));
  a.grad = plane_rows(p.output, static_cast<int>(p.out_height), static_cast<int>(p.out_width));
  a.cut.bulk = bulk && current_device().capability >= 90;
  a.with_bias = p.bias != nullptr, a.kernel = static_cast<int>(p.kernel_h);
  a.cut.channels = static_cast<int>(p.channels);
  a.cut.target_height = static_cast<int>(p.out_height), a.cut.target_width = static_cast<int>(p.out_width);
  a.cut.padding_h = static_cast<int>(p.padding_h), a.cut.padding_w = static_cast<int>(p.padding_w);
  static_assert(kMarchKernel == 7 && March9x9::kKernelH == 9);
  const bool wide = p.padding_w > a.kernel / 2;
  if (a.kernel == kMarchKernel)
    launch(p, a, wide ? march_grad_weight_nchw<7, 6> : march_grad_weight_nchw<7, 3>, allocate, stream);
  else
    launch(p, a, wide ? march_grad_weight_nchw<9, 8> : march_grad_weight_nchw<9, 4>, allocate, stream);
}

}  // namespace dwconv
