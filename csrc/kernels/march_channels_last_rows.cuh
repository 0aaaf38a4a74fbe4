// Rows of channels_last arrays on their way to a ring in shared memory: the loading part of march_channels_last.cuh.
//
// A block owns a slab of neighbouring channels and a span of neighbouring columns. It goes down the rows of its part of
// the images, and the rows to come are loaded while it computes: by bulk copies on sm_90 and later, by cp.async on
// sm_80 and later, by plain loads before.
#pragma once

#include "channels_last.cuh"

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
  // How far behind units of 16 bytes all pixels of an array without gaps begin, if nothing else keeps them from being
  // copied so: a slab then takes one unit more, and begins as far behind one in shared memory. `base` is where the
  // first unit begins.
  int shift;
  int pitch, columns;  // in shared memory: from one pixel to the next, and pixels of a row
  // An array without gaps whose pixels fit no units: a row is copied as one run of units of 16 bytes and has the same
  // place within 16 bytes in shared memory. Beside the image lie then not zeros, but what is of the rows around.
  bool joined;
  // Whether a block has a slab of each pixel of such an array by bulk copies, which begin with the unit that the slab
  // begins in. In shared memory slabs, too, lie at the same place within 16 bytes, and so far apart that none shares a
  // unit with another.
  bool apart;
  // Whether rows of shifted pixels are copied as one run of units, too: where a block has all channels, and they are
  // too few for a copy of each pixel. There are zeros beside the image, but for what the first and the last unit have
  // of the pixels around, until that is cleared.
  bool row_runs;
  const char *begin, *end;  // of the array, if it has no gaps
  // Units of a slab's pixel; pixels that threads load together, and the steps to the next ones.
  int units, together, from_step, to_step;
  Divider by_units;

  int ring_row_bytes() const {
    return static_cast<int>(round_up(int64_t{pitch} * columns + (joined || apart || row_runs ? kUnit - 1 : 0), kUnit));
  }
};

// How far behind the beginning of its place in shared memory a row begins, given where it lies in memory.
__device__ inline int phase_of(const Pixels& p, uint32_t address) {
  return p.joined ? address % kUnit : 0;
}

// Fills a ring with zeros if there are columns outside the image, which are never loaded.
__device__ inline void clear_ring(const Pixels& p, int first_column, int width, int to, int bytes) {
  const bool whole = first_column >= 0 && first_column + p.columns <= width;
  if (!whole && !p.joined)
    for (int i = threadIdx.x * kUnit; i < bytes; i += blockDim.x * kUnit) shared<uint4>(to + i) = {};
}

// Fills those columns alone, of all rows of a ring that come in units of 16 bytes, by the first `threads` threads.
__device__ inline void clear_columns(const Pixels& p, int first_column, int width, int to, int row_bytes, int bytes,
                                     int threads) {
  if (first_column >= 0 && first_column + p.columns <= width) return;
  const int before = (max(-first_column, 0) * p.pitch) & -kUnit;
  const int more = p.row_runs ? kUnit : 0;  // that a run takes up behind its last pixel
  const int behind = (min(p.columns, width - first_column) * p.pitch + more) & -kUnit;
  const int size = before + row_bytes - behind;
  for (; bytes > 0; bytes -= row_bytes, to += row_bytes)
    for (int i = threadIdx.x * kUnit; i < size; i += threads * kUnit)
      shared<uint4>(to + (i < before ? i : i - before + behind)) = {};
}

// A thread's part in loading rows of a block's slab and span, one after the other. Rows outside the image cannot be
// loaded.
class RowLoader {
 public:
  // `slab`: offset of the block's channels in a pixel.
  __device__ RowLoader(const Pixels& p, int slab, int first_column, int width) {
    offset_ = static_cast<int64_t>(first_column) * p.pixel_bytes + slab;
    if (p.joined) return;
    uint32_t column = threadIdx.x;
    const int part = p.by_units.split(column) * p.unit, pixel = static_cast<int>(column);
    const int before = max(-first_column, 0), columns = min(p.columns, width - first_column) - before;
    if (pixel < p.together && pixel < columns && part < p.bytes - slab + p.shift)
      count_ = (columns - pixel - 1) / p.together + 1;
    to_ = (before + pixel) * p.pitch + part;
    offset_ += static_cast<int64_t>(before + pixel) * p.pixel_bytes + part;
  }

