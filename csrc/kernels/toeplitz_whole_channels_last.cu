// Forward and grad_input in channels_last in 16 bits, on tensor cores, of any kernel on images so small that the sums
// of all their rows are in registers.
//
// As in toeplitz_channels_last.cu, a row of the kernel is a band matrix for a channel, and a row of the source is added
// to all rows of the target by multiplications; but here every row of the target is under way all the time, and which
// row of the kernel it meets depends on the row of the source: all are in shared memory, between zeros.
//
// The band matrix is the left one, of 16 columns out by 16 columns in, and the pixels of 8 images are the right one. A
// step takes two rows of the source, for which a row of the kernel is read once: the second one adds it to the next row
// of the target.
//
// Outputs go through shared memory, several rows at once, from where they are stored as they lie side by side. Those
// that are not finite are computed again, tap by tap.
#include "toeplitz_channels_last.cuh"

namespace dwconv {
namespace {

// Stores rows that all threads have written: the first `rows` of what there is place for.
template <class Shape>
__device__ void store_rows(const Toeplitz& a, Share<Shape, true>& share, int rows) {
  typename Share<Shape, true>::Units units[Shape::kStages];
#pragma unroll
  for (int o = 0; o < Shape::kStages; ++o) {
    share.take(a.target, o * a.stage_bytes, units[o], o < rows);
  }
#pragma unroll
  for (int o = 0; o < Shape::kStages; ++o) {
    share.store(a.target, units[o], o < rows);
    share.next(a.target, o < rows);
  }
}

// Goes to the first row of group `image` of images, `first` or behind the last row of the one before.
template <class Shape>
__device__ void seek_group(const Toeplitz& a, Share<Shape, true>& share, int slab, int image, bool first) {
  if (!first && (image + 1) * a.target.height <= a.whole_rows)
    share.advance(a, a.target, -a.target.height);
  else
    share.seek(a, a.target, slab, 0, image, 0);
}

// Rows [begin, end) of all groups of images, from `slab` on.
template <typename T, class Shape>
__device__ void march(const Toeplitz& a, int slab, int, int begin, int end, uint32_t& parity) {
  constexpr int kRows = Shape::kRows, kChannels = Shape::kChannels, kStages = Shape::kStages;
  const uint32_t memory = kept_shared_address();
  FeedOf<Shape> feed(memory, slab, 0, begin, end);
  begin_rows<T, Shape>(a, feed, slab, 0, end, [] {});
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, number = lane / 4, pair = lane % 4 * 2;
  const int channel = slab + warp * kChannels;
  const uint32_t bands =
      memory + a.bands_at + warp * kChannels * Shape::kBandRows * Shape::kBandBytes + 8 * (kPairMiddle + pair - number);
  // The thread's pixels are pairs of columns of an image; its outputs are 8 columns apart, of a pair of images.
  const uint32_t from = memory + kRing + (number < a.streams ? number : 0) * a.source.stream_bytes +
                        Shape::place_of(pair) + warp * kChannels * 2 + (Shape::kShifted ? a.source.shift : 0);
  const uint32_t to =
      memory + a.stage_at + pair * a.target.stream_bytes + Shape::output_place_of(number) + warp * a.target.warp_bytes;
  const auto is_live = [&](int v) { return pair + v % 2 < a.streams; };
  // Zero, which a compiler does not know: of a copy, all four words would be copied before every multiplication.
  const uint32_t no_bits = __shfl_sync(~0u, lane, 0);

  Outputs<T, Shape> outputs(a, channel);
  Share<Shape, true> share(memory + a.stage_at);
  const auto arrive_step = [&] { arrive_together_at(memory + kBarrier, lane == 0); };
  const auto begin_step = [&] {
    wait_at(memory + kBarrier, parity);
    parity ^= 1;
  };
  int slot = 0, loaded = 0;  // of the next source rows in the ring, and of the next ones to load
  // Pixels of two rows, which a step multiplies when they were read in the step before.
  typename Shape::Pixel pixels[2][2][2];
  const bool both = Shape::reads_both(from);
  const auto load_pixels = [&] {
    const auto load = [&](auto&& read) {
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            read(pixels[k][h][j], from + slot + k * (a.slot_bytes / 2) + Shape::place_of(8 * h) + Shape::place_of(j));
    };
    if (both)
      load(Shape::read_both);
    else
      load(Shape::read_pixel);
    slot = next_place(slot, a.slot_bytes, a.ring_bytes);
  };
  wait_copies<Shape::kPending>();
  __syncthreads();
  load_pixels();
  arrive_step();
  for (int y = begin; y < end; y += a.target.height) {
    const Run r = run_of<Shape>(a, y, end);
    float sum[kRows][kChannels][4] = {};
    for (int row = 0; row < a.source.height; row += 2) {
      if (feed.is_between()) feed.find(a);
      begin_step();
      uint32_t x[2][kChannels][2];  // pairs of pixels of a row and the next one, if there is one
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const bool any = k == 0 || row + k < a.source.height;
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            constexpr int kOdd = Shape::kOdd;
            const auto word = [&](int j) { return pixels[k][h][j].words[(c + kOdd) / 2]; };
            x[k][c][h] = any ? __byte_perm(word(0), word(1), (c + kOdd) % 2 == 0 ? 0x5410 : 0x7632) : 0;
          }
        }
      load_pixels();
      // The rows behind the next ones.
      wait_copies<Shape::kPending - 1>();
      arrive_step();
      feed.load(a, loaded);
      const uint32_t row_bands = bands + row * Shape::kBandBytes;
#pragma unroll
      for (int i = 0; i <= kRows; ++i) {
        uint32_t band[kChannels][4];
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          const uint32_t band_at = row_bands + (c * Shape::kBandRows + i) * Shape::kBandBytes;
          const uint2 left = shared_at<uint2>(band_at);
          band[c][0] = left.x, band[c][1] = left.y, band[c][2] = shared_at<uint32_t>(band_at + 64);
          band[c][3] = left.x | no_bits;
        }
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            const int o = kRows - 1 - i + k;
            if (o >= 0 && o < kRows) multiply(sum[o][c], std::as_const(sum[o][c]), band[c], x[k][c], T{});
          }
      }
      feed.load_more(a, loaded);
      feed.next(a);
      commit_copies();
      loaded = next_place(loaded, a.slot_bytes, a.ring_bytes);
    }
    seek_group(a, share, slab, r.image, y == begin);
