// grad_weight (and the bias gradient) of 7x7 and 9x9 in float32 on contiguous planes (march_nchw.cuh). A lane marches
// down a strip of 7 columns of the gradient: the last rows of it are in registers, and so are the sums of all taps.
// Each source row, read once, is multiplied with all of these. A gradient row stays in its registers until a new one
// takes its place; so the sums go round, from one row's registers to the next, which costs nothing as they are added to
// anyway. At stride 2 every other source row meets one gradient row less: there it has a row of taps that is not used.
//
// What is not part of a sum is multiplied by zero, which is exact unless the other factor is Inf or NaN. So sums that
// are finite are right, and the others are taken again, product by product.
#include <cmath>
#include <cstddef>
#include <numeric>

#include "boxes.cuh"
#include "launch.h"
#include "march_nchw.cuh"
#include "overlap.cuh"
#include "partial_sums.h"
#include "small_kernels.h"

namespace dwconv {
namespace {

struct MarchGrad {
  CUtensorMap source_map, grad_map;  // if rows are boxes
  MarchCut cut;
  PlaneRows source, grad;
  float* partial;  // [split][tap, or bias behind the last tap][filter]
  int kernel;      // its side
  int stride;
  int parts;  // that the rows of a group and a span are shared by
  int team;   // so many of them, a block's warps side by side, are added up together: a split of a span
  bool with_bias;
  bool boxes;     // whether the rows of a group are a box of each array
  int box_bytes;  // of both
  // Boxes begin with 16 bytes. Where an array does not, rows of a box begin as many bytes before those of the array,
  // and there is one more, with the end of the last one.
  int source_more, grad_more;
  int grad_at;  // in a group, behind the source
  Divider by_parts, by_planes, by_multiplier;
};

// The gradient rows that a source row may meet.
constexpr int held_rows(int kernel, int stride) {
  return (kernel + stride - 1) / stride;
}

// Here a step is a gradient row, and the `stride` source rows that begin with row * stride - padding: `first` and
// `last` are the first step with a source row and the last one.
template <int kKernel, int kStride>
__device__ inline MarchRun steps_of(const MarchGrad& a, int begin, int end) {
  const MarchCut& cut = a.cut;
  MarchRun r = run_of(cut, a.source.height, a.source.width, begin, end, kKernel);
  r.first = max(r.begin, cut.padding_h / kStride);
  r.last = min(r.end + held_rows(kKernel, kStride) - 2, (a.source.height - 1 + cut.padding_h) / kStride);
  if (kStride > 1 && cut.spans > 1) {
    r.source_column = max(r.column * kStride - cut.padding_w, 0);
    r.source_end = min((r.column_end - 1) * kStride + kKernel - cut.padding_w, a.source.width);
  }
  return r;
}

// The plane of the source that a plane of the gradient is of.
__device__ inline int source_plane(const MarchGrad& a, int plane) {
  uint32_t source = plane;
  a.by_multiplier.split(source);
  return source;
}

// What a warp has to know now and then, in its shared memory: registers are short, and only if there are some to spare
// do sums and pixels lie in different banks of them.
struct __align__(16) Known {
  static constexpr int kMostColumns = 20;  // of a lane

