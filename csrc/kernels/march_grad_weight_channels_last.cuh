// Rows of channels_last arrays, marching through a ring in shared memory: the loading part of
// march_grad_weight_channels_last.cu.
//
// A block owns a slab of neighbouring channels and a span of neighbouring columns, and goes down the rows of its part
// of the images. The rows to come are loaded while it computes: by warps that do nothing else, by cp.async, on sm_80
// and later; by plain loads of all threads before. Columns outside the image are never loaded: their place in the ring
// is zero from the beginning. On sm_90 and later one instruction loads a row where it can be described as a box, with
// zeros for what is outside.
#pragma once

#include "boxes.cuh"
#include "stream.cuh"

namespace dwconv {
namespace {

// An array (N, height, width, channels) whose channels lie side by side, and how a block has it in shared memory.
struct Pixels {
  const char* base;
  int64_t image_bytes, row_bytes;
  int pixel_bytes;  // from one pixel to the next
  int bytes;        // of a pixel, all channels
  int slab_bytes;   // of a pixel, the channels of a block
  int unit;         // bytes that are copied at once: 16, 8, 4 or 2
  // How far behind units of 16 bytes an array without gaps begins that is joined, or all of whose pixels begin as far
  // behind one: a slab then takes one unit more, and begins as far behind one in shared memory. `base` is where the
  // first unit begins.
  int shift;
  int pitch, columns;  // in shared memory: from one pixel to the next, and pixels of a row
  // Of these, how many are zeros before those that a box brings, if rows are boxes: for what lies beside the image it
  // would take as long as for pixels. Bytes from the beginning of a row to the first column, to where the box begins,
  // of the box, if there is one, and of all that it does not bring.
  int columns_before, box_columns;
  int first_at, box_at, box_bytes, beside_bytes;
  // An array without gaps whose pixels fit no units: a row is copied as one run of units of 16 bytes and has the same
  // place within 16 bytes in shared memory. Beside the image lie then not zeros, but what is of the rows around, or
  // nothing.
  bool joined;
  const char *begin, *end;  // of the array, if it has no gaps

  // What is not joined after all is copied by its small units, from where it begins.
  void set_joined(bool value) {
    joined = value;
    if (!joined && unit < kUnit) base += shift, shift = 0;
  }
  int ring_row_bytes(bool boxes) const {
    return static_cast<int>(
        round_up(first_at + int64_t{pitch} * columns + (joined ? kUnit : 0), boxes ? kBoxUnit : kUnit));
  }
};

// How far behind the beginning of its place in shared memory a row begins that lies `offset` bytes into the array.
__device__ inline int phase_of(const Pixels& p, uint32_t offset) {
  return p.joined ? offset % kUnit : 0;
}

// Fills in how an array lies in memory.
inline Pixels pixels_of(const View& view, int64_t batch, int64_t channels, int64_t height, int64_t width,
                        int64_t element) {
  Pixels p{};
  p.base = p.begin = static_cast<const char*>(view.data);
  p.image_bytes = view.stride[0] * element, p.row_bytes = view.stride[2] * element;
  p.pixel_bytes = static_cast<int>(view.stride[3] * element), p.bytes = static_cast<int>(channels * element);
  const int64_t row = width * channels, between = p.image_bytes | p.row_bytes | p.pixel_bytes | p.bytes;
  const auto unit_of = [](int64_t all) {
    int unit = kUnit;
    while (all % unit != 0) unit /= 2;
    return unit;
  };
  const bool dense = view.stride[3] == channels && (height == 1 || view.stride[2] == row) &&
                     (batch == 1 || view.stride[0] == height * row);
  const int behind = static_cast<int>(reinterpret_cast<uintptr_t>(view.data) % kUnit);
  p.unit = unit_of(between | behind);
  constexpr int kSmallUnit = 4;  // larger ones are copied fast enough
  if (dense && p.unit < kUnit && unit_of(between) == kUnit) p.unit = kUnit, p.shift = behind;
  p.joined = dense && p.unit <= kSmallUnit;
  if (p.joined) p.shift = behind;
  p.base -= p.shift;
  p.end = p.begin + batch * height * row * element;
  return p;
}

// Fills in what a block has of it: `columns`, of which the first `before` and those behind the image, `width` columns
// later, are zeros. Strips begin `step` columns apart; unless rows are boxes, a warp that reads several of them at once
// finds them in different banks.
inline void cut_pixels(Pixels& p, int64_t slab_bytes, int columns, int before, int width, int step, bool boxes) {
  p.slab_bytes = static_cast<int>(slab_bytes), p.columns = columns;
  // Boxes of pixels that end within a sector of memory take longer, but a sector more is too much for a line of 128
  // bytes.
  const int unit = boxes && p.shift > 0 && slab_bytes > 128 ? 2 * kUnit : p.unit;
  p.pitch = p.joined ? p.pixel_bytes : static_cast<int>(round_up(slab_bytes + p.shift, unit));
  if (!boxes && !p.joined && p.pitch < 128 && p.pitch * step % 128 == 0) p.pitch += kUnit;
  const bool box = boxes && !p.joined;
  p.columns_before = box ? before : 0, p.box_columns = std::min(columns - p.columns_before, width);
  p.box_at = static_cast<int>(round_up(int64_t{p.pitch} * p.columns_before, kBoxUnit));
  p.first_at = p.box_at - p.pitch * p.columns_before, p.box_bytes = box ? p.pitch * p.box_columns : 0;
  p.beside_bytes = p.ring_row_bytes(boxes) - p.box_bytes;
}

// Whether a row of it can be a box: threads that read several strips at once, which boxes cannot spread, find them in
// different banks.
inline bool fits_box(const Pixels& p, int step, int64_t element) {
  return p.joined || (std::max<int64_t>(p.pitch / element, p.box_columns) <= kMostBoxSide &&
                      (p.pitch >= 128 || p.pitch * step % 128 != 0));
}

// Describes boxes of a block's part of rows, from where the first unit begins. Pixels that begin between units overlap
// then: to each belongs what lies before its channels in their first unit.
inline bool describe_rows(CUtensorMap& map, const Pixels& p, int64_t batch, int64_t height, int64_t width,
                          int element) {
  return describe_boxes(map, const_cast<char*>(p.base), element, {(p.bytes + p.shift) / element, width, height, batch},
                        {p.pixel_bytes, p.row_bytes, p.image_bytes}, {p.pitch / element, p.box_columns, 1, 1});
}

#if __CUDA_ARCH__ >= 900
constexpr bool kLoaderWarps = true, kBoxes = true;
#elif __CUDA_ARCH__ >= 800
constexpr bool kLoaderWarps = true, kBoxes = false;
#else
constexpr bool kLoaderWarps = false, kBoxes = false;
#endif

constexpr int kMaxStages = 8;  // of a ring

// What stages of the ring are waited for with. All lie at the beginning of shared memory.
struct StageBarriers {
  static constexpr int kBytes = 16 * kMaxStages;
  static __device__ int full(int stage) { return 8 * stage; }                 // its rows have arrived
  static __device__ int done(int stage) { return 8 * (kMaxStages + stage); }  // all warps that compute are done with it