  // Goes to a row of an image that begins so many bytes behind the first one.
  __device__ void seek(const Pixels& p, int64_t image, int row) {
    from_ = p.base + (image + row * p.row_bytes + offset_);
  }
  __device__ void next(const Pixels& p) { from_ += p.row_bytes; }

  // Begins to load the row to offset `to` in shared memory.
  __device__ void load(const Pixels& p, int to) const {
    if (p.joined) return load_run(p, to);
    switch (p.unit) {
      case 16: return p.shift == 0 || is_inside(p) ? load_units<16>(p, to) : load_shifted(p, to);
      case 8: return load_units<8>(p, to);
      case 4: return load_units<4>(p, to);
      default: return load_units<2>(p, to);
    }
  }

 private:
  int count_ = 0;  // of the thread's pixels
  int to_ = 0;
  int64_t offset_;
  const char* from_;

  template <int kBytes>
  __device__ void load_units(const Pixels& p, int to) const {
    const char* from = from_;
    int left = count_;
    to += to_;
#pragma unroll 1
    for (; left > 1; left -= 2) {
      copy_unit<kBytes>(shared_address(to), from);
      copy_unit<kBytes>(shared_address(to + p.to_step), from + p.from_step);
      to += 2 * p.to_step, from += 2 * p.from_step;
    }
    if (left > 0) copy_unit<kBytes>(shared_address(to), from);
  }

  // Whether all of the thread's units of a row are of the array alone, as they are but at its beginning and end.
  __device__ bool is_inside(const Pixels& p) const {
    return from_ >= p.begin && from_ + static_cast<int64_t>(count_) * p.from_step + kUnit <= p.end;
  }

  __device__ void load_shifted(const Pixels& p, int to) const {
    const char* from = from_;
    to += to_;
#pragma unroll 1
    for (int left = count_; left > 0; --left, to += p.to_step, from += p.from_step)
      copy_run(to, from, kUnit, p.begin, p.end, 0, 1);
  }

  __device__ void load_run(const Pixels& p, int to) const {
    const int phase = phase_of(p, static_cast<uint32_t>(reinterpret_cast<uintptr_t>(from_)));
    copy_run(to, from_ - phase, p.columns * p.pitch + phase, p.begin, p.end, threadIdx.x, blockDim.x);
  }
};

// A warp begins to copy some bytes of an array from `from` on to shared memory, to the same place within 16 bytes:
// units of 16 bytes of the array alone by a bulk copy, and what it has before the first and behind the last one by the
// lanes. `to`: where the unit lies that they begin in.
__device__ inline void load_bytes(const Pixels& p, int to, const char* from, int bytes, int barrier) {
  const auto number = [](const char* pointer) { return reinterpret_cast<uint64_t>(pointer); };
  constexpr uint64_t kRest = kUnit - 1;
  const int lane = threadIdx.x % 32;
  const uint64_t begin = number(from) & ~kRest, end = number(from) + bytes;
  const uint64_t first = (number(p.begin) + kRest) & ~kRest, last = number(p.end) & ~kRest;
  const uint64_t low = max(begin, first), high = min((end + kRest) & ~kRest, last);
  if (lane == 0 && low < high) {
    const int size = static_cast<int>(high - low);
    expect_bytes(barrier, size);
    copy_bulk(shared_address(to + static_cast<int>(low - begin)), reinterpret_cast<const char*>(low), size, barrier);
  }
  const auto copy = [&](uint64_t at) {
    shared<uint16_t>(to + static_cast<int>(at - begin)) = *reinterpret_cast<const uint16_t*>(at);
  };
  if (const uint64_t at = max(last, number(p.begin)) + 2 * lane; at < min(end, number(p.end))) copy(at);
  if (begin < first)
    if (const uint64_t at = number(p.begin) + 2 * lane; at < min(min(first, last), end)) copy(at);
  __syncwarp();
}

