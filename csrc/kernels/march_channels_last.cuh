// The march of march_channels_last.cu. A block owns a slab of channels, a span of columns and a share of the rows of
// all images, and goes down these, with some rows on their way to a ring in shared memory. A thread keeps the sums of
// all output rows under way, adds each source row to those that it reaches, and stores the oldest.
#pragma once

#include <type_traits>

#include "march_channels_last_pixels.cuh"
#include "overlap.cuh"

namespace dwconv {
namespace {

// Rows of float as boxes, one instruction each, which one thread of a warp begins: with zeros beside the image.
class BoxLoader {
 public:
  __device__ BoxLoader(const March& a, int slab, int column) : channel_(slab / 4), column_(column) {}

  __device__ void seek(int image, int row) { image_ = image, row_ = row; }
  __device__ void next() { ++row_; }

  __device__ void load(const March& a, int to, int barrier) const {
    if (is_elected()) {
      expect_bytes(barrier, a.source.columns * a.source.pitch);
      copy_box(to, a.map, channel_, column_, row_, image_, barrier);
    }
    __syncwarp();
  }

 private:
  int channel_, column_, image_, row_;
};

// Source rows of a block on their way to the ring.
template <class Tile, class Loader>
class Feed {
  static constexpr bool kBoxes = std::is_same_v<Loader, BoxLoader>;

  __device__ static Loader loader_of(const March& a, int slab, int column) {
    if constexpr (kBoxes)
      return Loader(a, slab, column);
    else
      return Loader(a.source, slab, column, a.width);
  }

 public:
  __device__ Feed(const March& a, int slab, int column, int begin, int end)
      : loader_(loader_of(a, slab, column)), begin_(begin), end_(end) {}

  // Finds the next row. Returns whether there is one.
  __device__ bool find(const March& a) {
    while (left_ <= 0 && begin_ < end_) {
      const Run r = run_of<Tile>(a, begin_, end_);
      begin_ += r.end - r.begin;
      left_ = r.row_end - r.row;
      if constexpr (kBoxes)
        loader_.seek(r.image, r.row);
      else
        loader_.seek(a.source, image_of<Tile>(a, r.image).source, r.row);
    }
    return left_ > 0;
  }

  // Begins to load a group of rows.
  template <typename... Barrier>
  __device__ void load(const March& a, Barrier... barrier) {
    for (int i = 0; i < a.group && find(a); ++i) {
      if constexpr (kBoxes)
        loader_.load(a, kRing + slot_, barrier...), loader_.next();
      else
        loader_.load(a.source, kRing + slot_, barrier...), loader_.next(a.source);
      --left_;
      slot_ += a.slot_bytes;
      if (slot_ == a.ring_bytes) slot_ = 0;
    }
  }

  // Clears what is beside the rows of a group.
  __device__ void clear_beside(const March& a, int stage) const {
    for (int i = threadIdx.x % 32 / 16; i < a.group; i += 2)
      loader_.clear_beside(a.source, kRing + (stage * a.group + i) * a.slot_bytes);
  }