  static __device__ void init(int loaders, int warps, bool boxes) {
    if (threadIdx.x > 0) return;
    for (int i = 0; i < kMaxStages; ++i)
      init_barrier(full(i), boxes ? loaders : 2 * loaders), init_barrier(done(i), warps * kWarpArrivals);
  }
  // Each thread that loads arrives twice: now, for what it stored itself, and when its copies under way are there. The
  // barrier knows of boxes.
  static __device__ void arrive_full(int stage, bool boxes) {
    if (!boxes) arrive_after_copies(full(stage));
    arrive(full(stage));
  }
};

// A thread's part in loading rows of a block's slab and span, one after the other. It is thread `rank` of `threads`.
class RowLoader {
 public:
  __device__ RowLoader(const Pixels& p, int slab, int first_column, int width, int rank, int threads)
      : rank_(rank), threads_(threads) {
    offset_ = int64_t{first_column} * p.pixel_bytes + (p.joined ? p.shift : 0);
    if (p.joined) return;
    const int begin = max(first_column, 0), pixels = max(min(first_column + p.columns, width) - begin, 0);
    units_ = (min(p.slab_bytes, p.bytes - slab * p.slab_bytes) + p.shift + p.unit - 1) / p.unit;
    lanes_ = min(units_, threads), step_ = threads / lanes_;
    part_ = rank % lanes_;
    const int pixel = rank / lanes_;
    pixels_ = pixel < step_ ? max(pixels - pixel + step_ - 1, 0) / step_ : 0;
    to_ = (begin - first_column + pixel) * p.pitch + part_ * p.unit;
    offset_ = int64_t{begin + pixel} * p.pixel_bytes + slab * p.slab_bytes + part_ * p.unit;
  }

  // Goes to a row of an image; rows may lie outside, but cannot be loaded there.
  __device__ void seek(const Pixels& p, int image, int row) {
    from_ = p.base + (image * p.image_bytes + row * p.row_bytes + offset_);
  }
  __device__ void next(const Pixels& p) { from_ += p.row_bytes; }

