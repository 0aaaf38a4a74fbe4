// Forward and grad_input of 7x7, 9x9 and dilated 3x3 in float32 on contiguous planes (march_nchw.cuh), and forward of
// 7x7 at stride 2. A lane marches down a strip of 7 columns: each source row, read once, is added to all the output
// rows that it reaches, whose sums are in registers; the oldest of them is then complete. The loop is one output row,
// so that it stays in the instruction cache. Where planes begin with 16 bytes, rows of all planes of a warp come and go
// as one box; where rows do that are cut into spans, those of a span.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numeric>
#include <stdexcept>
#include <type_traits>

#include "boxes.cuh"
#include "launch.h"
#include "mapping.h"
#include "march_nchw.cuh"
#include "overlap.cuh"
#include "small_kernels.h"

namespace dwconv {
namespace {

// How rows come and go: in pieces, whatever their address, or in boxes of rows of planes that begin with 16 bytes, so
// many rows that they end with 16 bytes too. Halves are boxes of planes of two strips that a kernel is laid over the
// middle of: right halves are mirror images of left ones, and what lies outside on the left is not multiplied. Of rows
// that are cut into spans, and all begin with 16 bytes, boxes have a span's columns, with zeros beside the image; where
// the source's rows all begin elsewhere within 16 bytes, boxes have what is before them, too. Where rows begin
// anywhere, a span's columns of each row come and go by a bulk copy of their own.
enum class Way { kPieces, kBoxes, kShiftedBoxes, kHalves, kSpans, kShiftedSpans, kRows };

constexpr bool are_shifted(Way way) {
  return way == Way::kShiftedBoxes || way == Way::kShiftedSpans;
}

constexpr bool are_spans(Way way) {
  return way == Way::kSpans || way == Way::kShiftedSpans;
}

constexpr int kColumnsOfUnit = kUnit / 4;
constexpr int kLap = kColumnsOfUnit;  // of kRows: columns that a span has in common with the next one

struct March {
  CUtensorMap source_map, target_map;  // of boxes: columns, rows, planes, images; but for spans a plane is one row
  MarchCut cut;
  PlaneRows source, target;
  int multiplier;
  int box_bytes;  // of the source
  Divider by_multiplier;
  const float* weight;
  int64_t weight_filter;
  int weight_row, weight_column;
  int dense;  // 1 if the weights lie one after the other, -1 if those of a filter do backwards, or else 0
  const float* bias;
  int64_t bias_stride;
  int shift;  // columns before the source in the 16 bytes that it begins in
};

// The plane of the source that a plane of the target is of.
__device__ inline int source_plane(const March& a, int plane) {
  uint32_t source = plane;
  a.by_multiplier.split(source);
  return source;
}

// The target rows that a source row may reach, of a kernel that is so large with what dilation puts between its taps.
constexpr int held_rows(int extent, int stride) {
  return (extent - 1) / stride + 1;
}

// Here step i is the `stride` source rows that end with row i * stride - padding: they begin target row i, and complete
// the one held_rows - 1 before. `first` and `last` are the first step with a source row and the last one.
// Boxes of spans may reach beyond the image: all are as wide.
template <int kExtent, int kStride, Way kWay>
__device__ inline MarchRun steps_of(const March& a, int begin, int end, int span) {
  const MarchCut& cut = a.cut;
  MarchRun r = run_of(cut, a.source.height, a.source.width, begin, end, kExtent, span);
  r.first = max(r.begin, (cut.padding_h + kStride - 1) / kStride);
  r.last = min(r.end + held_rows(kExtent, kStride) - 2, (a.source.height + cut.padding_h + kStride - 2) / kStride);
  if (are_spans(kWay)) r.column = r.own_column;
  if (kWay == Way::kRows) {
    r.column_end = min(r.own_column + cut.columns + kLap, cut.target_width);
    r.source_end = min(r.column_end + kExtent - 1 - cut.padding_w, a.source.width);
  }
  if (kStride > 1 && cut.spans > 1) {
    r.source_column = max(r.column * kStride - cut.padding_w, 0);
    r.source_end = min((r.column_end - 1) * kStride + kExtent - cut.padding_w, a.source.width);
  }
  return r;
}

// The first column of a box of the source, of the span that begins in a column: 16 bytes begin with it.
template <Way kWay>
__device__ inline int box_column(const March& a, int column) {
  const int shift = kWay == Way::kShiftedSpans ? a.shift : 0;
  return ((column - a.cut.padding_w + shift) & -kColumnsOfUnit) - shift;
}

// The first source row of a step.
template <int kStride>
__device__ inline int row_of_step(const March& a, int step) {
  return (step - 1) * kStride + 1 - a.cut.padding_h;
}

// The outputs of a strip by the taps that meet the image. For kernels with a tap that is Inf or NaN, which must not
// meet padding.
template <int kKernel, int kStride, int kDilation>
__device__ __noinline__ void strip_by_taps(const March& a, int image, int plane, int begin, int end, int column) {
  const float* weight = a.weight + plane * a.weight_filter;
  const char* source = a.source.base + image * a.source.image_bytes + source_plane(a, plane) * a.source.plane_bytes;
  char* target = a.target.base + image * a.target.image_bytes + plane * a.target.plane_bytes;
  for (int row = begin; row < end; ++row)
    for (int v = column; v < column + kStrip; ++v) {
      float sum = a.bias ? a.bias[plane * a.bias_stride] : 0.f;
      for (int i = 0; i < kKernel; ++i)
        for (int j = 0; j < kKernel; ++j) {
          const int y = row * kStride - a.cut.padding_h + i * kDilation,
                    x = v * kStride - a.cut.padding_w + j * kDilation;
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
  static constexpr int kMostColumns = 20;  // of a lane

  int source_lane[32], target_lane[32];            // where each lane reads and writes
  float zeros[kMostColumns];                       // a row outside the image
  int image, channel, planes, row, column, bytes;  // where the rows of the target go that are computed next
  int own_column;                                  // the span's first one
  uint32_t finite;                                 // lanes whose taps are: then a product with a zero is a zero
  int begin;                                       // the first row of the target whose source was not yet loaded,
  int done;                                        // and how many steps of that were
};
constexpr int kBeforeRows = kRowMargin + MarchRing::kBarrierBytes;
constexpr int kKnownBytes = (kBeforeRows + sizeof(Known) + kBoxUnit - 1) / kBoxUnit * kBoxUnit - kBeforeRows;

// Stores rows of a span, which lie in shared memory at the same places within 16 bytes, by bulk copies. Spans meet
// where 16 bytes begin in a row, up to kLap columns behind their first ones: only at both ends of the image is there a
// rest, which goes in words, by 4 lanes for each row.
__device__ inline void store_rows(const March& a, const Known& known, int stage, int rows) {
  constexpr int kLanes = kColumnsOfUnit;
  const PlaneRows& target = a.target;
  const bool first = known.own_column == 0, last = known.own_column + a.cut.columns + kLap >= a.cut.target_width;
  char* to = target.at(known.image, known.channel, known.row, known.own_column);
  uint32_t from = shared_address(stage + phase_of(to - (known.own_column - known.column) * 4)) +
                  (known.own_column - known.column) * 4;
  const int left = (a.cut.target_width - known.own_column) * 4;
  // Where a row's whole units begin, and how many bytes they are.
  const auto head_of = [](const char* row) { return -phase_of(row) & (kUnit - 1); };
  const auto body_of = [&](int head) { return last ? (left - head) & -kUnit : a.cut.columns * 4; };
  if (first || last) {
    const int lane = threadIdx.x % 32, number = lane / kLanes;
    char* const row = to + number * target.row_bytes;
    const int head = head_of(row), at = lane % kLanes * 4 + (first ? 0 : head + body_of(head));
    if (number < rows && at < (first ? head : left))
      *reinterpret_cast<float*>(row + at) = at_address<float>(from + number * target.row_pitch + at);
  }
  if (!is_elected()) return;
#pragma unroll 1
  for (int i = 0; i < rows; ++i, to += target.row_bytes, from += target.row_pitch) {
    const int head = head_of(to), body = body_of(head);
    if (body > 0) store_bulk(to + head, from + head, body);
  }
  commit_stores();
}

// Stores so many pieces, rows or what goes together, that lie in shared memory at the same places within 16 bytes, in
// units and words. kRarely: in few instructions.
template <bool kRarely>
__device__ inline void store_pieces(const PlaneRows& rows, const CopyShare& share, uint32_t from, char* to, int count,
                                    int bytes) {
  // Rows that lie alike within 16 bytes have the same units, which are found once for all of them.
  const int alike = !kRarely && rows.row_bytes % kUnit == 0 ? count : 1;
  from += phase_of(to);
#pragma unroll 1
  for (int i = 0; i < count; i += alike, from += rows.row_pitch, to += rows.row_bytes) {
    const int phase = phase_of(to);
    const auto each_row = [&](int offset, auto&& store) {
      uint32_t here = from - phase + offset;
      char* there = to - phase + offset;
#pragma unroll 1
      for (int k = 0; k < alike; ++k, here += rows.row_pitch, there += rows.row_bytes) store(here, there);
    };
    const auto word = [&](int at) {
      each_row(at, [](uint32_t here, char* there) { *reinterpret_cast<float*>(there) = at_address<float>(here); });
    };
    if (kRarely) {
      each_unit<1>(
          share, phase, phase + bytes,
          [&](int at, int, int) {
            each_row(at,
                     [](uint32_t here, char* there) { *reinterpret_cast<uint4*>(there) = at_address<uint4>(here); });
          },
          word);
    } else {
      each_unit<2>(
          share, phase, phase + bytes,
          [&](int at, int step, int last) {
            const int next = at + step < last ? step : 0;  // the same once more, rather than a branch
            const auto two = [&](uint32_t here, char* there) {
              const uint4 first = at_address<uint4>(here), second = at_address<uint4>(here + next);
              *reinterpret_cast<uint4*>(there) = first;
              *reinterpret_cast<uint4*>(there + next) = second;
            };
            if (alike > 1)
              each_row(at, two);
            else
              two(from - phase + at, to - phase + at);
          },
          word);
    }
  }
}

// Puts zeros beside the image where a span of rows that lie in shared memory has its first columns, or its last ones.
// `first_row`: of the group that lies there. Behind the image boxes have zeros already.
template <Way kWay>
__device__ inline void clear_beside(const March& a, const Known& known, uint32_t group, int first_row) {
  const MarchCut& cut = a.cut;
  constexpr int kLanes = 4;  // of each row
  const bool first = known.column == 0;
  const bool last = kWay == Way::kRows && known.own_column + cut.columns + kLap + cut.padding_w > cut.target_width;
  if (!first && !last) return;
  const int lane = threadIdx.x % 32, row = lane / kLanes, k = lane % kLanes, begin = known.column - cut.padding_w;
  const uint32_t place = kWay == Way::kRows
                             ? a.source.phase(known.image, source_plane(a, known.channel), first_row, begin)
                             : (begin - box_column<kWay>(a, known.column)) * 4;
  const uint32_t from = group + place + row * a.source.row_pitch + 4 * k;
  if (k < cut.padding_w && row < a.source.group_rows) {
    if (first) at_address<float>(from) = 0;
    if (last) at_address<float>(from + 4 * (a.source.width - begin)) = 0;
  }
  before_bulk_copies();
  __syncwarp();
}

// Begins to load the source rows of a warp's next group of steps, through all of its runs, if there is one. `ready`:
// called when memory is about to be read.
template <int kExtent, int kStride, Way kWay, typename Ready = Nothing>
__device__ inline void load_next(const March& a, int end, int span, Known& known, MarchRing& ring, Ready&& ready = {}) {
  const MarchCut& cut = a.cut;
  const PlaneRows& rows = a.source;
  const int begin = known.begin, done = known.done;
  __syncwarp();
  if (begin < end) {
    const MarchRun r = steps_of<kExtent, kStride, kWay>(a, begin, end, span);
    const int step = r.first + done, left = r.last + 1 - step, count = min(left, rows.group_rows / kStride);
    const int row = row_of_step<kStride>(a, step), plane = source_plane(a, r.channel);
    constexpr bool kRows = kWay == Way::kRows, kShifted = are_shifted(kWay), kSpans = are_spans(kWay);
    constexpr bool kBoxes = kWay != Way::kPieces && !kRows;
    // A box must not touch what is before an image.
    if (kBoxes && !(kShifted && plane == 0 && row <= 0 && r.column == 0)) {
      ready();
      ring.load_boxes(cut, a.box_bytes, [&](int to, int barrier) {
        const int shift = kShifted ? a.shift : 0;
        copy_box(to, a.source_map, kSpans ? box_column<kWay>(a, r.column) + shift : row * rows.width, kSpans ? row : 0,
                 plane, r.image, barrier);
      });
    } else if constexpr (!kBoxes || kShifted) {
      const int row_begin = max(row, 0), row_end = min(row_of_step<kStride>(a, step + count), rows.height);
      const int bytes = (r.source_end - r.source_column) * 4;
      // What shares 16 bytes with its first and last elements is not to be touched either.
      const bool outermost = (plane == 0 && row_begin == 0) || (plane + 1 == rows.planes && row_end + 1 >= rows.height);
      ready();
      // There is room for the columns beside the image.
      const auto place_of = [&](int column) { return static_cast<int>(rows.phase(r.image, plane, row_begin, column)); };
      const int first = kShifted ? box_column<kWay>(a, r.column) : r.column - cut.padding_w;
      const int offset = kRows || (kShifted && kSpans)
                             ? place_of(first) + (r.source_column - first) * 4 - place_of(r.source_column)
                             : 0;
      if (kRows && !outermost) {
        ring.load_rows(cut, rows, row_end - row_begin, bytes, rows.at(r.image, plane, row_begin, r.source_column),
                       offset);
      } else {
        const CopyShare share(cut, rows);
        const char* from = rows.at(r.image, plane + share.piece, row_begin, r.source_column);
        const char* image = rows.at(r.image, 0, 0, 0);
        ring.load(cut, rows, share, source_plane(a, r.planes), row_end - row_begin, bytes, from, image, offset);
      }
    }
    if (threadIdx.x % 32 == 0) {
      known.begin = count < left ? begin : begin + (r.end - r.begin);
      known.done = count < left ? done + count : 0;
    }
  }
  ring.commit(cut);
}

// The products of a source row: of a row of sums, a tap and a column. Orders of them, the outermost loop first.
struct Product {
  int row, tap, column;
};
enum class Order { kRowsTapsColumns, kRowsColumnsTaps, kTapsColumnsRows, kColumnsTapsRows, kColumnsRowsTaps };

template <Order kOrder, int kRows, int kTaps, int kColumns>
constexpr Product product_of(int n) {
  if (kOrder == Order::kRowsTapsColumns) return {n / kColumns / kTaps, n / kColumns % kTaps, n % kColumns};
  if (kOrder == Order::kRowsColumnsTaps) return {n / kTaps / kColumns, n % kTaps, n / kTaps % kColumns};
  if (kOrder == Order::kTapsColumnsRows) return {n % kRows, n / kRows / kColumns, n / kRows % kColumns};
  if (kOrder == Order::kColumnsTapsRows) return {n % kRows, n / kRows % kTaps, n / kRows / kTaps};
  return {n / kTaps % kRows, n % kTaps, n / kTaps / kRows};
}

// Blocks on a multiprocessor, as registers allow.
constexpr int blocks_of(int kernel) {
  return kernel > kMarchKernel ? 2 : kernel < kMarchKernel ? 4 : kMarchBlocks;
}

// kMargin: how many columns at most lie outside the image on either side of a strip and are not zeros.
template <int kKernel, int kStride, int kDilation, int kMargin, Way kWay>
__global__ void __launch_bounds__(32 * kMarchWarps, blocks_of(kKernel)) march_nchw(const __grid_constant__ March a) {
  constexpr bool kHalves = kWay == Way::kHalves, kSpans = are_spans(kWay), kShifted = are_shifted(kWay);
  constexpr int kExtent = (kKernel - 1) * kDilation + 1, kReach = kExtent / 2;
  constexpr int kColumns = kHalves ? kStrip + kReach : (kStrip - 1) * kStride + kExtent;
  constexpr int kTaps = kKernel * kKernel;
  constexpr int kHeld = held_rows(kExtent, kStride);
  constexpr bool kRows = kWay == Way::kRows, kBoxes = kWay != Way::kPieces && !kRows;
  // Whether half of the products are left out where a run begins and ends, whose sums are of rows outside of it.
  constexpr bool kSkips = kKernel > kMarchKernel;
  static_assert(kColumns <= Known::kMostColumns);
  const MarchCut& cut = a.cut;
  const int lane = threadIdx.x % 32;
  const int memory = kRowMargin + threadIdx.x / 32 * cut.warp_bytes;
  uint32_t worker = blockIdx.x * kMarchWarps + threadIdx.x / 32;
  const int span = kBoxes && !kSpans ? 0 : cut.by_worker_spans.split(worker);
  const auto row_of = [&](int worker) {
    return static_cast<int>(static_cast<int64_t>(cut.units) * min(worker, cut.workers) / cut.workers) * cut.unit_rows;
  };
  const int begin = row_of(worker), end = row_of(worker + 1);
  uint32_t plane = lane;
  const int strip = cut.by_strips.split(plane);

  Known& known = shared<Known>(memory);
  if (lane == 0) known.begin = begin, known.done = 0, known.channel = -1;
  if (lane < Known::kMostColumns) known.zeros[lane] = 0;
  MarchRing ring(cut, memory + kKnownBytes);
  const int stage = ring.memory() + MarchRing::kGroups * cut.group_bytes;
  if (kBoxes && lane == 0) prefetch(a.source_map), prefetch(a.target_map);
  __syncwarp();
  let_next_kernel_start();
  load_next<kExtent, kStride, kWay>(a, end, span, known, ring, [&] { settle_and_wait_for_kernel_before(cut.workers); });

  const uint32_t weights = shared_address(stage);
  const uint32_t zeros = shared_address(memory + static_cast<int>(offsetof(Known, zeros)));
  // Waits until what lies in the stage is read by copies.
  const auto stored = [&] {
    if (!kBoxes && !kRows) return;
    if (is_elected()) wait_stores();
    __syncwarp();
  };
  float weight[kKernel][kKernel], bias = 0;
  for (int at = begin; at < end;) {
    const MarchRun r = steps_of<kExtent, kStride, kWay>(a, at, end, span);
    at += r.end - r.begin;
    const bool live = static_cast<int>(plane) < r.planes;
    const bool mirrored = kHalves && live && strip > 0;
    const int own = live ? static_cast<int>(plane) : 0;  // lanes to spare do what another one does, and store nothing
    if (const int channel = r.channel; channel != known.channel) {
      stored();
      const int count = r.planes * kTaps;
      int first = lane;
      asm volatile("" : "+r"(first));  // or else what follows from it is kept in registers all the time
      if (a.dense != 0) {              // forwards or backwards
        const float* from = a.weight + channel * kTaps - (a.dense < 0 ? kTaps - 1 : 0);
#pragma unroll 1
        for (int i = first; i < count; i += 32)
          copy_unit<4>(weights + 4 * (a.dense > 0 ? i : 2 * (i / kTaps * kTaps) + kTaps - 1 - i), from + i);
      } else {
#pragma unroll 1
        for (int i = first; i < count; i += 32)
          copy_unit<4>(weights + 4 * i, a.weight + (channel + i / kTaps) * a.weight_filter +
                                            i % kTaps / kKernel * a.weight_row + i % kTaps % kKernel * a.weight_column);
      }
      commit_copies();
      wait_copies<0>();
      __syncwarp();
      float zero = 0;
#pragma unroll
      for (int i = 0; i < kKernel; ++i)
#pragma unroll
        for (int j = 0; j < kKernel; ++j) {
          weight[i][j] =
              at_address<float>(weights + 4 * (own * kTaps + i * kKernel + (mirrored ? kKernel - 1 - j : j)));
          zero = fmaf(weight[i][j], 0.f, zero);
        }
      const uint32_t finite = __ballot_sync(~0u, zero == 0.f);
      if (lane == 0) known.finite = finite;
      if (a.bias) bias = a.bias[(channel + own) * a.bias_stride];
      __syncwarp();
    }

    const int strip_column = r.column + (live ? strip : 0) * kStrip;
    const int last_column = (kRows ? r.column_end : cut.target_width) - kStrip;
    const int column = kSpans ? strip_column : min(strip_column, last_column);
    const int x0 = column * kStride - cut.padding_w;
    const int source_begin = kSpans  ? box_column<kWay>(a, r.column)
                             : kRows ? r.column - cut.padding_w
                                     : r.source_column;
    ColumnMasks<kColumns, kMargin> masks;
    uint32_t source_low = 0, target_low = 0;
    if constexpr (kMargin > 0) masks.set(x0, a.source.width);
    if constexpr (!kBoxes) {
      source_low = a.source.phase(r.image, source_plane(a, r.channel + (a.source.whole ? 0 : own)), 0, source_begin);
      target_low = a.target.phase(r.image, r.channel + (a.target.whole ? 0 : own), 0, r.column);
    }
    const int source_column = !kHalves ? x0 - source_begin : mirrored ? a.source.width - 1 : 0;
    known.source_lane[lane] =
        source_plane(a, own) * a.source.piece_pitch + (source_column + (kShifted && !kSpans ? a.shift : 0)) * 4;
    known.target_lane[lane] = own * a.target.piece_pitch + (mirrored ? a.target.width - 1 : column - r.column) * 4;
    const int turn = mirrored ? -4 : 4;  // from a column to the next
    if (lane == 0) {
      known.image = r.image, known.channel = r.channel, known.planes = r.planes;
      known.row = r.begin, known.column = r.column, known.bytes = (r.column_end - r.column) * 4;
      known.own_column = r.own_column;
    }

    RowPlace source, target;
    target.begin(shared_address(stage) + known.target_lane[lane], target_low + r.begin * a.target.row_bytes);
    int fresh = 0, staged = 0;
    float sum[kHeld][kStrip];  // the oldest output row first; those that lie above the run are never stored
#pragma unroll
    for (int o = 0; o < kHeld; ++o)
#pragma unroll
      for (int v = 0; v < kStrip; ++v) sum[o][v] = bias;

    // Puts a complete row beside others, and stores them when they are as many as there is room for.
    const auto store = [&](int row) {
      if (staged == 0) stored();
      const uint32_t here = target.next(a.target);
      if (live)
#pragma unroll
        for (int v = 0; v < kStrip; ++v) at_address<float>(kHalves ? here + v * turn : here + 4 * v) = sum[0][v];
      if (++staged < a.target.group_rows && row + 1 < r.end) return;
      // A box that is not full may end with the planes only. What is written again does not go this way.
      const bool box = kBoxes && known.finite == ~0u && (staged == a.target.group_rows || row + 1 == cut.target_height);
      if (box || kRows) before_bulk_copies();
      __syncwarp();
      const CopyShare share(cut, a.target);
      const int planes = known.planes;
      if (box) {
        if (is_elected()) {
          store_box(a.target_map, stage, kSpans ? known.column : known.row * a.target.width, kSpans ? known.row : 0,
                    known.channel, known.image);
          commit_stores();
        }
      } else if (kRows) {
        if (known.finite == ~0u) store_rows(a, known, stage, staged);  // or else all is written again
      } else if (share.piece < planes) {
        char* to = a.target.at(known.image, known.channel + share.piece, known.row, known.column);
        uint32_t from = shared_address(stage) + share.piece * a.target.piece_pitch;
        const int bytes = a.target.whole      ? static_cast<int>(a.target.plane_bytes) * planes
                          : a.target.together ? staged * a.target.row_bytes
                                              : known.bytes;
        store_pieces<kBoxes>(a.target, share, from, to, a.target.together ? 1 : staged, bytes);
      }
      __syncwarp();
      if (lane == 0) known.row = row + 1;
      staged = 0;
      target.begin(shared_address(stage) + known.target_lane[lane], target_low + (row + 1) * a.target.row_bytes);
    };

    constexpr int kAhead = kHeld - 1;  // rows from the oldest one to the newest
    for (int step = r.first; step <= r.last; ++step) {
      if (fresh == 0) {
        const uint32_t group = ring.next(cut);
        if constexpr (kRows || (kShifted && kSpans))
          clear_beside<kWay>(a, known, group, max(row_of_step<kStride>(a, step), 0));
        load_next<kExtent, kStride, kWay>(a, end, span, known, ring);
        fresh = min(a.source.group_rows / kStride, r.last + 1 - step);
        source.begin(group + known.source_lane[lane],
                     source_low + max(row_of_step<kStride>(a, step), 0) * a.source.row_bytes);
      }
      --fresh;
#pragma unroll
      for (int e = 0; e < kStride; ++e) {
        float x[kColumns];
        const int y = row_of_step<kStride>(a, step) + e;
        const bool inside = kBoxes || kStride == 1 || (y >= 0 && y < a.source.height);  // or else it was not loaded
        const uint32_t from = inside ? source.next(a.source) : zeros;
        if constexpr (kHalves) {
#pragma unroll
          for (int s = 0; s < kColumns; ++s) x[s] = at_address<float>(from + s * turn);
        } else {
          masks.read(from, x);
        }
        const bool begins = e + 1 == kStride;  // a new row, and all move on
        const auto add = [&](int o, int j, int v, bool is_first) {
          const int reach = (kHeld - o - begins) * kStride - (begins ? 0 : kStride - 1 - e), i = reach / kDilation;
          const int s = kHalves ? v + j - kReach : v * kStride + j * kDilation;
          if (i >= kKernel || s < 0) return;
          if (reach % kDilation > 0) {
            if (is_first) sum[o][v] = sum[o + 1][v];
            return;
          }
          const float before = !is_first || !begins ? sum[o][v] : o + 1 < kHeld ? sum[o + 1][v] : bias;
          sum[o][v] = fmaf(x[s], weight[i][j], before);
        };
        // In the order in which ptxas finds the most operands in different banks.
        constexpr Order kOrder = kSkips                              ? Order::kColumnsRowsTaps
                                 : kDilation > 1 || kHalves          ? Order::kColumnsTapsRows
                                 : kShifted && kSpans                ? Order::kTapsColumnsRows
                                 : kBoxes && !kSpans && kStride == 1 ? Order::kRowsColumnsTaps
                                                                     : Order::kRowsTapsColumns;
        const auto add_rows = [&](auto from, auto to) {
          constexpr int kFirst = decltype(from)::value, kCount = decltype(to)::value - kFirst;
#pragma unroll
          for (int n = 0; n < kCount * kKernel * kStrip; ++n) {
            const Product p = product_of<kOrder, kCount, kKernel, kStrip>(n);
            add(kFirst + p.row, p.tap, p.column, p.tap == (kHalves && p.column < kReach ? kReach - p.column : 0));
          }
        };
        using std::integral_constant;
        constexpr int kHalf = kHeld / 2;
        if (kSkips && step <= r.begin + kHalf)
          add_rows(integral_constant<int, kHalf>{}, integral_constant<int, kHeld>{});
        else if (kSkips && step >= r.end + kAhead - 1 - kHalf)
          add_rows(integral_constant<int, 0>{}, integral_constant<int, kHeld - kHalf>{});
        else
          add_rows(integral_constant<int, 0>{}, integral_constant<int, kHeld>{});
      }
      if (step >= r.begin + kAhead) store(step - kAhead);
    }
    // Rows below the image are zeros: in a loop of their own, or else the sums were moved for every row.
    for (int row = max(r.first, r.last + 1) - kAhead; row < r.end; ++row) {
#pragma unroll
      for (int o = 0; o + 1 < kHeld; ++o)
#pragma unroll
        for (int v = 0; v < kStrip; ++v) sum[o][v] = sum[o + 1][v];
      if (row >= r.begin) store(row);
    }
    if (live && !(known.finite >> lane & 1)) {
      // A span is of one plane: the strip's place is in shared memory, and no register has to keep it.
      const int first = kSpans ? known.column + known.target_lane[lane] / 4 : column;
      strip_by_taps<kKernel, kStride, kDilation>(a, r.image, r.channel + own, r.begin, r.end, min(first, last_column));
    }
  }
  stored();
}

using Kernel = void (*)(March);

// What a kernel is compiled for, and how, each way that it may go, or null.
struct Kernels {
  int side, extent, stride;
  std::array<Kernel, 7> by_way;

  Kernel& operator[](Way way) { return by_way[static_cast<int>(way)]; }
  const Kernel& operator[](Way way) const { return by_way[static_cast<int>(way)]; }
};

// How a problem is cut.
struct Decision {
  MarchCut cut;
  PlaneRows source, target;
  Way way;
  int blocks, shared_bytes;
};

Decision decide(const March& a, int64_t images, const Kernels& kernels, const Device& device) {
  Decision d{a.cut, a.source, a.target, Way::kPieces, 0, 0};
  MarchCut& cut = d.cut;
  choose_lanes(cut);
  const int side = kernels.side, extent = kernels.extent, stride = kernels.stride;
  const bool small = cut.spans == 1 && cut.target_width <= 2 * kStrip;  // planes are not cut
  // So many rows begin and end with 16 bytes, and so many of them a box has at most, with what is before a source that
  // begins elsewhere.
  const int even_rows = kUnit / 4 / std::gcd(std::gcd(a.source.width, a.target.width), kUnit / 4);
  const int more = kernels[Way::kShiftedBoxes] != nullptr ? kColumnsOfUnit : 0;
  const auto most_of = [&](int columns, int more) { return (kMostBoxSide - more) / columns / even_rows * even_rows; };
  const int most_rows = most_of(a.source.width * stride, more), most_target_rows = most_of(a.target.width, 0);
  if ((kernels[Way::kBoxes] != nullptr || more > 0) && cut.spans == 1 && (even_rows == 1 || (small && stride == 1)) &&
      most_rows > 0 && most_target_rows > 0) {
    const bool two = a.source.width == 2 * kStrip && cut.target_width == 2 * kStrip && cut.padding_w == extent / 2;
    d.way = more > 0 ? Way::kShiftedBoxes : two && kernels[Way::kHalves] != nullptr ? Way::kHalves : Way::kBoxes;
  }
  // Spans of whole units, where rows are.
  if (stride == 1 && cut.spans > 1 && a.source.width % kColumnsOfUnit == 0 && a.target.width % kColumnsOfUnit == 0) {
    if (kernels[Way::kSpans] != nullptr) d.way = Way::kSpans;
    if (kernels[Way::kShiftedSpans] != nullptr) d.way = Way::kShiftedSpans;
    const int strips = static_cast<int>(ceil_div(cut.target_width, kStrip));
    cut.spans = static_cast<int>(ceil_div(strips, 32));
    cut.strips = static_cast<int>(round_up(ceil_div(strips, cut.spans), kColumnsOfUnit));
    cut.planes = 1;
    set_lanes(cut);
  }
  if (kernels[Way::kRows] != nullptr && cut.target_width > 32 * kStrip && cut.planes == 1 && d.way == Way::kPieces) {
    d.way = Way::kRows;
    const int all = cut.target_width - kLap;
    cut.columns = static_cast<int>(round_up(ceil_div(all, ceil_div(all, 32 * kStrip - kLap)), kColumnsOfUnit));
    cut.spans = static_cast<int>(ceil_div(all, cut.columns));
    cut.strips = static_cast<int>(ceil_div(cut.columns + kLap, kStrip));
    cut.by_spans = Divider(cut.spans), cut.by_strips = Divider(cut.strips);
  }
  const bool boxes = d.way != Way::kPieces && d.way != Way::kRows, spans = are_spans(d.way);
  const int budget = march_budget(device, blocks_of(side));
  const int taps = static_cast<int>(round_up(cut.planes * side * side * 4, kUnit));
  const auto fill = [&](bool whole, int rows, int target_rows) {
    if (spans) {
      arrange_box(d.source, cut.planes, round_up(cut.columns + extent - 1 + kColumnsOfUnit - 1, kColumnsOfUnit), rows);
      arrange_box(d.target, cut.planes, cut.columns, target_rows);
      d.source.together = d.target.together = false;
    } else if (boxes) {
      arrange_box(d.source, cut.planes / a.multiplier, a.source.width, rows * stride, more);
      arrange_box(d.target, cut.planes, a.target.width, target_rows);
    } else {
      const int columns = cut.columns + (d.way == Way::kRows ? kLap : 0);
      arrange(d.source, cut, (columns - 1) * stride + extent, rows * stride, whole, stride, a.multiplier);
      arrange(d.target, cut, columns, target_rows, whole);
    }
    cut.stage_bytes = std::max(taps, static_cast<int>(round_up(d.target.group_bytes, kUnit)));
    cut.group_bytes = d.source.group_bytes;
    cut.warp_bytes = static_cast<int>(round_up(
        kKnownBytes + MarchRing::kBarrierBytes + MarchRing::kGroups * cut.group_bytes + cut.stage_bytes, kBoxUnit));
    return cut.warp_bytes <= budget;
  };
  // Of pieces that lanes copy themselves as many rows come as go.
  const bool by_lanes = !boxes && !cut.bulk;
  const int most_source_rows = by_lanes || d.way == Way::kRows ? 7 : 8;
  const int most_rows_of_target = by_lanes ? 7 : d.way == Way::kRows ? 6 : 4;
  constexpr int kTargetRowsOfBox = 6;
  int rows = std::min(most_source_rows / stride, cut.target_height);
  if (boxes) {
    // Boxes lie as they are: with some rows less lanes may meet in fewer banks.
    rows = static_cast<int>(round_up(rows, even_rows));
    const int most = std::max(kTargetRowsOfBox / even_rows * even_rows, even_rows);
    int target_rows = std::min(rows, most);
    if (!spans) target_rows = std::min(target_rows, most_target_rows), rows = std::min(rows, most_rows);
    while (!fill(false, rows, target_rows) && rows > even_rows) rows -= even_rows;
    const auto best = [&](int most, auto&& meet) {
      int best = most, least = 1 << 30;
      for (int count = most; count >= std::max(most / 2, even_rows); count -= even_rows)
        if (const int now = meet(count); now < least) least = now, best = count;
      return best;
    };
    target_rows = best(target_rows, [&](int count) {
      fill(false, rows, count);
      return conflicts(cut, d.target.piece_pitch);
    });
    rows = best(rows, [&](int count) {
      fill(false, count, target_rows);
      return conflicts(cut, d.source.piece_pitch, stride, a.multiplier);
    });
    fill(false, rows, target_rows);
  } else if (stride > 1 || !small || !fill(true, a.source.height, cut.target_height)) {  // small planes go whole
    while (!fill(false, rows, std::min(rows, most_rows_of_target)) && rows > 1) --rows;
  }
  const Kernel kernel = kernels[d.way];
  d.shared_bytes = kMarchWarps * cut.warp_bytes + 2 * kRowMargin;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
  int resident = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 32 * kMarchWarps, d.shared_bytes);
  const int64_t all = ceil_div(cut.channels, cut.planes) * cut.spans * images, all_rows = all * cut.target_height;
  const int64_t slots = int64_t{std::max(resident, 1)} * device.multiprocessors;  // for blocks
  const double turns = static_cast<double>(all) / (slots * kMarchWarps);
  // A cut through a plane costs rows that both sides need.
  constexpr int kLeast = 8;
  const bool together = d.source.whole || (boxes && even_rows > 1) || std::ceil(turns) < 1.06 * turns;
  cut.unit_rows = together ? cut.target_height : 1;
  cut.units = static_cast<int>(all_rows / cut.unit_rows);
  d.blocks = static_cast<int>(std::min(ceil_div(together ? all : ceil_div(all_rows, kLeast), kMarchWarps), slots));
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

void launch(March a, int64_t images, Kernels kernels, cudaStream_t stream) {
  const Device& device = current_device();
  // Whether all planes begin at the same place within 16 bytes as the array.
  const auto alike = [&](const PlaneRows& rows) {
    constexpr int64_t kFar = int64_t{1} << 39;
    return rows.plane_bytes % kUnit == 0 &&
           (images == 1 || (rows.image_bytes > 0 && rows.image_bytes % kUnit == 0 && rows.image_bytes < kFar));
  };
  const auto shift_of = [](const PlaneRows& rows) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(rows.base) % kUnit / 4);
  };
  const bool boxes = a.cut.bulk && alike(a.source) && alike(a.target) && shift_of(a.target) == 0;
  a.shift = shift_of(a.source);
  if (!boxes || a.shift > 0) kernels[Way::kBoxes] = kernels[Way::kSpans] = nullptr;
  if (!boxes || a.shift == 0) kernels[Way::kShiftedBoxes] = kernels[Way::kShiftedSpans] = nullptr;
  static thread_local Decisions<14, Decision> decisions;
  const Decision& d = decisions(
      {device.id, boxes ? 1 + (a.shift > 0) : 0, kernels.side, kernels.extent, kernels.stride, images, a.cut.channels,
       a.multiplier, a.source.height, a.source.width, a.target.height, a.target.width, a.cut.padding_w, a.cut.bulk},
      [&] { return decide(a, images, kernels, device); });
  const bool bulk = a.cut.bulk;
  a.cut = d.cut, a.cut.bulk = bulk;
  a.source.arrange_as(d.source), a.target.arrange_as(d.target);
  if (d.way != Way::kPieces && d.way != Way::kRows) {
    const auto describe = [&](CUtensorMap& map, const PlaneRows& rows, int planes, int shift) {
      const bool spans = are_spans(d.way);
      const int64_t image_bytes = images == 1 ? rows.planes * rows.plane_bytes : rows.image_bytes;
      const int64_t width = spans ? rows.width : rows.plane_bytes / 4, height = spans ? rows.height : 1;
      if (!describe_boxes(map, rows.base - shift * 4, sizeof(float), {width + shift, height, rows.planes, images},
                          {width * 4, rows.plane_bytes, image_bytes},
                          {spans ? rows.row_pitch / 4 : rows.piece_pitch / 4, spans ? rows.group_rows : 1, planes, 1}))
        throw std::runtime_error("dwconv: CUDA cannot describe boxes of planes");
      return planes * rows.piece_pitch;
    };
    a.box_bytes = describe(a.source_map, a.source, std::max(a.cut.planes / a.multiplier, 1), a.shift);
    describe(a.target_map, a.target, a.cut.planes, 0);
  }
  launch_early(kernels[d.way], a, d.blocks, 32 * kMarchWarps, stream, {.shared_bytes = d.shared_bytes});
  check_launch("march_nchw");
}

}  // namespace

void launch_march_nchw(const Problem& p, bool bulk, const Allocate&, cudaStream_t stream) {
  bulk = bulk && current_device().capability >= 90;
  const Mapping map(p);
  March a{};
  a.source = plane_rows(map.source, map.sources, map.height, map.width);
  a.target = plane_rows(map.target, map.targets, map.out_height, map.out_width);
  a.multiplier = map.fan_out, a.by_multiplier = Divider(map.fan_out);
  a.weight = static_cast<const float*>(map.weight.data), a.weight_filter = map.weight.stride[0];
  a.weight_row = static_cast<int>(map.weight.stride[2]), a.weight_column = static_cast<int>(map.weight.stride[3]);
  const int64_t step = map.weight.stride[3];
  if ((step == 1 || step == -1) && map.weight.stride[2] == step * p.kernel_w && a.weight_filter == p.taps())
    a.dense = static_cast<int>(step);
  a.bias = static_cast<const float*>(map.bias), a.bias_stride = map.bias_stride;
  a.cut.bulk = bulk;
  a.cut.channels = map.targets, a.cut.target_height = map.out_height, a.cut.target_width = map.out_width;
  a.cut.padding_h = map.padding_h, a.cut.padding_w = map.padding_w;
  static_assert(kMarchKernel == 7 && March9x9::kKernelH == 9);
  const bool wide = map.padding_w > (p.kernel_w - 1) * p.dilation_w / 2;
  const auto launch_one = [&](auto kernel) {
    using One = decltype(kernel);
    constexpr int kSide = One::kKernelH, kStride = One::kStride, kDilation = One::kDilation;
    constexpr int kReach = (kSide - 1) * kDilation;
    const Kernel pieces = wide ? march_nchw<kSide, kStride, kDilation, kReach, Way::kPieces>
                               : march_nchw<kSide, kStride, kDilation, kReach / 2, Way::kPieces>;
    const Kernel boxes = wide ? nullptr : march_nchw<kSide, kStride, kDilation, kReach / 2, Way::kBoxes>;
    Kernel halves = nullptr, spans = nullptr, shifted = nullptr, shifted_spans = nullptr, rows = nullptr;
    if constexpr (kStride == 1) spans = march_nchw<kSide, kStride, kDilation, 0, Way::kSpans>;
    if constexpr (kSide == kMarchKernel && kStride == 1) {
      halves = march_nchw<kSide, kStride, kDilation, 0, Way::kHalves>;
      if (!wide && a.cut.bulk) {
        shifted = march_nchw<kSide, kStride, kDilation, kReach / 2, Way::kShiftedBoxes>;
        shifted_spans = march_nchw<kSide, kStride, kDilation, 0, Way::kShiftedSpans>;
        rows = march_nchw<kSide, kStride, kDilation, 0, Way::kRows>;
      }
    }
    launch(a, p.batch, {kSide, kReach + 1, kStride, {pieces, boxes, shifted, halves, spans, shifted_spans, rows}},
           stream);
  };
  visit_small_kernel<std::tuple<SmallKernel<7, 7, 1, 1>, SmallKernel<7, 7, 2, 1>, March9x9, SmallKernel<3, 3, 1, 2>>>(
      p, launch_one);
}

}  // namespace dwconv