 private:
  Loader loader_;
  int begin_, end_;          // rows of units that no source row was loaded for
  int left_ = 0, slot_ = 0;  // source rows of the run, and the next one's place in the ring
};

// The outputs of a filter in a strip of rows [begin, end) by the taps that meet the image. For kernels with a tap
// that is Inf or NaN, which must not meet padding.
template <typename T, class Tile>
__device__ __noinline__ void strip_by_taps(const March& a, int begin, int end, int filter, int column) {
  const T* weight = static_cast<const T*>(a.weight) + filter * a.fan_in * a.weight_filter;
  const int x_end = min((column + Tile::kStrip) * Tile::kPair - a.skew_w, a.target_width);
  uint32_t channel = filter;
  a.by_fan_out.split(channel);
  for (; begin < end; ++begin) {
    uint32_t image = begin;
    int y_begin = static_cast<int>(a.by_units.split(image)) * Tile::kPair - a.skew_h;
    if (Tile::kHalves) y_begin = 2 * y_begin + image % 2, image /= 2;
    constexpr int kRows = Tile::kHalves ? 2 : 1;  // from one that an array's `row_bytes` lead to to the next
    for (int y = max(y_begin, 0); y < min(y_begin + Tile::kPair, a.target_height); ++y)
      for (int x = max(column * Tile::kPair - a.skew_w, 0); x < x_end; ++x) {
        float sum = a.bias ? widen(static_cast<const T*>(a.bias)[filter * a.bias_stride]) : 0.f;
        const auto row_of = [&](int i) {
          const int row = y + a.padding_h - i;
          if (Tile::kSpread) return row % 2 == 0 ? row / 2 : -1;
          return y * Tile::kStride - a.padding_h + i * Tile::kDilation;
        };
        const auto column_of = [&](int j) {
          const int column = x + a.padding_w - j;
          if (Tile::kSpread) return column % 2 == 0 ? column / 2 : -1;
          return x * Tile::kStride - a.padding_w + j * Tile::kDilation;
        };
        const char* from = a.source.begin + image * a.source.image_bytes;
        for (int q = 0; q < a.fan_in; ++q)
          sum = sum_of_taps(sum, reinterpret_cast<const T*>(from) + channel * a.fan_in + q, a.source.row_bytes / kRows,
                            a.source.pixel_bytes, Tile::kHalves ? a.rows : a.height, a.width,
                            weight + q * a.weight_filter, a.weight_row, a.weight_column, Tile::kKernelH, Tile::kKernelW,
                            row_of, column_of);
        char* to = a.target + image * a.target_image_bytes + y * (a.target_row_bytes / kRows) +
                   static_cast<int64_t>(x) * a.target_pixel_bytes;
        reinterpret_cast<T*>(to)[filter] = narrow<T>(sum);
      }
  }
}

// Waits for the others of so many threads of a block, whole warps.
__device__ inline void sync_warps(int threads) {
  __syncwarp();
  asm volatile("barrier.sync.aligned 1, %0;" ::"r"(threads) : "memory");
}

// Lets them go on as for sync_warps, and does not wait.
__device__ inline void arrive_warps(int threads) {
  __syncwarp();
  asm volatile("barrier.arrive.aligned 1, %0;" ::"r"(threads) : "memory");
}

// Waits, too. Returns whether `value` is true for all of them.
__device__ inline bool all_of(int threads, bool value) {
  int all;
  __syncwarp();
  asm volatile(
      "{\n"
      ".reg .pred mine, all;\n"
      "setp.ne.s32 mine, %2, 0;\n"
      "barrier.red.and.pred.aligned all, 1, %1, mine;\n"
      "selp.s32 %0, 1, 0, all;\n"
      "}"
      : "=r"(all)
      : "r"(threads), "r"(static_cast<int>(value))
      : "memory");
  return all;
}

// The warp that loads prepares the barriers.
__device__ inline void init_barriers(int warps) {
  if (threadIdx.x % 32 == 0)
    for (int i = 0; i < kGroups; ++i)
      init_barrier(Barriers::full(i), kWarpArrivals), init_barrier(Barriers::done(i), warps * kWarpArrivals),
          init_barrier(kCopiesBarrier + 8 * i, kWarpArrivals);
  if (threadIdx.x % 32 == 0) init_barrier(kTapsBarrier, kWarpArrivals);
  before_bulk_copies();
  __syncwarp();
}

// Bulk copies the last warp begins, or the first one (see Tile::kLoading). The others then wait for each other only
// where rows of outputs leave by bulk copies, too.
template <typename T, class Tile, Way way>
__global__ void __launch_bounds__(way != Way::kThreads ? Tile::kBulkThreads : Tile::kMaxThreads, Tile::kBlocks)
    march_channels_last(const __grid_constant__ March a) {
  constexpr bool kBulk = way != Way::kThreads, kShifted = way == Way::kShifted, kJoined = way == Way::kJoined;
#if __CUDA_ARCH__ < 900
  if constexpr (kBulk) return;
#endif
  constexpr int kChannels = Tile::kChannels, kFan = Tile::kFan, kStrip = Tile::kStrip, kLive = Tile::kLive;
  constexpr int kPair = Tile::kPair, kStep = Tile::kStep, kDilation = Tile::kDilation;
  constexpr int kRowDilation = Tile::kRowDilation;
  // Whether two channels may lie in no word: of the source, or of the target.
  constexpr bool kSplits = !kBulk && kChannels == 2 && !Tile::kTwins;
  constexpr bool kStages = !kBulk || kJoined;  // whether outputs of a warp may go by way of shared memory
  constexpr int kSize = sizeof(T), kWidth = kStrip * kPair, kTaps = Tile::kKernelH * Tile::kKernelW;

  const bool stages = kStages && a.warp_strips > 0;
  uint32_t worker = blockIdx.x, strip = stages ? threadIdx.x % 32 : threadIdx.x;
  const int slab = a.by_slabs.split(worker) * a.lanes;
  const int first_column = a.by_spans.split(worker) * a.strips * kStrip;
  const int begin = a.shares.begin(worker), end = a.shares.begin(worker + 1);
  int lane = a.by_lanes.split(strip);
  bool live = true;
  if (stages) {
    live = strip < a.warp_strips;
    strip = threadIdx.x / 32 * a.warp_strips + (live ? strip : 0);
    live = live && strip < a.strips;
    if (!live) strip = threadIdx.x / 32 * a.warp_strips, lane = 0;
  }
  if (kBulk && threadIdx.x >= a.threads) live = false, strip = 0, lane = 0;
  live = live && (slab + lane) * kChannels < a.filters;
  if (!live) lane = 0;
  const int filter = (slab + lane) * kChannels;
  const auto source_of = [&](int target) {  // the first source channel of a filter
    uint32_t channel = target;
    a.by_fan_out.split(channel);
    return static_cast<int>(channel) * kFan;
  };
  const int slab_channel = source_of(slab * kChannels);
  const int source_column = first_column * kStep - a.lead_w;

  const int warps = (a.threads + 31) / 32;  // without the one that loads
  const int taps_at = kRing + a.ring_bytes + (kStages ? warps * a.stage_bytes : 0) + 2 * a.row_bytes,
            taps_shift = kShifted ? a.taps_shift : 0;
  const bool bulk_taps = kBulk && Tile::kBulkTaps && a.taps_bytes > 0;
  using Loader =
      std::conditional_t<!kBulk, RowLoader,
                         std::conditional_t<Tile::kBoxes, BoxLoader,
                                            std::conditional_t<kShifted, ShiftedLoader,
                                                               std::conditional_t<kJoined, JoinedLoader, BulkLoader>>>>;
  Feed<Tile, Loader> feed(a, slab_channel * kSize, source_column, begin, end);
  const bool loads = kBulk && (Tile::kLoading > 0 ? threadIdx.x >= 32 * warps : threadIdx.x < 32);
  // Whether the warp that loads clears what comes with rows of shifted pixels beside the image, or others mask it:
  // where rows take little time, or there is little to mask, that is less than others would wait.
  constexpr bool kClears = kShifted && Tile::kLoading > 0 && Tile::kFan == 1 && Tile::kKernelW > 1;
  const bool clears = kClears && a.source.row_runs;
  // Loads a group of rows, if there are more.
  const auto load_group = [&](uint32_t i) {
    if (!feed.find(a)) return false;
    const int stage = i % kGroups, barrier = clears ? kCopiesBarrier + 8 * stage : Barriers::full(stage);
    if (i >= kGroups) wait(Barriers::done(stage), (i / kGroups - 1) % 2);
    if constexpr (kBulk) feed.load(a, barrier);
    arrive_together(barrier, threadIdx.x % 32 == 0);
    return true;
  };
  // Clears what is beside a group when it is there, and hands it to the others.
  const auto clear_group = [&](uint32_t i) {
    const int stage = i % kGroups;
    wait(kCopiesBarrier + 8 * stage, i / kGroups % 2);
    if constexpr (kClears) feed.clear_beside(a, stage);
    before_bulk_copies();
    arrive_together(Barriers::full(stage), threadIdx.x % 32 == 0);
  };
  if constexpr (kBulk) {
    if (loads) {
      if (Tile::kBoxes && threadIdx.x == 0) prefetch(a.map);
      init_barriers(warps);
      if (Tile::kLoading > 0) arrive_warps(blockDim.x);
      feed.find(a);
      settle_and_wait_for_kernel_before(a.group);
      let_next_kernel_start();
      const int first = slab * kChannels, count = min(a.lanes * kChannels, a.filters - first);
      constexpr int kTapBytes = kFan * kTaps * kSize;  // of a filter
      TapsLoader taps(a.taps + first * kTapBytes, taps_at + taps_shift, count * kTapBytes, taps_shift);
      if (bulk_taps) taps.begin(kTapsBarrier);
      if (Tile::kLoading > 0) {
        // A group is waited for when the next but one is asked for: later, others would wait for it.
        constexpr uint32_t kBehind = 2;
        uint32_t loaded = 0;
        for (uint32_t i = 0;; ++i) {
          const bool any = load_group(i);
          loaded += any;
          if (bulk_taps && i == 0) taps.finish(kTapsBarrier);
          if (!any && !clears) break;
          if (!clears || i < kBehind) continue;
          if (i - kBehind >= loaded) break;
          clear_group(i - kBehind);
        }
        return;
      }
      load_group(0);
      if (bulk_taps) taps.finish(kTapsBarrier);
      load_group(1);
    }
    if (!Tile::kBoxes && !(kJoined && a.source.joined))
      clear_columns(a.source, source_column, a.width, kRing, a.slot_bytes, a.ring_bytes, 32 * warps);
    sync_warps(blockDim.x);
    wait_for_kernel_before();
    let_next_kernel_start();
  } else {
    if (a.source.unit == kUnit) {
      clear_columns(a.source, source_column, a.width, kRing, a.slot_bytes, a.ring_bytes, blockDim.x);
    } else {
      clear_ring(a.source, source_column, a.width, kRing, a.ring_bytes);
      __syncthreads();
    }
    feed.find(a);
    settle_and_wait_for_kernel_before(a.group);
    let_next_kernel_start();
    for (int i = 0; i < kGroups - 1; ++i) feed.load(a), commit_copies();
  }

  float weight[kFan * kChannels][Tile::kKernelH][Tile::kKernelW] = {};
  float bias[kChannels] = {};
  bool finite = true;  // then a product with a zero is a zero
  const auto take_weights = [&](auto&& tap) {
#pragma unroll
    for (int c = 0; c < kFan * kChannels; ++c)
#pragma unroll
      for (int i = 0; i < Tile::kKernelH; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kKernelW; ++j) weight[c][i][j] = widen(tap(c, i, j));
  };
  if (bulk_taps) wait(kTapsBarrier, 0);
  if (live) {
    if (bulk_taps) {
      const bool backwards = a.weight_column < 0;
      const T* first = &shared<T>(taps_at + taps_shift) + lane * kChannels * kFan * kTaps + (backwards ? kTaps - 1 : 0);
      const int step = backwards ? -1 : 1;
      take_weights([&](int c, int i, int j) { return first[c * kTaps + (i * Tile::kKernelW + j) * step]; });
    } else {
      const T* first = static_cast<const T*>(a.weight) + filter * kFan * a.weight_filter;
      take_weights(
          [&](int c, int i, int j) { return first[c * a.weight_filter + i * a.weight_row + j * a.weight_column]; });
    }
    float zero = 0;
#pragma unroll
    for (int c = 0; c < kFan * kChannels; ++c)
#pragma unroll
      for (int i = 0; i < Tile::kKernelH; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kKernelW; ++j) zero = fmaf(weight[c][i][j], 0.f, zero);
    finite = zero == 0.f;
    if (a.bias)
#pragma unroll
      for (int c = 0; c < kChannels; ++c) bias[c] = widen(static_cast<const T*>(a.bias)[(filter + c) * a.bias_stride]);
  }

  // What has to be computed again is stored again, which nothing would order behind a bulk copy.
  bool rows_leave = false;
  if constexpr (kBulk && Tile::kLeaves) rows_leave = a.row_bytes > 0 && all_of(32 * warps, finite);

  // Sums of the rows of units under way, the oldest first. Rows of either parity have sums of their own where there is
  // dilation, if they are not images of their own, and so have both rows of a pair.
  constexpr int kSets = Tile::kSpread ? 2 : kRowDilation;
  float sum[kSets][kLive][kWidth][kChannels] = {};
  const auto begins = [&](int c) { return Tile::kSpread ? 0.f : bias[c]; };
  const auto clear = [&](int set) {
#pragma unroll
    for (int o = 0; o < kLive; ++o)
#pragma unroll
      for (int v = 0; v < kWidth; ++v)
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sum[set][o][v][c] = begins(c);
  };
  const auto roll = [&](int set) {
#pragma unroll
    for (int o = 0; o < kLive; ++o)
#pragma unroll
      for (int v = 0; v < kWidth; ++v)
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          sum[set][o][v][c] = o + 1 < kLive ? sum[set][o + 1][v][c] : begins(c);
          asm volatile("" : "+f"(sum[set][o][v][c]));  // or else other rows would wait for moves, too
        }
  };

