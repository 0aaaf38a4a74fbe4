// Copies of 16-bit images between channels_last and contiguous planes, for kernels that need rows and compute so much
// that the copies cost little beside. A tile of pixels x channels goes through shared memory, so that both sides are
// read and written along what lies side by side.
#pragma once

#include "common.cuh"
#include "exchange.h"
#include "launch.h"
#include "overlap.cuh"

namespace dwconv {

constexpr int kTilePixels = 64, kTileChannels = 64, kRelayoutThreads = 256;

struct Relayout {
  uint16_t *pixels, *planes;                        // channels_last, and planes without gaps
  int64_t pixels_image, pixels_row, pixels_column;  // strides in elements
  int channels, size;                               // of an image; the pixels of a plane
  bool joined;                                      // whether rows of pixels have no gaps
  Divider by_width, by_channel_tiles, by_pixel_tiles;

  int64_t tiles() const { return int64_t{by_channel_tiles.divisor} * by_pixel_tiles.divisor; }  // of an image
};

// One or two of them for one kernel.
template <int kCount>
struct Relayouts {
  Relayout each[kCount];
  uint32_t blocks;  // of the first one
};

// A tile, in words of two pixels of a channel: 16 bytes, which are moved as one, lie where neither channels that are 8
// apart nor pieces of one channel meet in a bank.
struct RelayoutTile {
  alignas(16) uint32_t words[kTileChannels * kTilePixels / 2];

  __device__ static uint32_t place(uint32_t channel, uint32_t pair) {
    return channel * (kTilePixels / 2) + (pair ^ (channel / 8 ^ channel) % 8 * 4);
  }
  // Of the channel after, `k` of 8 from one on that is a multiple of 8.
  __device__ static uint32_t place_after(uint32_t place, uint32_t k) { return place ^ k * (kTilePixels / 2 + 4); }
};

// Channels of a pixel that are copied at once, in words of two.
template <int kVector>
struct PixelChannels;

template <>
struct PixelChannels<8> {
  using Vector = uint4;
  uint32_t words[4];

  PixelChannels() = default;
  __device__ explicit PixelChannels(uint4 v) : words{v.x, v.y, v.z, v.w} {}
  __device__ uint4 vector() const { return {words[0], words[1], words[2], words[3]}; }
};

template <>
struct PixelChannels<1> {
  using Vector = uint16_t;
  uint32_t words[1];

