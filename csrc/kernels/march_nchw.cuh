// Planes in rows, as warps march down them, each on its own: a warp takes a few planes side by side, and of each some
// strips of columns, as many as it has lanes. It loads rows into shared memory of its own, some of them ahead, and
// never waits for other warps. Rows come and go in pieces of 16 bytes, whatever their address; what shares 16 bytes
// with other rows than the warp's goes in words of 4 bytes.
#pragma once

#include <algorithm>
#include <array>

#include "march_nchw.h"
#include "stream.cuh"

namespace dwconv {

constexpr int kMarchWarps = 4;   // of a block
constexpr int kMarchBlocks = 3;  // on a multiprocessor, as registers allow
constexpr int kUnitsAtOnce = 4;  // that a lane copies, where rows go together
constexpr int kRowMargin = 64;   // bytes before the first and behind the last row in shared memory: read, but not used

// An array of contiguous planes, and how rows of it lie in a warp's shared memory, in groups.
struct PlaneRows {
  char* base;
  int64_t image_bytes, plane_bytes;
  int row_bytes, planes, height, width;  // of an image
  int row_pitch;                         // from row to row in shared memory: as far within 16 bytes as in memory
  int piece_pitch;                       // from plane to plane
  int group_rows, group_bytes;
  bool whole;     // planes go whole, and together as they lie in memory
  bool together;  // whole rows do

  // Takes over how the rows of another array lie in shared memory.
  void arrange_as(const PlaneRows& other) {
    row_pitch = other.row_pitch, piece_pitch = other.piece_pitch;
    group_rows = other.group_rows, group_bytes = other.group_bytes, whole = other.whole, together = other.together;
  }
  // Where an address lies within 16 bytes.
  __device__ uint32_t phase(int image, int plane, int row, int column) const {
    return (static_cast<uint32_t>(reinterpret_cast<uintptr_t>(base)) + image * static_cast<uint32_t>(image_bytes) +
            plane * static_cast<uint32_t>(plane_bytes) + row * static_cast<uint32_t>(row_bytes) + column * 4u) %
           kUnit;
  }
  __device__ char* at(int image, int plane, int row, int column) const {
    return base + (image * image_bytes + plane * plane_bytes + static_cast<int64_t>(row) * row_bytes + column * 4);
  }
};

// How the target (in grad_weight the gradient) is cut: images into groups of planes side by side, rows into spans of
// strips. A run of rows is numbered by its first one: images follow each other, then spans (unless warps side by side
// take them), then groups, so that weights stay.
struct MarchCut {
  int planes, strips, spans, columns;  // of a warp; `columns`: from one span to the next
  bool bulk;                           // by bulk copies
  int channels, target_height, target_width, padding_h, padding_w;
  int units, unit_rows, workers;  // what workers share evenly: rows, or all rows of a plane
  int group_bytes, stage_bytes, warp_bytes;
  Divider by_height, by_images, by_spans, by_strips;
  Divider by_worker_spans;  // of a worker, which may be several warps side by side, one for each span
};

struct MarchRun {
  int image, channel, planes;
  int begin, end;                 // rows of the target
  int first, last;                // rows of the source that they reach
  int own_column;                 // the span's first one
  int column, column_end;         // of its strips: the last span may begin in the one before
  int source_column, source_end;  // what it reaches
};

// `span`: the warp's, where spans are not numbered.
__device__ inline MarchRun run_of(const MarchCut& a, int height, int width, int begin, int end,
                                  int kernel = kMarchKernel, int span = 0) {
  MarchRun r;
  uint32_t column = begin;
  r.begin = a.by_height.split(column);
  r.end = min(a.target_height, r.begin + end - begin);
  r.image = a.by_images.split(column);
  span += a.by_spans.split(column);
  r.channel = static_cast<int>(column) * a.planes;
  r.planes = min(a.planes, a.channels - r.channel);
  r.first = max(r.begin - a.padding_h, 0);
  r.last = min(r.end - 1 - a.padding_h + kernel - 1, height - 1);
  r.own_column = span * a.columns;
  r.column = min(r.own_column, a.target_width - kStrip);
  r.column_end = min(r.own_column + a.columns, a.target_width);
  const bool all = a.spans == 1;
  r.source_column = all ? 0 : max(r.column - a.padding_w, 0);
  r.source_end = all ? width : min(r.column_end + kernel - 1 - a.padding_w, width);
  return r;
}

// Where a piece begins within 16 bytes, in memory as in shared memory.
__device__ inline int phase_of(const void* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) % kUnit);
}

// Shared memory by its address: cheaper than by an offset, where a loop asks for it again and again.
template <typename T>
__device__ T& at_address(uint32_t address) {
  return *static_cast<T*>(__cvta_shared_to_generic(address));
}

