// A tile of pixels x channels goes through shared memory, so that both sides are read and written along what lies side
// by side. Of pixels that begin between multiples of 16 bytes whole units are read all the same. Few channels, of which
// a tile would have room for many more, go straight.
#include "relayout.h"

#include <algorithm>

#include "common.cuh"
#include "overlap.cuh"
#include "shifted_units.cuh"

namespace dwconv {
namespace {

constexpr int kTilePixels = 64, kTileChannels = 64, kThreads = 256;

struct Relayout {
  uint16_t *pixels, *planes;                        // channels_last, and planes without gaps between rows
  int64_t pixels_image, pixels_row, pixels_column;  // strides in elements
  int64_t planes_image, planes_channel;             // likewise
  int channels, size, width;                        // of an image; the pixels of a plane; the image's columns
  const uint16_t* pixels_end;                       // of all images
  uint32_t inner_images;                            // between the first and the last one, where units are the array's
  int before;      // elements between a multiple of 16 bytes and the first pixel, if all pixels begin so
  bool joined;     // whether rows of pixels have no gaps
  uint32_t pairs;  // of neighbouring pixels, of all images, if threads have one each
  Divider by_width, by_channel_tiles, by_pixel_tiles, by_pairs;

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
  __device__ PixelChannels or_zeros(bool inside) const { return PixelChannels(inside ? vector() : uint4{}); }
};

template <>
struct PixelChannels<1> {
  using Vector = uint16_t;
  uint32_t words[1];