  PixelChannels() = default;
  __device__ explicit PixelChannels(uint16_t v) : words{v} {}
  __device__ uint16_t vector() const { return static_cast<uint16_t>(words[0]); }
};

template <bool kToPlanes, int kVector, int kCount>
__global__ void __launch_bounds__(kRelayoutThreads) relayout(const __grid_constant__ Relayouts<kCount> all) {
  constexpr uint32_t kSlots = kTileChannels / kVector, kPairs = kTilePixels / 2;
  using Vector = typename PixelChannels<kVector>::Vector;
  __shared__ RelayoutTile tile;
  uint32_t number = blockIdx.x;
  const bool is_second = kCount > 1 && number >= all.blocks;
  const Relayout& a = all.each[is_second ? kCount - 1 : 0];
  if (is_second) number -= all.blocks;
  const uint32_t first_channel = a.by_channel_tiles.split(number) * kTileChannels;
  const uint32_t first_pixel = a.by_pixel_tiles.split(number) * kTilePixels;
  const uint32_t channels = min(kTileChannels, a.channels - first_channel);
  const uint32_t pixels = min(kTilePixels, a.size - first_pixel);
  uint16_t* planes = a.planes + (static_cast<int64_t>(number) * a.channels + first_channel) * a.size + first_pixel;
  uint16_t* image = a.pixels + number * a.pixels_image + first_channel;

  // Calls visit(channel, pair, at) with what each thread copies of the image: at(k) is a pixel of a pair.
  const auto visit_pixels = [&](auto&& visit) {
#pragma unroll
    for (uint32_t k = 0; k < kSlots * kPairs / kRelayoutThreads; ++k) {
      const uint32_t i = threadIdx.x + k * kRelayoutThreads, channel = i % kSlots * kVector, pair = i / kSlots;
      if (channel >= channels || 2 * pair >= pixels) continue;
      const auto at = [&](uint32_t pixel) {
        uint32_t row = first_pixel + pixel;
        int64_t place = row * a.pixels_column;
        if (!a.joined) {
          const uint32_t column = a.by_width.split(row);
          place = row * a.pixels_row + column * a.pixels_column;
        }
        return reinterpret_cast<Vector*>(image + place + channel);
      };
      Vector* both[] = {at(2 * pair), at(min(2 * pair + 1, pixels - 1))};
      visit(channel, pair, both);
    }
  };
  const auto visit_planes = [&](auto&& visit) {
    if (a.size % 8 == 0) {  // then pieces of planes begin at multiples of 16 bytes
#pragma unroll
      for (uint32_t k = 0; k < kTileChannels * kTilePixels / 8 / kRelayoutThreads; ++k) {
        const uint32_t i = threadIdx.x + k * kRelayoutThreads;
        const uint32_t channel = i / (kTilePixels / 8), pixel = i % (kTilePixels / 8) * 8;
        if (channel < channels && pixel < pixels)
          visit(reinterpret_cast<uint4&>(tile.words[tile.place(channel, pixel / 2)]),
                reinterpret_cast<uint4&>(planes[static_cast<int64_t>(channel) * a.size + pixel]));
      }
      return;
    }
    const bool pairs = a.size % 2 == 0;  // then planes begin at even places, as tiles do
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < kTileChannels * kPairs; i += kRelayoutThreads) {
      const uint32_t channel = i / kPairs, pixel = i % kPairs * 2;
      if (channel >= channels || pixel >= pixels) continue;
      uint16_t* at = planes + static_cast<int64_t>(channel) * a.size + pixel;
      uint32_t& word = tile.words[tile.place(channel, pixel / 2)];
      if (pairs) {
        visit(word, *reinterpret_cast<uint32_t*>(at));
      } else {
        auto* halves = reinterpret_cast<uint16_t*>(&word);
        visit(halves[0], at[0]);
        if (pixel + 1 < pixels) visit(halves[1], at[1]);
      }
    }
  };
  let_next_kernel_start();
  wait_for_kernel_before();
  if constexpr (kToPlanes) {
    visit_pixels([&](uint32_t channel, uint32_t pair, Vector* const(&from)[2]) {
      // Read once: L2 is for what is written.
      const PixelChannels<kVector> first(__ldcs(from[0])), second(__ldcs(from[1]));
      const uint32_t place = tile.place(channel, pair);
#pragma unroll
      for (int k = 0; k < kVector; ++k)
        tile.words[tile.place_after(place, k)] =
            __byte_perm(first.words[k / 2], second.words[k / 2], k % 2 == 0 ? 0x5410 : 0x7632);
    });
    __syncthreads();
    visit_planes([](auto& in_tile, auto& in_plane) { in_plane = in_tile; });
  } else {
    visit_planes([](auto& in_tile, auto& in_plane) { in_tile = in_plane; });
    __syncthreads();
    visit_pixels([&](uint32_t channel, uint32_t pair, Vector* const(&to)[2]) {
      const uint32_t place = tile.place(channel, pair);
      PixelChannels<kVector> first, second;
#pragma unroll
      for (int k = 0; k < kVector; k += 2) {
        const uint32_t low = tile.words[tile.place_after(place, k)];
        const uint32_t high = kVector > 1 ? tile.words[tile.place_after(place, k + 1)] : 0;
        first.words[k / 2] = __byte_perm(low, high, 0x5410), second.words[k / 2] = __byte_perm(low, high, 0x7632);
      }
      __stwb(to[0], first.vector());  // as one
      if (2 * pair + 1 < pixels) __stwb(to[1], second.vector());
    });
  }
}

// The same to whole planes, of so few pixels that a block has all of them: 8 channels begin and end with units of 16
// bytes, which planes alone do not where their pixels are no multiple of 8.
constexpr int kVectorChannels = 8, kWholePixels = 256;

// Words of 8 channels in shared memory: behind them as many more that those of all slots lie in other banks.
__host__ __device__ inline uint32_t whole_pitch(uint32_t size) {
  return kVectorChannels / 2 * size + 4;
}
inline bool has_whole_planes(const Relayout& a) {
  return a.size % 2 == 0 && a.size % 8 > 0 && a.size <= kWholePixels;
}