  const int pitch = a.source.pitch;
  const uint32_t base = kept(shared_address(0));
  const bool first_lane = kept(threadIdx.x % 32) == 0;
  const uint32_t place = base + kRing + static_cast<int>(strip) * kStrip * kStep * pitch +
                         (source_of(filter) - slab_channel) * kSize + a.source.shift;
  int pitches[Tile::kColumns];
#pragma unroll
  for (int j = 0; j < Tile::kColumns; ++j) {
    pitches[j] = j * pitch;
    // Opaque, so that each is added to a row's address, not one to the other: it pays where there is less to multiply.
    if constexpr (!Tile::kSkips) asm("" : "+r"(pitches[j]));
  }
  const int column = first_column + static_cast<int>(strip) * kStrip;
  const int x0 = column * kStep - a.lead_w;        // where the strip begins in the source
  const int target_x = column * kPair - a.skew_w;  // and in the target
  const bool inside = x0 >= 0 && x0 + Tile::kColumns <= a.width;
  bool inner = (kBulk && !kJoined) || !a.source.joined || inside;  // or else it has to mask
  if constexpr (kShifted) {
    // What is of other pixels before the row and behind it: what a unit has before a channel's place, or behind.
    const int before = (source_of(filter) + kChannels * kFan) * kSize + a.source.shift - a.source.bytes;
    const int behind = kUnit - a.source.shift - source_of(filter) * kSize;
    inner =
        kClears || !a.source.row_runs || ((x0 >= 0 || before <= 0) && (x0 + Tile::kColumns <= a.width || behind <= 0));
  }
  const uint32_t phases =
      a.source.joined || a.source.apart ? kUnit - 1 : 0;  // how far behind its place a row may begin: see phase_of
  const bool whole = live && target_x >= 0 && target_x + kWidth <= a.target_width;
  // Rows of outputs that leave together, as far as they lie inside the image.
  const int row_pitch = a.lanes * kChannels * kSize;
  const int row_place = static_cast<int>(strip) * kWidth * row_pitch + lane * kChannels * kSize;
  const int row_x = first_column * kPair - a.skew_w;
  const int row_before = max(-row_x, 0);
  const int row_columns = min(a.strips * kWidth, a.target_width - row_x) - row_before;
  const int64_t row_offset =  // of the thread's pixels in the row
      (static_cast<int64_t>(strip) * kWidth - row_before) * a.target_pixel_bytes + lane * kChannels * kSize;
  const int row_part = min(row_pitch, (a.filters - slab * kChannels) * kSize);
  Stage stage{};
  if (stages) {
    stage = stage_of<T, Tile>(a, threadIdx.x, target_x, live);
    if constexpr (kChannels == 3)
      stage.strip = kept(stage.strip), stage.first = kept(stage.first), stage.end = kept(stage.end);
  }
  int slot = 0, fresh = 0;            // the next row in the ring; how many rows of its group are left
  uint32_t groups = 0;                // that have been waited for
  int buffer = kRing + a.ring_bytes;  // for the next row of outputs
  for (int at = begin; at < end;) {
    const Run t = run_of<Tile>(a, at, end);
    const int count = t.end - t.begin;
    const Image image = image_of<Tile>(a, t.image);
    char* to = a.target +
               (image.target + (t.begin * kPair - a.skew_h) * a.target_row_bytes +
                static_cast<int64_t>(target_x - stage.before) * a.target_pixel_bytes + (stages ? 0 : filter * kSize));

    const auto store = [&](int y, const float (&values)[kWidth][kChannels]) {
      char* pixel = to;
      to += a.target_row_bytes;
      if ((Tile::kSpread || Tile::kHalves) && static_cast<uint32_t>(y) >= static_cast<uint32_t>(image.target_height))
        return;
      if (kBulk && Tile::kLeaves && rows_leave) {
        // Two buffers: the first warp sees to it that the other one is free before anybody may go on to it.
        if (live)
#pragma unroll
          for (int v = 0; v < kWidth; ++v) write_pixel<T>(&shared<char>(buffer + row_place + v * row_pitch), values[v]);
        before_bulk_copies();
        if (threadIdx.x < 32) wait_stores();
        sync_warps(32 * warps);
        if (threadIdx.x < 32)
          store_row(a, pixel - row_offset, buffer + row_before * row_pitch, row_pitch, row_columns, row_part);
        buffer = buffer == kRing + a.ring_bytes ? buffer + a.row_bytes : kRing + a.ring_bytes;
        return;
      }
      if (stages) {
        if constexpr (kChannels != 3) {  // worked out for every row: not worth registers of all kernels
          uint32_t thread;
          asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
          stage = stage_of<T, Tile>(a, thread, target_x, live);
        }
        store_staged<T, Tile>(a, stage, pixel, live, values);
      } else if (whole && kSplits && a.split_stores) {
#pragma unroll
        for (int v = 0; v < kWidth; ++v, pixel += a.target_pixel_bytes) write_elements<T>(pixel, values[v]);
      } else if (whole) {
#pragma unroll
        for (int v = 0; v < kWidth; ++v, pixel += a.target_pixel_bytes) write_pixel<T>(pixel, values[v]);
      } else if (live) {
#pragma unroll
        for (int v = 0; v < kWidth; ++v, pixel += a.target_pixel_bytes)
          if (static_cast<uint32_t>(target_x + v) < static_cast<uint32_t>(a.target_width)) {
            if (kSplits && a.split_stores)
              write_elements<T>(pixel, values[v]);
            else
              write_pixel<T>(pixel, values[v]);
          }
      }
    };

    // Rows above the image leave the sums as they begin, and there are outputs to store when all are under way.
    const int first_row = t.begin * kStep - image.lead_h;
    const int above = min((t.row - first_row) / Tile::kRowsPerStep, kLive - 1);
    if (above > 0)
#pragma unroll
      for (int set = 0; set < kSets; ++set) clear(set);
    uint32_t lies = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(a.source.base)) +
                    static_cast<uint32_t>(image.source) + t.row * static_cast<uint32_t>(a.source.row_bytes) +
                    source_column * a.source.pixel_bytes + slab_channel * kSize;
    // The next row, counted from the first one inside the image: a number that changes is not worked out again for
    // every row.
    int next = first_row + above * Tile::kRowsPerStep - t.row;
    const uint32_t inside = max(t.row_end - t.row, 0), outputs = count;
    for (int done = (above - (kLive - 1)) * kRowDilation; done < count; done += kRowDilation) {
#pragma unroll
      for (int u = 0; u < Tile::kRowsPerStep; ++u) {
        const int set = kStep == 1 ? u : 0;  // not spread
        if (static_cast<uint32_t>(next++) < inside) {
          if (fresh == 0) {
            if (slot == a.ring_bytes) slot = 0;
            if constexpr (kBulk) {
              arrive_together_at(base + Barriers::done((groups - 1) % kGroups), first_lane, groups > 0);
              wait_at(base + Barriers::full(groups % kGroups), groups / kGroups % 2);
              ++groups;
              if (Tile::kLoading == 0 && loads) load_group(groups + 1);
            } else {
              wait_copies<kGroups - 2>();
              __syncthreads();
              feed.load(a);
              commit_copies();
            }
            fresh = a.group;
          }
          --fresh;
          uint32_t from = place + slot;
          if (!kBulk || kJoined) from += lies & phases, lies += static_cast<uint32_t>(a.source.row_bytes);
          slot += a.slot_bytes;
          // The row of units whose sums are the oldest, and whether those of others are ever stored.
          const int oldest = done + (kStep == 1 ? u : 0);
          const auto wanted = [&](int o) {
            return static_cast<uint32_t>(oldest + o * kRowDilation) < static_cast<uint32_t>(count);
          };
          const bool all_wanted = !Tile::kSkips || (wanted(0) && wanted(kLive - 1));
          const auto read = [&](int q, float (&x)[Tile::kColumns][kChannels]) {
            if constexpr (Tile::kSkips) asm volatile("" ::: "memory");  // each of two ways reads as it multiplies
            bool have = false;
            if constexpr (kChannels == 3)
              if (a.fours) read_fours<T>(from, x), have = true;
            if (!have)
#pragma unroll
              for (int j = 0; j < Tile::kColumns; ++j)
                if constexpr (Tile::kTwins) {
                  float both[1];
                  read_pixel<T>(from + pitches[j], both);
                  x[j][0] = x[j][1] = both[0];
                } else if constexpr (kShifted && kChannels == 2) {
                  read_elements<T>(from + pitches[j], x[j]);
                } else if constexpr (kSplits) {
                  if (a.split)
                    read_elements<T>(from + pitches[j], x[j]);
                  else
                    read_pixel<T>(from + pitches[j], x[j]);
                } else {
                  read_pixel<T>(from + pitches[j] + q * kSize, x[j]);
                }
            if (!inner)
#pragma unroll
              for (int j = 0; j < Tile::kColumns; ++j)
                if (static_cast<uint32_t>(x0 + j) >= static_cast<uint32_t>(a.width))
#pragma unroll
                  for (int c = 0; c < kChannels; ++c) x[j][c] = 0;
          };
#pragma unroll
          for (int q = 0; q < kFan; ++q) {
            const auto add = [&](const float (&x)[Tile::kColumns][kChannels], int s, int o, int v, int i, int j, int at,
                                 bool first) {
#pragma unroll
              for (int c = 0; c < kChannels; ++c) {
                const bool youngest = Tile::kSpread ? i + 2 >= Tile::kKernelH : o + 1 == kLive;
                const float before = !first || q > 0 ? sum[s][o][v][c] : youngest ? begins(c) : sum[s][o + 1][v][c];
                sum[s][o][v][c] = fmaf(x[at][c], weight[kFan > 1 ? q : c][i][j], before);
              }
            };
            // A column of taps in a row of units under way.
            const auto add_column = [&](const float (&x)[Tile::kColumns][kChannels], int o, int j) {
              const int i = (kLive - 1 - o) * kStep + (kStep == 1 ? 0 : u);
              if (i >= Tile::kKernelH) return;
#pragma unroll
              for (int v = 0; v < kStrip; ++v)
                add(x, set, o, v, i, j, v * kStep + j * kDilation, j == 0 && (kStep == 1 || u == 0));
            };
            if (all_wanted) {
              float x[Tile::kColumns][kChannels];
              read(q, x);
              if constexpr (Tile::kSpread) {
#pragma unroll
                for (int j = 0; j < Tile::kKernelW; ++j)
#pragma unroll
                  for (int i = 0; i < Tile::kKernelH; ++i)
#pragma unroll
                    for (int v = 0; v < kStrip; ++v)
                      add(x, i % 2, i / 2, 2 * v + j % 2, i, j, v + (Tile::kExtentW - 1) - j / 2, j < 2);
              } else {
#pragma unroll
                for (int j = 0; j < Tile::kKernelW; ++j)
#pragma unroll
                  for (int o = 0; o < kLive; ++o) add_column(x, o, j);
              }
            } else if constexpr (Tile::kSkips) {
              float x[Tile::kColumns][kChannels];
              read(q, x);
#pragma unroll
              for (int o = 0; o < kLive; ++o)
                if (wanted(o))
#pragma unroll
                  for (int j = 0; j < Tile::kKernelW; ++j) add_column(x, o, j);
            }
          }
        } else if (kStep == 1 || u == 0) {
          roll(set);
          if (Tile::kSpread) roll(1);
        }
        if (kStep > 1 && u > 0) continue;
        if (static_cast<uint32_t>(done + u) >= outputs) continue;
#pragma unroll
        for (int e = 0; e < kPair; ++e) store((t.begin + done) * kPair + e - a.skew_h, sum[kPair > 1 ? e : set][0]);
      }
    }
    at += count;
  }
  if (kBulk && Tile::kLeaves && rows_leave && threadIdx.x < 32) wait_stores();
  if (live && !finite)
    for (int c = 0; c < kChannels; ++c) strip_by_taps<T, Tile>(a, begin, end, filter + c, column);
}

}  // namespace
}  // namespace dwconv
