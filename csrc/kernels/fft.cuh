// Fourier transforms that one thread computes in its registers: e^(-2 pi i jk / n) of n complex numbers, in order.
#pragma once

#include <numeric>
#include <type_traits>
#include <utility>

#include "common.cuh"

namespace dwconv {

// Calls visit() with 0, 1, ... kCount - 1 as types.
template <int kCount, typename Visitor>
__device__ __forceinline__ void visit_all(Visitor&& visit) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    (visit(std::integral_constant<int, kIndex>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

// Cosine and sine of a part of a turn, by their series, for the compiler: to all bits of a float.
struct Turn {
  double cosine = 1, sine = 0;

  constexpr Turn(int number, int of) {
    constexpr double kTurn = 6.283185307179586476925;
    number = (number % of + of) % of;
    const double angle = kTurn * (2 * number > of ? number - of : number) / of;
    double term = 1;
    for (int n = 1; n < 40; ++n) {
      term *= angle / n;
      (n % 2 == 0 ? cosine : sine) += n / 2 % 2 == 0 ? term : -term;
    }
  }
};

// Multiplies by e^(-2 pi i kNumber / kOf).
template <int kNumber, int kOf>
__device__ __forceinline__ void rotate(float& re, float& im) {
  constexpr int kEighths = 8 * kNumber % kOf == 0 ? 8 * kNumber / kOf % 8 : -1;
  constexpr float kCosine = static_cast<float>(Turn(kNumber, kOf).cosine);
  constexpr float kSine = static_cast<float>(Turn(kNumber, kOf).sine);
  const float a = re, b = im;
  if constexpr (kEighths == 1) {
    re = kCosine * (a + b), im = kCosine * (b - a);
  } else if constexpr (kEighths == 2) {
    re = b, im = -a;
  } else if constexpr (kEighths == 3) {
    re = kSine * (b - a), im = -kSine * (a + b);
  } else if constexpr (kEighths != 0) {
    re = a * kCosine + b * kSine, im = b * kCosine - a * kSine;
  }
}

template <int kLength>
__device__ __forceinline__ void transform(float (&re)[kLength], float (&im)[kLength]);

template <>
__device__ __forceinline__ void transform<2>(float (&re)[2], float (&im)[2]) {
  const float a = re[0], b = im[0];
  re[0] = a + re[1], im[0] = b + im[1];
  re[1] = a - re[1], im[1] = b - im[1];
}

template <>
__device__ __forceinline__ void transform<3>(float (&re)[3], float (&im)[3]) {
  constexpr float kSine = 0.86602540378443865f;
  const float a = re[1] + re[2], b = im[1] + im[2], c = re[1] - re[2], d = im[1] - im[2];
  const float e = re[0] - 0.5f * a, f = im[0] - 0.5f * b;
  re[0] += a, im[0] += b;
  re[1] = e + kSine * d, im[1] = f - kSine * c;
  re[2] = e - kSine * d, im[2] = f + kSine * c;
}

template <>
__device__ __forceinline__ void transform<4>(float (&re)[4], float (&im)[4]) {
  const float a = re[0] + re[2], b = im[0] + im[2], c = re[0] - re[2], d = im[0] - im[2];
  const float e = re[1] + re[3], f = im[1] + im[3], g = re[1] - re[3], h = im[1] - im[3];
  re[0] = a + e, im[0] = b + f;
  re[1] = c + h, im[1] = d - g;
  re[2] = a - e, im[2] = b - f;
  re[3] = c - h, im[3] = d + g;
}

template <>
__device__ __forceinline__ void transform<5>(float (&re)[5], float (&im)[5]) {
  constexpr float kCosine1 = 0.30901699437494742f, kCosine2 = -0.80901699437494742f;
  constexpr float kSine1 = 0.95105651629515357f, kSine2 = 0.58778525229247313f;
  const float a = re[1] + re[4], b = im[1] + im[4], c = re[2] + re[3], d = im[2] + im[3];
  const float e = re[1] - re[4], f = im[1] - im[4], g = re[2] - re[3], h = im[2] - im[3];
  const float p = re[0] + kCosine1 * a + kCosine2 * c, q = im[0] + kCosine1 * b + kCosine2 * d;
  const float s = re[0] + kCosine2 * a + kCosine1 * c, t = im[0] + kCosine2 * b + kCosine1 * d;
  const float u = kSine1 * e + kSine2 * g, v = kSine1 * f + kSine2 * h;
  const float w = kSine2 * e - kSine1 * g, z = kSine2 * f - kSine1 * h;
  re[0] += a + c, im[0] += b + d;
  re[1] = p + v, im[1] = q - u;
  re[4] = p - v, im[4] = q + u;
  re[2] = s + z, im[2] = t - w;
  re[3] = s - z, im[3] = t + w;
}

// The first factor of a length: one that shares nothing with the other if there is such, since nothing has to be
// rotated then.
constexpr int first_factor(int length) {
  int power = 1;
  while (length % (2 * power) == 0) power *= 2;
  if (power > 1 && power < length) return power;
  return length == 8 || length == 16 ? 4 : length == 9 ? 3 : 8;
}

// The number below `of` whose product with `number` leaves 1 behind.
constexpr int inverse(int number, int of) {
  int found = 1;
  while (number * found % of != 1 % of) ++found;
  return found;
}

template <int kLength>
__device__ __forceinline__ void transform(float (&re)[kLength], float (&im)[kLength]) {
  constexpr int kFirst = first_factor(kLength), kSecond = kLength / kFirst;
  constexpr bool kCoprime = std::gcd(kFirst, kSecond) == 1;
  const auto gather = [&](auto& to_re, auto& to_im, auto&& place) {
#pragma unroll
    for (int n = 0; n < static_cast<int>(std::extent_v<std::remove_reference_t<decltype(to_re)>>); ++n)
      to_re[n] = re[place(n) % kLength], to_im[n] = im[place(n) % kLength];
  };
  const auto scatter = [&](auto& from_re, auto& from_im, float (&into_re)[kLength], float (&into_im)[kLength],
                           auto&& place) {
#pragma unroll
    for (int n = 0; n < static_cast<int>(std::extent_v<std::remove_reference_t<decltype(from_re)>>); ++n)
      into_re[place(n) % kLength] = from_re[n], into_im[place(n) % kLength] = from_im[n];
  };
  visit_all<kSecond>([&](auto second) {
    constexpr int n = decltype(second)::value;
    float part_re[kFirst], part_im[kFirst];
    const auto place = [&](int k) { return kSecond * k + (kCoprime ? kFirst : 1) * n; };
    gather(part_re, part_im, place);
    transform<kFirst>(part_re, part_im);
    if constexpr (!kCoprime)
      visit_all<kFirst>([&](auto first) {
        constexpr int k = decltype(first)::value;
        rotate<n * k % kLength, kLength>(part_re[k], part_im[k]);
      });
    scatter(part_re, part_im, re, im, place);
  });
  float done_re[kLength], done_im[kLength];
  visit_all<kFirst>([&](auto first) {
    constexpr int k = decltype(first)::value;
    float part_re[kSecond], part_im[kSecond];
    gather(part_re, part_im, [&](int n) { return kSecond * k + (kCoprime ? kFirst : 1) * n; });
    transform<kSecond>(part_re, part_im);
    scatter(part_re, part_im, done_re, done_im, [&](int n) {
      if constexpr (kCoprime)
        return kSecond * inverse(kSecond % kFirst, kFirst) * k + kFirst * inverse(kFirst % kSecond, kSecond) * n;
      else
        return k + kFirst * n;
    });
  });
#pragma unroll
  for (int n = 0; n < kLength; ++n) re[n] = done_re[n], im[n] = done_im[n];
}

}  // namespace dwconv