// The same as RowLoader by bulk copies, which one warp begins: one for a pixel, or for a row of pixels without gaps.
class BulkLoader {
 public:
  // `runs`: whether pixels without gaps are one copy.
  __device__ BulkLoader(const Pixels& p, int slab, int first_column, int width, bool runs = true) {
    before_ = max(-first_column, 0);
    pixels_ = min(p.columns, width - first_column) - before_;
    bytes_ = min(p.slab_bytes, p.bytes - slab);
    if (runs && p.pixel_bytes == bytes_) bytes_ *= pixels_, pixels_ = 1;
    to_ = before_ * p.pitch;
    offset_ = static_cast<int64_t>(first_column + before_) * p.pixel_bytes + slab;
  }

  __device__ void seek(const Pixels& p, int64_t image, int row) {
    from_ = p.base + (image + row * p.row_bytes + offset_);
  }
  __device__ void next(const Pixels& p) { from_ += p.row_bytes; }

  __device__ void load(const Pixels& p, int to, int barrier) const {
    if (is_elected()) {
      expect_bytes(barrier, pixels_ * bytes_);
      uint32_t at = shared_address(to + to_);
      const char* from = from_;
#pragma unroll 4
      for (int i = 0; i < pixels_; ++i, at += p.pitch, from += p.pixel_bytes) copy_bulk(at, from, bytes_, barrier);
    }
    __syncwarp();
  }

 protected:
  int before_, pixels_, bytes_, to_;  // columns before the image; copies of a row, and where the first one leads
  int64_t offset_;
  const char* from_;
};

// Of shifted pixels, a unit more of each, or of a row.
class ShiftedLoader : public BulkLoader {
 public:
  __device__ ShiftedLoader(const Pixels& p, int slab, int first_column, int width)
      : BulkLoader(p, slab, first_column, width, p.row_runs) {
    bytes_ += kUnit;
    last_ = min(p.columns, width - first_column) * p.pitch;
  }

  __device__ void load(const Pixels& p, int to, int barrier) const {
    // All units of a row are of the array alone, but at its beginning and end.
    if (from_ >= p.begin && from_ + (pixels_ - 1) * static_cast<int64_t>(p.pixel_bytes) + bytes_ <= p.end)
      return BulkLoader::load(p, to, barrier);
#pragma unroll 1
    for (int i = 0; i < pixels_; ++i)
      load_bytes(p, to + to_ + i * p.pitch, from_ + i * static_cast<int64_t>(p.pixel_bytes), bytes_, barrier);
  }

  // Makes zeros of what the first and the last unit of a row run at offset `to` have of the pixels around, by 16 lanes.
  __device__ void clear_beside(const Pixels& p, int to) const {
    constexpr int kSize = sizeof(uint16_t), kElements = kUnit / kSize;
    const int lane = threadIdx.x % (2 * kElements), at = lane % kElements * kSize;
    const bool first = lane < kElements;
    if (first == (at < p.shift)) shared<uint16_t>(to + (first ? to_ : last_) + at) = 0;
  }

 private:
  int last_;  // where the last unit of a row leads that comes as one run
};

// Of pixels that fit no units: a row as one run, or slabs of as many units each, wherever they begin.
class JoinedLoader : public BulkLoader {
 public:
  __device__ JoinedLoader(const Pixels& p, int slab, int first_column, int width)
      : BulkLoader(p, slab, first_column, width) {
    if (p.joined) bytes_ = p.columns * p.pitch, offset_ = static_cast<int64_t>(first_column) * p.pixel_bytes;
  }

  __device__ void load(const Pixels& p, int to, int barrier) const {
    if (p.joined) return load_bytes(p, to, from_, bytes_, barrier);
    constexpr uint32_t kRest = kUnit - 1;
    const auto phase_at = [](const char* at) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(at)) & kRest; };
    to += to_ + phase_at(from_ - before_ * static_cast<int64_t>(p.pixel_bytes));
    const int bytes = static_cast<int>((p.slab_bytes + 2 * kRest) & ~kRest);
    const char* from = from_;
    if (from < p.begin + kRest || from + (pixels_ - 1) * static_cast<int64_t>(p.pixel_bytes) + bytes > p.end) {
#pragma unroll 1
      for (int i = 0; i < pixels_; ++i, to += p.pitch, from += p.pixel_bytes)
        load_bytes(p, to & ~kRest, from, bytes_, barrier);
      return;
    }
    if (is_elected()) {
      expect_bytes(barrier, pixels_ * bytes);
      uint32_t at = shared_address(to);
#pragma unroll 4
      for (int i = 0; i < pixels_; ++i, at += p.pitch, from += p.pixel_bytes)
        copy_bulk(at & ~kRest, from - phase_at(from), bytes, barrier);
    }
    __syncwarp();
  }
};