  double bias[32];            // of each lane
  float zeros[kMostColumns];  // a row that adds nothing
  int begin;                  // the first gradient row of the run that was not yet loaded whole,
  int done;                   // and how many of its steps were
};
constexpr int kBeforeRows = kRowMargin + MarchRing::kBarrierBytes;
constexpr int kKnownBytes = (kBeforeRows + sizeof(Known) + kBoxUnit - 1) / kBoxUnit * kBoxUnit - kBeforeRows;

// Begins to load the rows of the next group of steps, if there is one.
template <int kKernel, int kStride>
__device__ inline void load_next(const MarchGrad& a, int end, Known& known, MarchRing& ring) {
  const MarchCut& cut = a.cut;
  const int begin = known.begin, done = known.done;
  __syncwarp();
  if (begin < end) {
    const MarchRun r = steps_of<kKernel, kStride>(a, begin, end);
    const CopyShare share(cut, a.source);  // of both
    const int step = r.begin + done, stop = min(step + a.grad.group_rows, r.last + 1);
    const auto load = [&](const PlaneRows& rows, int plane, int planes, int row, int row_end, int column,
                          int column_end, int at) {
      const char* from = rows.at(r.image, plane + share.piece, row, column);
      ring.load(cut, rows, share, planes, row_end - row, (column_end - column) * 4, from, rows.at(r.image, 0, 0, 0),
                at);
    };
    const int row = max(step * kStride - cut.padding_h, 0), source_channel = source_plane(a, r.channel);
    // Nothing outside an array is touched.
    const auto stays_inside = [](const PlaneRows& rows, int more, int plane, int planes, int row) {
      return more == 0 ||
             ((plane > 0 || row > 0) && (plane + planes < rows.planes || row + rows.group_rows < rows.height));
    };
    if (a.boxes && stays_inside(a.grad, a.grad_more, r.channel, cut.planes, step) &&
        stays_inside(a.source, a.source_more, source_channel, source_plane(a, cut.planes), row)) {
      ring.load_boxes(cut, a.box_bytes, [&](int to, int barrier) {
        copy_box(to, a.source_map, r.source_column, row, source_channel, r.image, barrier);
        copy_box(to + a.grad_at, a.grad_map, r.column, step, r.channel, r.image, barrier);
      });
    } else {
      load(a.source, source_channel, source_plane(a, r.planes), row,
           min(stop * kStride - cut.padding_h, a.source.height), r.source_column, r.source_end, 0);
      load(a.grad, r.channel, r.planes, step, min(stop, r.end), r.column, r.column_end, a.grad_at);
    }
    if (threadIdx.x % 32 == 0) {
      known.begin = stop <= r.last ? begin : begin + (r.end - r.begin);
      known.done = stop <= r.last ? done + (stop - step) : 0;
    }
  }
  ring.commit(cut);
}

// The sum of one tap over rows [begin, end) in a span, by a warp, of products inside the image only.
template <int kKernel, int kStride>
__device__ __noinline__ float sum_by_products(const MarchGrad& a, int begin, int end, int plane, int tap) {
  float sum = 0;
  for (int at = begin; at < end;) {
    const MarchRun r = steps_of<kKernel, kStride>(a, at, end);
    at += r.end - r.begin;
    for (int row = r.begin; row < r.end; ++row) {
      const int y = row * kStride - a.cut.padding_h + tap / kKernel;
      if (y < 0 || y >= a.source.height) continue;
      const auto* x = reinterpret_cast<const float*>(a.source.at(r.image, source_plane(a, r.channel + plane), y, 0));
      const auto* g = reinterpret_cast<const float*>(a.grad.at(r.image, r.channel + plane, row, 0));
      for (int v = r.own_column + static_cast<int>(threadIdx.x % 32); v < r.column_end; v += 32) {
        const int k = v * kStride - a.cut.padding_w + tap % kKernel;
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
template <int kKernel, int kMargin, int kStride = 1>
__global__ void __launch_bounds__(32 * kMarchWarps, blocks_of(kKernel))
    march_grad_weight_nchw(const __grid_constant__ MarchGrad a) {
  constexpr int kColumns = (kStrip - 1) * kStride + kKernel, kTaps = kKernel * kKernel;
  constexpr int kHeld = held_rows(kKernel, kStride);
  static_assert(kColumns <= Known::kMostColumns);
  const MarchCut& cut = a.cut;
  const int lane = threadIdx.x % 32;
  let_next_kernel_start();
  const int warp = threadIdx.x / 32, worker = blockIdx.x * kMarchWarps + warp;
  uint32_t column_of_parts = worker;  // the group and the span
  const int part = a.by_parts.split(column_of_parts);
  const auto row_of = [&](int part) {  // where a part of the group and the span begins
    const int64_t unit = static_cast<int64_t>(cut.units) * part / a.parts;
    return (static_cast<int>(column_of_parts) * cut.units + static_cast<int>(unit)) * cut.unit_rows;
  };
  const int begin = row_of(part), end = worker < cut.workers ? row_of(part + 1) : begin;
  uint32_t plane = lane;
  const int strip = cut.by_strips.split(plane);

  const int memory = kRowMargin + warp * cut.warp_bytes;
  Known& known = shared<Known>(memory);
  known.bias[lane] = 0;
  if (lane < Known::kMostColumns) known.zeros[lane] = 0;
  if (lane == 0) known.begin = begin, known.done = 0;
  MarchRing ring(cut, memory + kKnownBytes);
  if (a.boxes && lane == 0) prefetch(a.source_map), prefetch(a.grad_map);
  __syncwarp();
  settle_and_wait_for_kernel_before(cut.workers);
  load_next<kKernel, kStride>(a, end, known, ring);

  // For each of a step's source rows of the tap rows that meet the gradient rows of the same number.
  float sum[kStride][kHeld][kKernel] = {};
  int youngest = 0;  // where the next gradient row goes
  const uint32_t zeros = shared_address(memory + static_cast<int>(offsetof(Known, zeros)));
  for (int at = begin; at < end;) {
    const MarchRun r = steps_of<kKernel, kStride>(a, at, end);
    at += r.end - r.begin;
    // Sums of lanes to spare are left out.
    const int own = static_cast<int>(plane) < r.planes ? static_cast<int>(plane) : 0;
    const int column = min(r.column + strip * kStrip, cut.target_width - kStrip);
    const int x0 = column * kStride - cut.padding_w;
    const int overlap = max(r.own_column, r.column + strip * kStrip) - column;  // columns that others own
    ColumnMasks<kColumns, kMargin> masks;
    masks.set(x0, a.source.width);
    const uint32_t source_low = a.source.phase(r.image, source_plane(a, r.channel + own), 0, r.source_column);
    const uint32_t grad_low = a.grad.phase(r.image, r.channel + own, 0, r.column);
    const int source_lane = source_plane(a, own) * a.source.piece_pitch + (x0 - r.source_column) * 4;
    const int grad_lane = a.grad_at + own * a.grad.piece_pitch + (column - r.column) * 4;

    float g[kHeld][kStrip] = {};
    RowPlace source, grad;
    int fresh = 0;
    // Rows above the image meet no tap: the first gradient rows only take their places.
    youngest -= r.first - r.begin;
    if (youngest < 0) youngest += kHeld;
    for (int step = r.begin; step <= r.last; ++step) {
      if (fresh == 0) {
        const uint32_t group = ring.next(cut);
        load_next<kKernel, kStride>(a, end, known, ring);
        fresh = min(a.grad.group_rows, r.last + 1 - step);
        source.begin(group + source_lane, source_low + max(step * kStride - cut.padding_h, 0) * a.source.row_bytes);
        grad.begin(group + grad_lane, grad_low + step * a.grad.row_bytes);
        if (a.with_bias) {
          RowPlace row = grad;
          float part = 0;
#pragma unroll 1
          for (int i = min(fresh, r.end - step); i > 0; --i) {
            const uint32_t from = row.next(a.grad);
#pragma unroll 1
            for (int v = overlap; v < kStrip; ++v) part += at_address<float>(from + 4 * v);
          }
          known.bias[lane] += part;
        }
      }
      --fresh;
      const uint32_t from = step < r.end ? grad.next(a.grad) : zeros;
      const auto take = [&](float (&row)[kStrip]) {
#pragma unroll
        for (int v = 0; v < kStrip; ++v) row[v] = at_address<float>(from + 4 * v);
        if (overlap > 0)
#pragma unroll
          for (int v = 0; v < kStrip; ++v)
            if (v < overlap) row[v] = 0;
      };
      switch (youngest) {  // the row goes where the oldest one was, by one jump
        case 0: take(g[0]); break;
        case 1: take(g[1]); break;
        case 2: take(g[2]); break;
        case 3: take(g[3]); break;
        case 4:
          if constexpr (kHeld > 4) take(g[4]);
          break;
        case 5:
          if constexpr (kHeld > 4) take(g[5]);
          break;
        case 6:
          if constexpr (kHeld > 4) take(g[6]);
          break;
        case 7:
          if constexpr (kHeld > 7) take(g[7]);
          break;
        case 8:
          if constexpr (kHeld > 7) take(g[8]);
          break;
      }
      if (++youngest == kHeld) youngest = 0;
      if (step < r.first) continue;

#pragma unroll
      for (int e = 0; e < kStride; ++e) {
        float x[kColumns], last[kKernel];
        const int y = step * kStride - cut.padding_h + e;
        masks.read(kStride == 1 || (y >= 0 && y < a.source.height) ? source.next(a.source) : zeros, x);
#pragma unroll
        for (int j = 0; j < kKernel; ++j) last[j] = sum[e][kHeld - 1][j];
#pragma unroll
        for (int v = 0; v < kStrip; ++v)
#pragma unroll
          for (int s = kHeld - 1; s >= 0; --s)
#pragma unroll
            for (int j = 0; j < kKernel; ++j)
              sum[e][s][j] = fmaf(x[v * kStride + j], g[s][v],
                                  v > 0   ? sum[e][s][j]
                                  : s > 0 ? sum[e][s - 1][j]
                                          : last[j]);
      }
    }
  }

  // The rings have served: their memory takes the sums of all lanes, tap by tap.
  __syncwarp();
  int sums = ring.memory();
#pragma unroll
  for (int e = 0; e < kStride; ++e)
#pragma unroll
    for (int s = 0; s < kHeld; ++s) {
      const int i = (youngest + 2 * kHeld - 1 - s) % kHeld * kStride + e;  // whose tap row that is now
      if (i >= kKernel) continue;
#pragma unroll
      for (int j = 0; j < kKernel; ++j) shared<float>(sums + 4 * ((i * kKernel + j) * 32 + lane)) = sum[e][s][j];
    }
  shared<float>(sums + 4 * (kTaps * 32 + lane)) = static_cast<float>(known.bias[lane]);
  __syncthreads();
  uint32_t group = column_of_parts;
  const int span = cut.by_spans.split(group), channel = static_cast<int>(group) * cut.planes;
  const int planes = worker < cut.workers ? min(cut.planes, cut.channels - channel) : 0;
  // Each warp of a team adds up some taps: first the team's sums, then a filter's.
  const int member = part % a.team, slots = kTaps + a.with_bias;
  sums -= member * cut.warp_bytes;
  for (int tap = member; tap < slots; tap += a.team) {
    const int at = sums + 4 * (tap * 32 + lane);
    float total = shared<float>(at);
    for (int k = 1; k < a.team; ++k) total += shared<float>(at + k * cut.warp_bytes);
    shared<float>(at) = total;
  }
  __syncwarp();
  float* partial = a.partial + static_cast<int64_t>((span * a.parts + part) / a.team) * slots * cut.channels + channel;
  const int taps = (slots - member + a.team - 1) / a.team;
  bool again = false;
  for (int i = lane; i < taps * cut.planes; i += 32) {
    uint32_t number = i;
    const int filter = a.by_planes.split(number), tap = member + static_cast<int>(number) * a.team;
    if (filter >= planes) continue;
    const int at = sums + 4 * (tap * 32 + filter * cut.strips);
    float total = shared<float>(at);
    for (int k = 1; k < cut.strips; ++k) total += shared<float>(at + 4 * k);
    partial[static_cast<int64_t>(tap) * cut.channels + filter] = total;
    shared<float>(at) = total;  // read by this lane alone
    again |= tap < kTaps && !is_finite(total);
  }
  if (!__any_sync(~0u, again)) return;
  __syncwarp();
  const int team_begin = row_of(part - member), team_end = row_of(part - member + a.team);
  for (int tap = member; tap < kTaps; tap += a.team)
    for (int filter = 0; filter < planes; ++filter) {
      if (is_finite(shared<float>(sums + 4 * (tap * 32 + filter * cut.strips)))) continue;  // the same for all lanes
      const float exact = sum_by_products<kKernel, kStride>(a, team_begin, team_end, filter, tap);
      if (lane == 0) partial[static_cast<int64_t>(tap) * cut.channels + filter] = exact;
    }
}

using Kernel = void (*)(MarchGrad);

// How a problem is cut.
struct Decision {
  MarchCut cut;
  PlaneRows source, grad;
  bool boxes;
  int parts, grad_at, shared_bytes;
};

Decision decide(const MarchGrad& a, int64_t images, int multiplier, Kernel kernel, const Device& device) {
  Decision d{a.cut, a.source, a.grad, a.boxes, 1, 0, 0};
  MarchCut& cut = d.cut;
  choose_lanes(cut);
  const int budget = march_budget(device, blocks_of(a.kernel));
  // A box begins with 16 bytes, as a span may not.
  d.boxes = d.boxes && cut.spans == 1 && std::max(a.source.width, a.grad.width) <= kMostBoxSide;
  const auto fill = [&](int rows) {
    if (d.boxes) {
      arrange_box(d.source, cut.planes / multiplier, a.source.width, rows * a.stride + a.source_more);
      arrange_box(d.grad, cut.planes, a.grad.width, rows + a.grad_more);
      d.source.group_rows -= a.source_more, d.grad.group_rows -= a.grad_more;
    } else {
      arrange(d.source, cut, (cut.columns - 1) * a.stride + a.kernel, rows * a.stride, false, a.stride, multiplier);
      arrange(d.grad, cut, cut.columns, rows, false);
    }
    d.grad_at = d.source.group_bytes, cut.group_bytes = d.source.group_bytes + d.grad.group_bytes;
    cut.warp_bytes = static_cast<int>(
        round_up(kKnownBytes + MarchRing::kBarrierBytes +
                     std::max(MarchRing::kGroups * cut.group_bytes, (a.kernel * a.kernel + 1) * 32 * 4),
                 kBoxUnit));
    return cut.warp_bytes <= budget;
  };
  int rows_of_group = 8;
  while (!fill(rows_of_group) && rows_of_group > 1) --rows_of_group;
  // Boxes lie as they are: with a row less lanes may meet in fewer banks.
  const auto meet = [&] {
    return conflicts(cut, d.source.piece_pitch, a.stride, multiplier) + conflicts(cut, d.grad.piece_pitch);
  };
  if (d.boxes && rows_of_group > 2) {
    const int most = meet();
    fill(rows_of_group - 1);
    if (meet() >= most) fill(rows_of_group);
  }
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
                                 : static_cast<double>(rows) / parts + held_rows(a.kernel, a.stride) - 1;
    const double cost = std::ceil(static_cast<double>(columns * parts) / slots) * each;
    if (parts > 1 && (cost > least * .99 || (parts > kMarchWarps && parts % kMarchWarps > 0))) continue;
    least = cost, d.parts = static_cast<int>(parts), cut.unit_rows = together ? cut.target_height : 1;
  }
  cut.units = static_cast<int>(rows / cut.unit_rows), cut.workers = static_cast<int>(columns * d.parts);
  cut.by_images = Divider(images);
  return d;
}

void launch(const Problem& p, MarchGrad a, Kernel kernel, const Allocate& allocate, cudaStream_t stream) {
  const Device& device = current_device();
  // Whether all rows begin at the same place within 16 bytes.
  constexpr int64_t kFar = int64_t{1} << 37;  // elements
  const auto alike = [&](const View& view, int64_t width) {
    return width * 4 % kUnit == 0 &&
           (p.batch == 1 || (view.stride[0] > 0 && view.stride[0] * 4 % kUnit == 0 && view.stride[0] < kFar));
  };
  const auto misfit = [](const View& view) { return static_cast<int>(reinterpret_cast<uintptr_t>(view.data) % kUnit); };
  a.boxes = a.cut.bulk && alike(p.input, p.width) && alike(p.output, p.out_width);
  a.source_more = a.boxes && misfit(p.input) > 0 ? 1 : 0, a.grad_more = a.boxes && misfit(p.output) > 0 ? 1 : 0;
  static thread_local Decisions<11, Decision> decisions;
  const int boxes = a.boxes ? 1 + a.source_more + 2 * a.grad_more : 0;
  const Decision& d = decisions({device.id, boxes, a.kernel, a.stride, p.batch, p.channels, p.multiplier, p.height,
                                 p.width, p.out_height, p.out_width},
                                [&] { return decide(a, p.batch, static_cast<int>(p.multiplier), kernel, device); });
  // Lanes copy a span's rows of whole units sooner than bulk copies of them are begun one by one.
  const bool by_lanes = d.cut.spans > 1 && boxes == 1;
  const bool bulk = a.cut.bulk && !by_lanes;
  a.cut = d.cut, a.cut.bulk = bulk, a.parts = d.parts, a.grad_at = d.grad_at;
  a.by_parts = Divider(d.parts), a.by_planes = Divider(a.cut.planes), a.team = std::gcd(d.parts, kMarchWarps);
  a.source.arrange_as(d.source), a.grad.arrange_as(d.grad);
  a.boxes = d.boxes;
  if (a.boxes) {
    a.box_bytes = 0;
    const auto describe = [&](CUtensorMap& map, const View& view, const PlaneRows& rows, int more, int planes) {
      const int64_t plane_bytes = rows.plane_bytes,
                    image_bytes = p.batch == 1 ? rows.planes * plane_bytes : rows.image_bytes;
      a.box_bytes += planes * rows.piece_pitch;
      if (!describe_boxes(map, static_cast<char*>(view.data) - misfit(view), sizeof(float),
                          {rows.width, rows.height + more, rows.planes, p.batch},
                          {rows.row_bytes, plane_bytes, image_bytes}, {rows.width, rows.group_rows + more, planes, 1}))
        throw std::runtime_error("dwconv: CUDA cannot describe boxes of planes");
    };
    describe(a.source_map, p.input, a.source, a.source_more, a.cut.planes / static_cast<int>(p.multiplier));
    describe(a.grad_map, p.output, a.grad, a.grad_more, a.cut.planes);
  }
  const int64_t splits = int64_t{a.cut.spans} * a.parts / a.team, sums = (p.taps() + a.with_bias) * p.filters();
  a.partial = static_cast<float*>(allocate(splits * sums * static_cast<int64_t>(sizeof(float))));
  launch_early(kernel, a, ceil_div(a.cut.workers, kMarchWarps), 32 * kMarchWarps, stream,
               {.shared_bytes = d.shared_bytes});
  check_launch("march_grad_weight_nchw");
  launch_add_partial_sums(p, a.partial, splits, stream);
}

}  // namespace

void launch_march_grad_weight_nchw(const Problem& p, bool bulk, const Allocate& allocate, cudaStream_t stream) {
  MarchGrad a{};
  a.source = plane_rows(p.input, static_cast<int>(p.channels), static_cast<int>(p.height), static_cast<int>(p.width));
  a.grad = plane_rows(p.output, static_cast<int>(p.filters()), static_cast<int>(p.out_height),
                      static_cast<int>(p.out_width));
  a.cut.bulk = bulk && current_device().capability >= 90;
  a.with_bias = p.bias != nullptr, a.kernel = static_cast<int>(p.kernel_h), a.stride = static_cast<int>(p.stride_h);
  a.by_multiplier = Divider(p.multiplier);
  a.cut.channels = static_cast<int>(p.filters());
  a.cut.target_height = static_cast<int>(p.out_height), a.cut.target_width = static_cast<int>(p.out_width);
  a.cut.padding_h = static_cast<int>(p.padding_h), a.cut.padding_w = static_cast<int>(p.padding_w);
  static_assert(kMarchKernel == 7 && March9x9::kKernelH == 9);
  const bool wide = p.padding_w > a.kernel / 2;
  if (a.stride == 2)
    launch(p, a, wide ? march_grad_weight_nchw<7, 6, 2> : march_grad_weight_nchw<7, 3, 2>, allocate, stream);
  else if (a.kernel == kMarchKernel)
    launch(p, a, wide ? march_grad_weight_nchw<7, 6> : march_grad_weight_nchw<7, 3>, allocate, stream);
  else
    launch(p, a, wide ? march_grad_weight_nchw<9, 8> : march_grad_weight_nchw<9, 4>, allocate, stream);
}

}  // namespace dwconv