  PixelChannels() = default;
  __device__ explicit PixelChannels(uint16_t v) : words{v} {}
  __device__ uint16_t vector() const { return static_cast<uint16_t>(words[0]); }
  __device__ PixelChannels or_zeros(bool inside) const { return PixelChannels(inside ? vector() : uint16_t{0}); }
};

// Where they are, which is some place in the array if they are not inside of the image.
template <typename Vector>
struct Pixel {
  Vector* at;
  bool is_inside;
};

// What there is of a unit in an array.
__device__ __noinline__ uint4 load_part(const uint16_t* unit, const uint16_t* begin, const uint16_t* end) {
  uint32_t words[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const auto element = [&](const uint16_t* at) -> uint32_t { return at >= begin && at < end ? *at : uint16_t{0}; };
    words[k] = element(unit + 2 * k) | element(unit + 2 * k + 1) << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

// What is read once, by whole lines of memory.
__device__ inline uint4 load_once(const uint4* from) {
  uint4 unit;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(unit.x), "=r"(unit.y), "=r"(unit.z), "=r"(unit.w)
               : "l"(from)
               : "memory");
  return unit;
}
__device__ inline uint16_t load_once(const uint16_t* from) {
  return __ldcs(from);
}

// Channels of a pixel. `kRaw`: 8 of them from any place on, from the units that they lie in. What lies beside the array
// is not read.
template <bool kRaw, typename Vector>
__device__ Vector load_channels(const Relayout& a, uint32_t image, const Vector* from) {
  if constexpr (!kRaw) {
    return load_once(from);
  } else {
    const uint16_t* first = reinterpret_cast<const uint16_t*>(from) - a.before;
    const auto load = [&](const uint16_t* unit) {
      if (image - 1 >= a.inner_images && (unit < a.pixels || unit + 8 > a.pixels_end))
        return load_part(unit, a.pixels, a.pixels_end);
      return __ldcs(reinterpret_cast<const uint4*>(unit));
    };
    const uint4 low = load(first), high = load(first + 8);
    const uint32_t bits = a.before % 2 * 16;
    return a.before < 2   ? shifted<0>(low, high, bits)
           : a.before < 4 ? shifted<1>(low, high, bits)
           : a.before < 6 ? shifted<2>(low, high, bits)
                          : shifted<3>(low, high, bits);
  }
}

template <bool kToPlanes, int kVector, int kCount, bool kRaw>
__global__ void __launch_bounds__(kThreads) relayout(const __grid_constant__ Relayouts<kCount> all) {
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
  uint16_t* planes = a.planes + number * a.planes_image + first_channel * a.planes_channel + first_pixel;
  uint16_t* image = a.pixels + number * a.pixels_image + first_channel;

  // Calls visit(channel, pair, at) with what each thread copies of the image: at(k) is a pixel of a pair.
  const auto visit_pixels = [&](auto&& visit) {
#pragma unroll
    for (uint32_t k = 0; k < kSlots * kPairs / kThreads; ++k) {
      const uint32_t i = threadIdx.x + k * kThreads, channel = i % kSlots * kVector, pair = i / kSlots;
      if (channel >= channels || 2 * pair >= pixels) continue;
      Pixel<Vector> both[2];
#pragma unroll
      for (uint32_t h = 0; h < 2; ++h) {
        uint32_t row = first_pixel + min(2 * pair + h, pixels - 1);
        int64_t place = row * a.pixels_column;
        both[h].is_inside = 2 * pair + h < pixels;
        if (!a.joined) {
          const uint32_t column = a.by_width.split(row), last = a.width - 1;
          place = row * a.pixels_row + min(column, last) * a.pixels_column;
          both[h].is_inside = both[h].is_inside && column <= last;
        }
        both[h].at = reinterpret_cast<Vector*>(image + place + channel);
      }
      visit(channel, pair, both);
    }
  };
  const auto visit_planes = [&](auto&& visit) {
    if (a.planes_channel % 8 == 0) {  // then pieces of planes begin at multiples of 16 bytes
#pragma unroll
      for (uint32_t k = 0; k < kTileChannels * kTilePixels / 8 / kThreads; ++k) {
        const uint32_t i = threadIdx.x + k * kThreads;
        const uint32_t channel = i / (kTilePixels / 8), pixel = i % (kTilePixels / 8) * 8;
        if (channel < channels && pixel + 8 <= pixels)
          visit(reinterpret_cast<uint4&>(tile.words[tile.place(channel, pixel / 2)]),
                reinterpret_cast<uint4&>(planes[channel * a.planes_channel + pixel]));
      }
      if (pixels % 8 > 0) {  // behind the last whole piece
        for (uint32_t i = threadIdx.x; i < channels * 8; i += kThreads) {
          const uint32_t channel = i / 8, pixel = pixels / 8 * 8 + i % 8;
          if (pixel >= pixels) continue;
          visit(reinterpret_cast<uint16_t*>(&tile.words[tile.place(channel, pixel / 2)])[pixel % 2],
                planes[channel * a.planes_channel + pixel]);
        }
      }
      return;
    }
    const bool pairs = a.size % 2 == 0;  // then planes begin at even places, as tiles do
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < kTileChannels * kPairs; i += kThreads) {
      const uint32_t channel = i / kPairs, pixel = i % kPairs * 2;
      if (channel >= channels || pixel >= pixels) continue;
      uint16_t* at = planes + channel * a.planes_channel + pixel;
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
    visit_pixels([&](uint32_t channel, uint32_t pair, const Pixel<Vector>(&from)[2]) {
      const PixelChannels<kVector> low(load_channels<kRaw>(a, number, from[0].at)),
          high(load_channels<kRaw>(a, number, from[1].at));
      const auto first = low.or_zeros(from[0].is_inside), second = high.or_zeros(from[1].is_inside);
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
    visit_pixels([&](uint32_t channel, uint32_t pair, const Pixel<Vector>(&to)[2]) {
      const uint32_t place = tile.place(channel, pair);
      PixelChannels<kVector> first, second;
#pragma unroll
      for (int k = 0; k < kVector; k += 2) {
        const uint32_t low = tile.words[tile.place_after(place, k)];
        const uint32_t high = kVector > 1 ? tile.words[tile.place_after(place, k + 1)] : 0;
        first.words[k / 2] = __byte_perm(low, high, 0x5410), second.words[k / 2] = __byte_perm(low, high, 0x7632);
      }
      if (to[0].is_inside) __stwb(to[0].at, first.vector());  // as one
      if (to[1].is_inside) __stwb(to[1].at, second.vector());
    });
  }
}

// The same to whole planes, of so few pixels that a block has all of them: 8 channels begin and end with units of 16
// bytes, which planes alone do not where their pixels are no multiple of 8.
constexpr int kVectorChannels = 8, kWholePixels = 256;

// Words of 8 channels in shared memory: behind them as many more that those of all slots lie in other banks.
__host__ __device__ uint32_t whole_pitch(uint32_t size) {
  return kVectorChannels / 2 * size + 4;
}
bool has_whole_planes(const Relayout& a) {
  return a.size % 2 == 0 && a.size % 8 > 0 && a.size <= kWholePixels && a.planes_channel == a.size &&
         a.width == static_cast<int>(a.by_width.divisor);
}

template <int kCount, bool kRaw>
__global__ void __launch_bounds__(kThreads) relayout_whole(const __grid_constant__ Relayouts<kCount> all) {
  constexpr uint32_t kSlots = kTileChannels / kVectorChannels, kAtOnce = kRaw ? 2 : 4;
  static_assert(kSlots == kThreads / 32);
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
  for (uint32_t first = threadIdx.x / kSlots; first < size / 2 && slot < slots; first += kAtOnce * kThreads / kSlots) {
    uint4 pixels[kAtOnce][2];
#pragma unroll
    for (uint32_t k = 0; k < kAtOnce; ++k) {
      const uint32_t pair = min(first + k * kThreads / kSlots, size / 2 - 1);
#pragma unroll
      for (uint32_t h = 0; h < 2; ++h) {
        uint32_t row = 2 * pair + h;
        int64_t place = row * a.pixels_column;
        if (!a.joined) {
          const uint32_t column = a.by_width.split(row);
          place = row * a.pixels_row + column * a.pixels_column;
        }
        pixels[k][h] = load_channels<kRaw>(a, number, reinterpret_cast<const uint4*>(image + place) + slot);
      }
    }
#pragma unroll
    for (uint32_t k = 0; k < kAtOnce; ++k) {
      const uint32_t pair = first + k * kThreads / kSlots;
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

// The same for a few channels: a thread has two neighbouring pixels of all of them. Pixels next to each other lie so in
// memory, too, or nearly.
constexpr int kFewChannels = 7;

template <bool kToPlanes>
__global__ void __launch_bounds__(kThreads) relayout_few(const __grid_constant__ Relayout a) {
  constexpr int kTogether = 4;
  let_next_kernel_start();
  wait_for_kernel_before();
  uint32_t number = blockIdx.x * kThreads + threadIdx.x;
  if (number >= a.pairs) return;
  const uint32_t pixel = 2 * a.by_pairs.split(number);
  uint16_t* image = a.pixels + number * a.pixels_image;
  const auto pixel_at = [&](uint32_t row) -> Pixel<uint16_t> {
    const uint32_t column = a.by_width.split(row), width = a.width;
    return {image + row * a.pixels_row + column * a.pixels_column, column < width};
  };
  const bool both = pixel + 1 < a.size;
  Pixel<uint16_t> pixels[] = {pixel_at(pixel), pixel_at(pixel + 1)};
  pixels[1].is_inside = pixels[1].is_inside && both;
  uint16_t* plane = a.planes + number * a.planes_image + pixel;
  const bool words = both && (a.planes_image | a.planes_channel) % 2 == 0;
#pragma unroll 1
  for (int channel = 0; channel < a.channels; channel += kTogether) {
    ushort2 values[kTogether] = {};
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (channel + k >= a.channels) break;
      const uint16_t* from = plane + (channel + k) * a.planes_channel;
      if (kToPlanes) {
        if (pixels[0].is_inside) values[k].x = __ldg(pixels[0].at + channel + k);
        if (pixels[1].is_inside) values[k].y = __ldg(pixels[1].at + channel + k);
      } else if (words) {
        values[k] = *reinterpret_cast<const ushort2*>(from);
      } else {
        values[k].x = from[0];
        if (both) values[k].y = from[1];
      }
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (channel + k >= a.channels) break;
      uint16_t* to = plane + (channel + k) * a.planes_channel;
      if (!kToPlanes) {
        if (pixels[0].is_inside) pixels[0].at[channel + k] = values[k].x;
        if (pixels[1].is_inside) pixels[1].at[channel + k] = values[k].y;
      } else if (words) {
        *reinterpret_cast<ushort2*>(to) = values[k];
      } else {
        to[0] = values[k].x;
        if (both) to[1] = values[k].y;
      }
    }
  }
}

Relayout relayout_of(const View& pixels, const View& planes, int64_t batch, int64_t channels, int64_t height,
                     int64_t width) {
  Relayout a{};
  a.pixels = static_cast<uint16_t*>(pixels.data), a.planes = static_cast<uint16_t*>(planes.data);
  a.pixels_image = pixels.stride[0], a.pixels_row = pixels.stride[2], a.pixels_column = pixels.stride[3];
  a.planes_image = planes.stride[0], a.planes_channel = planes.stride[1];
  a.pixels_end =
      a.pixels + (batch - 1) * a.pixels_image + (height - 1) * a.pixels_row + (width - 1) * a.pixels_column + channels;
  a.inner_images = a.pixels_image > 0 ? static_cast<uint32_t>(std::max<int64_t>(batch - 2, 0)) : 0;
  a.before = static_cast<int>(reinterpret_cast<uintptr_t>(pixels.data) % sizeof(uint4) / 2);
  const int64_t row = planes.stride[2];
  a.channels = static_cast<int>(channels), a.size = static_cast<int>(height * row), a.width = static_cast<int>(width);
  a.joined = row == width && (pixels.stride[2] == width * pixels.stride[3] || height == 1);
  a.by_width = Divider(row), a.by_channel_tiles = Divider(ceil_div(channels, kTileChannels));
  a.by_pixel_tiles = Divider(ceil_div(a.size, kTilePixels));
  return a;
}

// Whether 8 channels are as many bytes from a multiple of 16 as all others, so that they can be copied at once.
bool has_vectors(const View& pixels, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  int64_t places = channels;
  if (batch > 1) places |= pixels.stride[0];
  if (height > 1) places |= pixels.stride[2];
  if (width > 1) places |= pixels.stride[3];
  return places % kVectorChannels == 0;
}

// Copies one or two arrays that have vectors to planes.
template <int kCount, bool kRaw>
void copy_to_planes(Relayouts<kCount> a, int64_t batch, cudaStream_t stream) {
  const Relayout &first = a.each[0], &last = a.each[kCount - 1];
  const bool whole = has_whole_planes(first) && has_whole_planes(last);
  const auto blocks = [&](const Relayout& of) { return batch * (whole ? of.by_channel_tiles.divisor : of.tiles()); };
  a.blocks = static_cast<uint32_t>(blocks(first));
  const int64_t all = kCount > 1 ? blocks(first) + blocks(last) : blocks(first);
  if (whole) {
    constexpr int64_t kSlots = kTileChannels / kVectorChannels;
    launch_early(relayout_whole<kCount, kRaw>, a, all, kThreads, stream,
                 {.shared_bytes = 4 * kSlots * whole_pitch(std::max(first.size, last.size))});
    check_launch("relayout_whole");
  } else {
    launch_early(relayout<true, 8, kCount, kRaw>, a, all, kThreads, stream);
    check_launch("relayout");
  }
}
template <int kCount>
void copy_to_planes(const Relayouts<kCount>& a, int64_t batch, cudaStream_t stream) {
  if (a.each[0].before > 0 || a.each[kCount - 1].before > 0) return copy_to_planes<kCount, true>(a, batch, stream);
  copy_to_planes<kCount, false>(a, batch, stream);
}

void copy_few(Relayout a, int64_t pairs, bool to_planes, cudaStream_t stream) {
  a.pairs = static_cast<uint32_t>(pairs), a.by_pairs = Divider(ceil_div(a.size, 2));
  launch_early(to_planes ? relayout_few<true> : relayout_few<false>, a, ceil_div(pairs, kThreads), kThreads, stream);
  check_launch("relayout_few");
}

}  // namespace

void launch_relayout(const View& pixels, const View& planes, bool to_planes, int64_t batch, int64_t channels,
                     int64_t height, int64_t width, cudaStream_t stream) {
  const Relayouts<1> a{{relayout_of(pixels, planes, batch, channels, height, width)}, 0};
  const bool vectors = has_vectors(pixels, batch, channels, height, width);
  if (vectors && to_planes) return copy_to_planes(a, batch, stream);
  constexpr int64_t kMostPairs = 1 << 30;  // counted in 32 bits
  const int64_t pairs = batch * ceil_div(a.each[0].size, 2);
  if (!vectors && channels <= kFewChannels && pairs <= kMostPairs) return copy_few(a.each[0], pairs, to_planes, stream);
  const auto kernel = to_planes                          ? relayout<true, 1, 1, false>
                      : vectors && a.each[0].before == 0 ? relayout<false, 8, 1, false>
                                                         : relayout<false, 1, 1, false>;
  launch_early(kernel, a, batch * a.each[0].tiles(), kThreads, stream);
  check_launch("relayout");
}

void both_to_planes(Problem& p, const Allocate& allocate, cudaStream_t stream) {
  if (has_rows(p.input, p.width) || has_rows(p.output, p.out_width) ||
      !has_vectors(p.input, p.batch, p.channels, p.height, p.width) ||
      !has_vectors(p.output, p.batch, p.filters(), p.out_height, p.out_width))
    return;
  const View input = new_planes(p.batch, p.channels, p.height, p.width, allocate);
  const View output = new_planes(p.batch, p.filters(), p.out_height, p.out_width, allocate);
  copy_to_planes<2>({{relayout_of(p.input, input, p.batch, p.channels, p.height, p.width),
                      relayout_of(p.output, output, p.batch, p.filters(), p.out_height, p.out_width)},
                     0},
                    p.batch, stream);
  p.input = input, p.output = output;
}

}  // namespace dwconv