template <int kCount>
__global__ void __launch_bounds__(kRelayoutThreads) relayout_whole(const __grid_constant__ Relayouts<kCount> all) {
  constexpr uint32_t kSlots = kTileChannels / kVectorChannels, kAtOnce = 4;
  static_assert(kSlots == kRelayoutThreads / 32);
  extern __shared__ uint4 whole_planes[];
  auto* words = reinterpret_cast<uint32_t*>(whole_planes);
  uint32_t number = blockIdx.x;
  const bool is_second = kCount > 1 && number >= all.blocks;
  const Relayout& a = all.each[is_second ? kCount - 1 : 0];
  if (is_second) number -= all.blocks;
  const uint32_t first_channel = a.by_channel_tiles.split(number) * kTileChannels, size = a.size;
  const uint32_t slots = min(kSlots, (a.channels - first_channel) / kVectorChannels), pitch = whole_pitch(size);
  let_next_kernel_start();
  wait_for_kernel_before();
  const uint16_t* image = a.pixels + number * a.pixels_image + first_channel;
  const uint32_t slot = threadIdx.x % kSlots;
  for (uint32_t first = threadIdx.x / kSlots; first < size / 2 && slot < slots;
       first += kAtOnce * kRelayoutThreads / kSlots) {
    uint4 pixels[kAtOnce][2];
#pragma unroll
    for (uint32_t k = 0; k < kAtOnce; ++k) {
      const uint32_t pair = min(first + k * kRelayoutThreads / kSlots, size / 2 - 1);
#pragma unroll
      for (uint32_t h = 0; h < 2; ++h) {
        uint32_t row = 2 * pair + h;
        int64_t place = row * a.pixels_column;
        if (!a.joined) {
          const uint32_t column = a.by_width.split(row);
          place = row * a.pixels_row + column * a.pixels_column;
        }
        pixels[k][h] = __ldcs(reinterpret_cast<const uint4*>(image + place) + slot);  // read once
      }
    }
#pragma unroll
    for (uint32_t k = 0; k < kAtOnce; ++k) {
      const uint32_t pair = first + k * kRelayoutThreads / kSlots;
      if (pair >= size / 2) break;
      const PixelChannels<kVectorChannels> one(pixels[k][0]), other(pixels[k][1]);
      uint32_t* to = words + slot * pitch + pair;
#pragma unroll
      for (int c = 0; c < kVectorChannels; ++c)
        to[c * size / 2] = __byte_perm(one.words[c / 2], other.words[c / 2], c % 2 == 0 ? 0x5410 : 0x7632);
    }
  }
  __syncthreads();
  const uint32_t warp = threadIdx.x / 32;
  if (warp >= slots) return;
  auto* to = reinterpret_cast<uint4*>(a.planes + (static_cast<int64_t>(number) * a.channels + first_channel) * size) +
             warp * size;
  const uint4* from = whole_planes + warp * (pitch / 4);
#pragma unroll 4
  for (uint32_t unit = threadIdx.x % 32; unit < size; unit += 32) to[unit] = from[unit];
}

// Planes have no gaps.
inline Relayout relayout_of(const View& pixels, const View& planes, int64_t channels, int64_t height, int64_t width) {
  Relayout a{};
  a.pixels = static_cast<uint16_t*>(pixels.data), a.planes = static_cast<uint16_t*>(planes.data);
  a.pixels_image = pixels.stride[0], a.pixels_row = pixels.stride[2], a.pixels_column = pixels.stride[3];
  a.channels = static_cast<int>(channels), a.size = static_cast<int>(height * width);
  a.joined = pixels.stride[2] == width * pixels.stride[3] || height == 1;
  a.by_width = Divider(width), a.by_channel_tiles = Divider(ceil_div(channels, kTileChannels));
  a.by_pixel_tiles = Divider(ceil_div(a.size, kTilePixels));
  return a;
}

// Whether 8 channels can be copied at once.
inline bool has_vectors(const View& pixels, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  int64_t places = 2 * channels | static_cast<int64_t>(reinterpret_cast<intptr_t>(pixels.data));
  if (batch > 1) places |= 2 * pixels.stride[0];
  if (height > 1) places |= 2 * pixels.stride[2];
  if (width > 1) places |= 2 * pixels.stride[3];
  return places % 16 == 0;
}