#pragma unroll
    for (int first = 0; first < kRows; first += kStages) {
      __syncthreads();  // what was there is stored
#pragma unroll
      for (int o = first; o < first + kStages; ++o)
        if (o < a.target.height) {
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            const int place = v % 2 * a.target.stream_bytes + v / 2 * Shape::output_place_of(8);
            outputs.write(to + (o - first) * a.stage_bytes + place, sum[o], v, is_live(v));
          }
        }
      __syncthreads();
      store_rows(a, share, min(kStages, a.target.height - first));
    }
  }
  begin_step();
  __syncthreads();  // the next part's zeros, and the outputs that are read now, come behind
  repair(a, outputs, channel, begin, end, [&](int v) { return OutputPlace{pair + v % 2, number + v / 2 * 8}; });
}

}  // namespace

bool launch_toeplitz_whole_channels_last(const Problem& p, cudaStream_t stream) {
  const Toeplitz a = arguments_of(p, kWholeLead);
  bool launched = false;
  visit_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      const auto launch_lie = [&](auto lie) {
        launched = launch<T, Shape<kMaxWholeRows, kWholeBlocks, false, decltype(lie)::value, true>>(a, stream);
      };
      if (a.source.shift == 0)
        launch_lie(Number<Lie::kUnits>{});
      else if (a.source.shift % 4 == 0)
        launch_lie(Number<Lie::kWords>{});
      else
        launch_lie(Number<Lie::kTwo>{});
    }
  });
  return launched;
}

}  // namespace dwconv