// What a lane copies of the warp's planes: units of 16 bytes, `step` apart, of the plane `piece`.
struct CopyShare {
  int piece, unit, step;

  __device__ CopyShare(const MarchCut& a, const PlaneRows& rows) {
    const int lane = threadIdx.x % 32;
    uint32_t plane = lane;
    const int strip = a.by_strips.split(plane);
    piece = rows.whole ? 0 : static_cast<int>(plane), unit = rows.whole ? lane : strip;
    step = rows.whole ? 32 : a.strips;
  }
};

// Calls units(offset, step, last) for the lane's units of 16 bytes that lie in [begin, end), kAtOnce at a time: one at
// the offset, others `step` apart as long as they lie before `last`. Calls word(offset) for its words of the rest.
template <int kAtOnce, typename Units, typename Word>
__device__ void each_unit(const CopyShare& share, int begin, int end, Units&& units, Word&& word) {
  const int first = (begin + kUnit - 1) & -kUnit, last = end & -kUnit;
  const int step = share.step * kUnit;
#pragma unroll 1
  for (int at = first + share.unit * kUnit; at < last; at += kAtOnce * step) units(at, step, last);
  if ((begin | end) % kUnit == 0) return;
#pragma unroll 1
  for (int i = share.unit; i < 2 * kUnit / 4; i += share.step) {
    const bool head = i < kUnit / 4;
    const int at = head ? begin + 4 * i : max(first, last) + 4 * i - kUnit;
    if (at < (head ? min(first, end) : end)) word(at);
  }
}

// A warp's two groups of rows in shared memory, one read while the other one arrives. Bulk copies are waited for with a
// barrier for each group, which lies before them; where there are none, lanes copy with cp.async, each its share.
class MarchRing {
 public:
  static constexpr int kGroups = 2, kBarrierBytes = 32;

  __device__ MarchRing(const MarchCut& a, int memory) : barriers_(memory), memory_(memory + kBarrierBytes) {
    if (a.bulk) {
      if (threadIdx.x % 32 == 0)
        for (int i = 0; i < kGroups; ++i) init_barrier(barriers_ + 8 * i, 1);
      before_bulk_copies();
      __syncwarp();
    }
  }

  // Begins to load rows to the next group, at an offset in it, from `from` on, which goes on behind them. `image` is
  // where the image that they belong to begins.
  __device__ void load(const MarchCut& a, const PlaneRows& rows, const CopyShare& share, int planes, int count,
                       int bytes, const char*& from, const char* image, int offset) {
    if (count <= 0 || share.piece >= planes) return;
    int to = memory_ + group() * a.group_bytes + offset + share.piece * rows.piece_pitch;
    const bool spans = !rows.together;
    if (rows.whole)
      bytes = static_cast<int>(rows.plane_bytes) * planes;
    else if (rows.together)
      bytes = count * rows.row_bytes;
    if (a.bulk) {
      const int copies = spans ? count : 1;
      const char* row = from + static_cast<int64_t>(share.unit) * rows.row_bytes;
      to += phase_of(from);
      for (int i = share.unit; i < copies; i += share.step, row += static_cast<int64_t>(share.step) * rows.row_bytes)
        load_bulk(row, bytes, image, image + rows.planes * rows.plane_bytes, to + i * rows.row_pitch);
      from += spans ? static_cast<int64_t>(count) * rows.row_bytes : bytes;
      return;
    }
    if (spans && rows.row_bytes % kUnit == 0) {
      const bool whole = (reinterpret_cast<uintptr_t>(image) | rows.plane_bytes) % kUnit == 0;
      return load_alike(rows, share, count, bytes, from, shared_address(to), whole);
    }
    to += phase_of(from);
#pragma unroll 1
    for (int i = 0; i < (spans ? count : 1); ++i, to += rows.row_pitch) {
      const int phase = phase_of(from);
      const char* base = from - phase;
      const uint32_t address = shared_address(to - phase);
      each_unit<kUnitsAtOnce>(
          share, phase, phase + bytes,
          [&](int at, int step, int last) {
#pragma unroll
            for (int k = 0; k < kUnitsAtOnce; ++k, at += step)
              if (k == 0 || at < last) copy_unit<kUnit>(address + at, base + at);
          },
          [&](int at) { copy_unit<4>(address + at, base + at); });
      from += spans ? rows.row_bytes : bytes;
    }
  }

  // The same by one lane: copy(to, barrier) begins to copy so many bytes.
  template <typename Copy>
  __device__ void load_boxes(const MarchCut& a, int bytes, Copy&& copy) {
    if (!is_elected()) return;
    const int barrier = barriers_ + 8 * group();
    expect_bytes(barrier, bytes);
    copy(memory_ + group() * a.group_bytes, barrier);
  }

