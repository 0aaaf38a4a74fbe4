// stride, padding and dilation in one number, and whether the weights are cast, as under autocast: each argument of an
// operator costs the host some 0.3 us.
#pragma once

#include <array>
#include <cstdint>

namespace dwconv {

class PackedGeometry {
 public:
  using Numbers = std::array<int64_t, 6>;  // of stride, padding and dilation the vertical one, then the horizontal one
  static constexpr int kBits = 9;
  static constexpr int64_t kLargest = (1 << kBits) - 1;  // none is negative

  explicit constexpr PackedGeometry(int64_t packed) : packed_(packed) {}
  explicit constexpr PackedGeometry(const Numbers& numbers, bool casts = false) {
    for (size_t i = 0; i < numbers.size(); ++i) packed_ |= numbers[i] << kBits * i;
    packed_ |= int64_t{casts} << kCasts;
  }

  constexpr int64_t packed() const { return packed_; }
  constexpr Numbers numbers() const {
    Numbers numbers{};
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = packed_ >> kBits * i & kLargest;
    return numbers;
  }
  // Whether weight and bias, of float32, are to be cast to the input's dtype, and their gradients back.
  constexpr bool casts() const { return packed_ >> kCasts & 1; }

 private:
  static constexpr int kCasts = 6 * kBits;
  int64_t packed_ = 0;
};

}  // namespace dwconv
