// How blocks share rows.
#pragma once

#include <numeric>

#include "common.cuh"

namespace dwconv {

// Shares of the rows of all images, in whole grains, that differ by one grain at most. As many images as possible begin
// with a share. Where one begins takes no division.
struct Shares {
  int grain = 1, least = 0, more = 0;  // grains of a share; of so many shares, the first ones of a period, one more
  int period = 0;                      // grains
  Divider by_period;                   // of the shares

  Shares() = default;
  Shares(int64_t rows, int64_t shares, int64_t images = 1, int grain = 1) : grain(grain) {
    const int64_t periods = std::gcd(shares, images), of_period = shares / periods;
    period = static_cast<int>(rows / grain / periods);
    least = static_cast<int>(period / of_period), more = static_cast<int>(period % of_period);
    by_period = Divider(of_period);
  }
  __device__ int begin(int share) const {
    uint32_t number = share;
    const int place = by_period.split(number);
    return (static_cast<int>(number) * period + place * least + min(place, more)) * grain;
  }
};

}  // namespace dwconv