// Weights of a block on their way to shared memory, which one warp begins: whole units by a bulk copy, what is before
// and behind them by its lanes, an element each, which they have meanwhile.
class TapsLoader {
 public:
  // `shift`: bytes that they begin behind a unit, there and here.
  __device__ TapsLoader(const char* from, int to, int bytes, int shift) : from_(from), to_(to) {
    constexpr int kSize = sizeof(uint16_t), kElements = kUnit / kSize;
    const int lane = threadIdx.x % 32;
    head_ = min((kUnit - shift) % kUnit, bytes), tail_ = head_ + ((bytes - head_) & -kUnit);
    at_ = lane < kElements ? lane * kSize : tail_ + (lane - kElements) * kSize;
    own_ = lane < 2 * kElements && at_ < (lane < kElements ? head_ : bytes);
  }

  __device__ void begin(int barrier) {
    if (threadIdx.x % 32 == 0 && head_ < tail_) {
      expect_bytes(barrier, tail_ - head_);
      copy_bulk(shared_address(to_ + head_), from_ + head_, tail_ - head_, barrier);
    }
    if (own_) element_ = *reinterpret_cast<const uint16_t*>(from_ + at_);
  }

  __device__ void finish(int barrier) const {
    if (own_) shared<uint16_t>(to_ + at_) = element_;
    arrive_together(barrier, threadIdx.x % 32 == 0);
  }

 private:
  const char* from_;
  int to_, head_, tail_, at_;  // where units begin, and what is behind them; the lane's element
  bool own_;                   // whether it has one
  uint16_t element_ = 0;
};

// Fills in how an array lies in memory.
inline Pixels pixels_of(const View& view, int64_t element, int64_t channels, int64_t height, int64_t width,
                        int64_t batch) {
  Pixels p{};
  p.base = p.begin = static_cast<const char*>(view.data);
  p.image_bytes = view.stride[0] * element, p.row_bytes = view.stride[2] * element;
  p.pixel_bytes = static_cast<int>((width == 1 ? channels : view.stride[3]) * element);
  p.bytes = static_cast<int>(channels * element);
  const int64_t row = width * channels;
  const bool dense = (width == 1 || view.stride[3] == channels) && (height == 1 || view.stride[2] == row) &&
                     (batch == 1 || view.stride[0] == height * row);
  p.end = p.base + batch * height * row * element;
  p.unit = alignment_of(view, element, channels, height, width, batch);
  if (dense && p.unit < kUnit && alignment_between(view, element, channels, height, width, batch) == kUnit)
    p.shift = static_cast<int>(reinterpret_cast<uintptr_t>(view.data) % kUnit), p.base -= p.shift, p.unit = kUnit;
  p.joined = dense && p.unit < kUnit;
  return p;
}

// Fills in what a block of `threads` has of it, at least as many as there are units in a pixel. Pixels are as far apart
// in shared memory as in the array but for a multiple of `line` bytes: bulk copies are faster whose bytes have the same
// place in a line in both.
inline void cut_pixels(Pixels& p, int64_t slab_bytes, int64_t columns, int threads, int line, bool apart) {
  const int bytes = static_cast<int>(slab_bytes) + (p.shift > 0 && !p.row_runs ? kUnit : 0);
  p.slab_bytes = static_cast<int>(slab_bytes), p.columns = static_cast<int>(columns);
  p.pitch = p.row_runs || line <= kUnit ? bytes : bytes + (p.pixel_bytes - bytes % line + line) % line;
  p.joined = p.joined && slab_bytes == p.bytes, p.apart = apart;
  if (apart) p.pitch = static_cast<int>(round_up(slab_bytes + kUnit - 1, kUnit)) + kUnit + p.pixel_bytes % kUnit;
  while (slab_bytes < p.bytes && slab_bytes % p.unit != 0) p.unit /= 2;
  p.units = bytes / p.unit, p.together = std::max(threads / p.units, 1);
  p.from_step = p.together * p.pixel_bytes, p.to_step = p.together * p.pitch;
  p.by_units = Divider(p.units);
}

}  // namespace
}  // namespace dwconv