  // The same of a span's rows by one lane, each with what is around it within 16 bytes.
  __device__ void load_rows(const MarchCut& a, const PlaneRows& rows, int count, int bytes, const char* from,
                            int offset) {
    if (count <= 0 || !is_elected()) return;
    const int barrier = barriers_ + 8 * group(), size = (bytes + kUnit - 4 + kUnit - 1) & -kUnit;
    expect_bytes(barrier, count * size);
    uint32_t to = shared_address(memory_ + group() * a.group_bytes + offset) + phase_of(from);
#pragma unroll 1
    for (int i = 0; i < count; ++i, from += rows.row_bytes, to += rows.row_pitch)
      copy_bulk(to & -kUnit, reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(from) & -kUnit), size, barrier);
  }

  // Ends the loads of a group.
  __device__ void commit(const MarchCut& a) {
    if (a.bulk) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) arrive(barriers_ + 8 * group());
    } else {
      commit_copies();
    }
  }

  // Waits for the next group; returns the address where it lies. The one before it may be loaded over.
  __device__ uint32_t next(const MarchCut& a) {
    if (a.bulk)
      wait(barriers_ + 8 * group(), read_ / kGroups % 2);
    else
      wait_copies<kGroups - 2>();
    __syncwarp();
    const uint32_t here = shared_address(memory_ + group() * a.group_bytes);
    ++read_;
    return here;
  }

  // All of the memory behind the barriers, when all groups have been read.
  __device__ int memory() const { return memory_; }

 private:
  // Rows that lie alike within 16 bytes have the same units, which need not be found for each of them. `whole`: rows
  // begin and end with 16 bytes, so that of a span's first and last ones nothing but the row is copied as well.
  __device__ void load_alike(const PlaneRows& rows, const CopyShare& share, int count, int bytes, const char*& from,
                             uint32_t to, bool whole) const {
    const int phase = phase_of(from);
    const int begin = whole ? 0 : phase, end = whole ? (phase + bytes + kUnit - 1) & -kUnit : phase + bytes;
    const char* const base = from - phase;
    const auto each_row = [&](auto&& copy) {
      const char* row = base;
      uint32_t here = to;
#pragma unroll 1
      for (int i = 0; i < count; ++i, row += rows.row_bytes, here += rows.row_pitch) copy(here, row);
    };
    each_unit<2>(
        share, begin, end,
        [&](int at, int step, int last) {
          const int next = at + step < last ? at + step : at;  // the same once more, rather than a branch
          each_row([&](uint32_t here, const char* row) {
            copy_unit<kUnit>(here + at, row + at);
            copy_unit<kUnit>(here + next, row + next);
          });
        },
        [&](int at) { each_row([&](uint32_t here, const char* row) { copy_unit<4>(here + at, row + at); }); });
    from += static_cast<int64_t>(count) * rows.row_bytes;
  }

  // Copies the units of 16 bytes that a piece lies in, if nothing but the image does, and words of the others. `to`:
  // where the piece begins.
  __device__ void load_bulk(const char* from, int bytes, const char* image, const char* image_end, int to) const {
    const auto number = [](const char* pointer) { return reinterpret_cast<uint64_t>(pointer); };
    const uint64_t begin = number(from), end = begin + bytes, unit = kUnit - 1;
    const uint64_t low = max(begin & ~unit, (number(image) + unit) & ~unit);
    const uint64_t high = min((end + unit) & ~unit, number(image_end) & ~unit);
    const uint32_t base = to - static_cast<uint32_t>(begin);
    if (low < high) {
      const int size = static_cast<int>(high - low), barrier = barriers_ + 8 * group();
      expect_bytes(barrier, size);
      const int address = static_cast<int>(base + static_cast<uint32_t>(low));
      copy_bulk(shared_address(address), reinterpret_cast<const char*>(low), size, barrier);
    }
    const auto copy = [&](uint64_t at) {
      shared<float>(static_cast<int>(base + static_cast<uint32_t>(at))) = *reinterpret_cast<const float*>(at);
    };
    for (uint64_t at = begin; at < min(low, end); at += 4) copy(at);
    for (uint64_t at = max(max(low, high), begin); at < end; at += 4) copy(at);
  }

  // The one to be read next. As one is under way ahead of it only, also the one to be loaded after that.
  __device__ int group() const { return static_cast<int>(read_ % kGroups); }

  const int barriers_, memory_;
  uint32_t read_ = 0;  // groups that were read
};

// Rows of a group as a lane reads or writes them, one after the other.
class RowPlace {
 public:
  // From a row on; `low`: its address.
  __device__ void begin(uint32_t address, uint32_t low) { row_ = address + low % kUnit; }
  __device__ uint32_t next(const PlaneRows& rows) {
    const uint32_t here = row_;
    row_ += rows.row_pitch;
    return here;
  }