  // Begins to load the row to offset `to` in shared memory.
  __device__ void load(const Pixels& p, int to) const {
    const char* from = from_;
    if (p.joined) {
      const int phase = phase_of(p, static_cast<uint32_t>(from - p.base));
      return copy_run(to, from - phase, p.columns * p.pitch + phase, p.begin, p.end, rank_, threads_);
    }
    to += to_;
    for (int part = part_; part < units_; part += lanes_) {
      switch (p.unit) {
        case 16:
          if (p.shift == 0 || is_inside(p, from))
            load_units<16>(p, to, from);
          else
            load_shifted(p, to, from);
          break;
        case 8: load_units<8>(p, to, from); break;
        case 4: load_units<4>(p, to, from); break;
        default: load_units<2>(p, to, from);
      }
      to += lanes_ * p.unit, from += lanes_ * p.unit;
    }
  }

 private:
  int rank_, threads_;
  int units_, lanes_, step_;  // units of a pixel; threads that load a pixel together; pixels that are loaded together
  int part_, pixels_;         // the thread's first unit, and of how many pixels it loads one
  int to_;
  int64_t offset_;
  const char* from_;

  // Whether all of the thread's units of a row are of the array alone, as they are but at its beginning and end.
  __device__ bool is_inside(const Pixels& p, const char* from) const {
    return from >= p.begin && from + pixels_ * (int64_t{step_} * p.pixel_bytes) + kUnit <= p.end;
  }

  __device__ void load_shifted(const Pixels& p, int to, const char* from) const {
#pragma unroll 1
    for (int left = pixels_; left > 0; --left) {
      copy_run(to, from, kUnit, p.begin, p.end, 0, 1);
      to += step_ * p.pitch, from += int64_t{step_} * p.pixel_bytes;
    }
  }

  template <int kBytes>
  __device__ void load_units(const Pixels& p, int to, const char* from) const {
    const int to_step = step_ * p.pitch;
    const int64_t from_step = int64_t{step_} * p.pixel_bytes;
    const auto load_pixels = [&](auto count) {
      constexpr int kPixels = decltype(count)::value;
      if constexpr (kBytes > 2) {
#pragma unroll
        for (int i = 0; i < kPixels; ++i) copy_unit<kBytes>(shared_address(to + i * to_step), from + i * from_step);
      } else {  // not copies under way, so several loads at a time
        uint16_t values[kPixels];
#pragma unroll
        for (int i = 0; i < kPixels; ++i) values[i] = *reinterpret_cast<const uint16_t*>(from + i * from_step);
#pragma unroll
        for (int i = 0; i < kPixels; ++i) shared<uint16_t>(to + i * to_step) = values[i];
      }
      to += kPixels * to_step, from += kPixels * from_step;
    };
    int pixels = pixels_;
    for (; pixels >= 8; pixels -= 8) load_pixels(std::integral_constant<int, 8>{});
    if (pixels & 4) load_pixels(std::integral_constant<int, 4>{});
    if (pixels & 2) load_pixels(std::integral_constant<int, 2>{});
    if (pixels & 1) load_pixels(std::integral_constant<int, 1>{});
  }
};

// Begins to load a row of a joined array, `offset` bytes into it, by a bulk copy, in one thread; what lies before the
// first and behind the last whole unit of the array is stored. The barrier knows of the copy.
__device__ inline void load_run(const Pixels& p, int to, int64_t offset, int barrier) {
  offset += p.shift;
  const int64_t size = p.end - p.base, whole = size / kUnit * kUnit, head = p.shift > 0 ? kUnit : 0;
  const int64_t first = offset & -kUnit, begin = max(first, head);
  const int64_t end = (offset + p.columns * p.pitch + kUnit - 1) & -kUnit;
  to -= static_cast<int>(first);
  if (const int bytes = static_cast<int>(min(end, whole) - begin); bytes > 0) {
    expect_bytes(barrier, bytes);
    copy_bulk(shared_address(to + static_cast<int>(begin)), p.base + begin, bytes, barrier);
  }
  if (first >= head && end <= whole) return;
  const auto copy = [&](int64_t from, int64_t to_end) {
    for (int64_t at = from; at < to_end; at += 2)
      shared<uint16_t>(to + static_cast<int>(at)) = *reinterpret_cast<const uint16_t*>(p.base + at);
  };
  if (first < head) copy(p.shift, min(head, size));
  if (end > whole) copy(max(begin, whole), size);
  before_bulk_copies();  // of later rows, to the same place
}

// Two neighbouring channels of a pixel.
__device__ inline void read_pair(int at, float (&pair)[2], float) {
  const float2 both = shared<float2>(at);
  pair[0] = both.x, pair[1] = both.y;
}
template <typename T>
__device__ void read_pair(int at, float (&pair)[2], T) {
  widen_pair(shared<uint32_t>(at), pair[0], pair[1], T{});
}

}  // namespace
}  // namespace dwconv