template <int kCount>
void launch_whole(const Relayouts<kCount>& a, int64_t blocks, cudaStream_t stream) {
  constexpr int64_t kSlots = kTileChannels / kVectorChannels;
  const int size = std::max(a.each[0].size, a.each[kCount - 1].size);
  launch_early(relayout_whole<kCount>, a, blocks, kRelayoutThreads, stream,
               {.shared_bytes = 4 * kSlots * whole_pitch(size)});
  check_launch("relayout_whole");
}

// Copies between images in channels_last, whose pixels and rows may lie apart, and planes without gaps.
template <bool kToPlanes>
void launch_relayout(const View& pixels, const View& planes, int64_t batch, int64_t channels, int64_t height,
                     int64_t width, cudaStream_t stream) {
  const Relayouts<1> a{{relayout_of(pixels, planes, channels, height, width)}, 0};
  if (kToPlanes && has_vectors(pixels, batch, channels, height, width) && has_whole_planes(a.each[0]))
    return launch_whole(a, batch * a.each[0].by_channel_tiles.divisor, stream);
  const auto kernel =
      has_vectors(pixels, batch, channels, height, width) ? relayout<kToPlanes, 8, 1> : relayout<kToPlanes, 1, 1>;
  launch_early(kernel, a, batch * a.each[0].tiles(), kRelayoutThreads, stream);
  check_launch("relayout");
}

// The bytes of a plane's rows that can be copied at once: 16, 8, 4 or 2.
inline int unit_of(const View& planes) {
  const int64_t all = static_cast<int64_t>(reinterpret_cast<uintptr_t>(planes.data)) | 2 * planes.stride[0] |
                      2 * planes.stride[1] | 2 * planes.stride[2] | 16;
  return static_cast<int>(all & -all);
}

// Whether both images of a problem are copied to planes, which can have rows and columns exchanged as well.
inline bool can_exchange(const Problem& p) {
  return !has_rows(p.input, p.width) && !has_rows(p.output, p.out_width) && p.input.stride[2] != 1 &&
         p.output.stride[2] != 1 && p.height > 1 && p.out_height > 1;
}

// Planes without gaps in scratch memory.
inline View new_planes(int64_t batch, int64_t channels, int64_t height, int64_t width, const Allocate& allocate) {
  return {allocate(2 * batch * channels * height * width), {channels * height * width, height * width, width, 1}};
}

// The same images with columns side by side: as they are, or copied to planes.
inline View to_planes(const View& images, int64_t batch, int64_t channels, int64_t height, int64_t width,
                      const Allocate& allocate, cudaStream_t stream) {
  if (has_rows(images, width)) return images;
  const View planes = new_planes(batch, channels, height, width, allocate);
  launch_relayout<true>(images, planes, batch, channels, height, width, stream);
  return planes;
}

// Copies both images of a problem to planes by one kernel, if both have to be, and by whole vectors.
inline void both_to_planes(Problem& p, const Allocate& allocate, cudaStream_t stream) {
  if (has_rows(p.input, p.width) || has_rows(p.output, p.out_width) ||
      !has_vectors(p.input, p.batch, p.channels, p.height, p.width) ||
      !has_vectors(p.output, p.batch, p.filters(), p.out_height, p.out_width))
    return;
  const View input = new_planes(p.batch, p.channels, p.height, p.width, allocate);
  const View output = new_planes(p.batch, p.filters(), p.out_height, p.out_width, allocate);
  Relayouts<2> a{{relayout_of(p.input, input, p.channels, p.height, p.width),
                  relayout_of(p.output, output, p.filters(), p.out_height, p.out_width)},
                 0};
  if (has_whole_planes(a.each[0]) && has_whole_planes(a.each[1])) {
    const auto blocks = [&](const Relayout& of) { return p.batch * of.by_channel_tiles.divisor; };
    a.blocks = static_cast<uint32_t>(blocks(a.each[0]));
    launch_whole(a, blocks(a.each[0]) + blocks(a.each[1]), stream);
  } else {
    const int64_t first = p.batch * a.each[0].tiles(), second = p.batch * a.each[1].tiles();
    a.blocks = static_cast<uint32_t>(first);
    launch_early(relayout<true, 8, 2>, a, first + second, kRelayoutThreads, stream);
    check_launch("relayout");
  }
  p.input = input, p.output = output;
}

}  // namespace dwconv