 private:
  uint32_t row_ = 0;
};

// Which of a lane's columns lie inside the image: a bit for each of those that may not, the first and the last kMargin.
template <int kColumns, int kMargin>
struct ColumnMasks {
  uint32_t inside;

  __device__ void set(int x0, int width) {
    inside = 0;
#pragma unroll
    for (int j = 0; j < 2 * kMargin; ++j) {
      const int x = x0 + (j < kMargin ? j : kColumns - 2 * kMargin + j);
      if (x >= 0 && x < width) inside |= 1u << j;
    }
    inside = __shfl_sync(~0u, inside, threadIdx.x % 32);  // or else it would be asked again for every row
  }
  // Reads a row, with zeros outside the image.
  __device__ void read(uint32_t from, float (&x)[kColumns]) const {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) x[j] = at_address<float>(from + 4 * j);
#pragma unroll
    for (int j = 0; j < kMargin; ++j) {
      float &low = x[j], &high = x[kColumns - kMargin + j];
      low = inside >> j & 1 ? low : 0.f;
      high = inside >> (kMargin + j) & 1 ? high : 0.f;
    }
  }
};

// How many times the busiest bank is read when all lanes read a word each. Of a source its `stride`, and how many
// planes `share` one.
inline int conflicts(const MarchCut& cut, int piece_pitch, int stride = 1, int share = 1) {
  std::array<int, 32> readers{};
  for (int p = 0; p < cut.planes / share; ++p)
    for (int s = 0; s < cut.strips; ++s) ++readers[(p * (piece_pitch / 4) + s * kStrip * stride) % 32];
  return *std::max_element(readers.begin(), readers.end());
}

// Fills in what follows from the strips and spans.
inline void set_lanes(MarchCut& cut) {
  cut.columns = cut.strips * kStrip;
  cut.by_spans = Divider(cut.spans), cut.by_strips = Divider(cut.strips);
}

// Lays the warps over the planes.
inline void choose_lanes(MarchCut& cut) {
  const MarchLanes lanes(cut.target_width, cut.channels);
  cut.spans = static_cast<int>(lanes.spans), cut.strips = static_cast<int>(lanes.strips);
  cut.planes = static_cast<int>(lanes.planes);
  cut.by_height = Divider(cut.target_height);
  set_lanes(cut);
}

// What a warp may have of shared memory.
inline int march_budget(const Device& device, int blocks = kMarchBlocks) {
  const int block = std::min(device.shared_per_multiprocessor / blocks - 1024, device.shared_per_block);
  return (block - 2 * kRowMargin) / kMarchWarps / kUnit * kUnit;
}

// Arranges groups of `count` rows, `columns` of a span, in shared memory.
inline void arrange(PlaneRows& rows, const MarchCut& cut, int columns, int count, bool whole, int stride = 1,
                    int share = 1) {
  rows.group_rows = count, rows.whole = whole, rows.together = whole || cut.spans == 1;
  if (whole) {
    rows.row_pitch = rows.row_bytes;
    rows.piece_pitch = static_cast<int>(rows.plane_bytes);
    rows.group_bytes = static_cast<int>(round_up(cut.planes * rows.plane_bytes + kUnit, kUnit));
    return;
  }
  rows.row_pitch = cut.spans == 1 ? rows.row_bytes
                                  : static_cast<int>(round_up(columns * 4 + kUnit - 4, kUnit)) + rows.row_bytes % kUnit;
  const int least = static_cast<int>(round_up(count * rows.row_pitch + kUnit - 4, kUnit));
  int best = 1 << 30;
  for (int pitch = least; pitch < least + 8 * kUnit; pitch += kUnit)
    if (const int now = conflicts(cut, pitch, stride, share); now < best) best = now, rows.piece_pitch = pitch;
  rows.group_bytes = cut.planes / share * rows.piece_pitch;
}

// The same for boxes, which lie dense: `columns` are whole units of 16 bytes. `more`: columns behind all rows of a
// plane.
inline void arrange_box(PlaneRows& rows, int planes, int columns, int count, int more = 0) {
  rows.group_rows = count, rows.whole = false, rows.together = true;
  rows.row_pitch = columns * 4, rows.piece_pitch = count * rows.row_pitch + more * 4;
  rows.group_bytes = static_cast<int>(round_up(planes * rows.piece_pitch, 128));
}

inline PlaneRows plane_rows(const View& view, int planes, int height, int width) {
  PlaneRows rows{};
  rows.base = static_cast<char*>(view.data), rows.planes = planes, rows.height = height, rows.width = width,
  rows.row_bytes = width * 4;
  rows.image_bytes = view.stride[0] * 4, rows.plane_bytes = int64_t{height} * width * 4;
  return rows;
}

}  // namespace dwconv
