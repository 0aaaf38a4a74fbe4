// What claims_little.cpp and direct.cu know.
#pragma once

#include <cstdint>

namespace dwconv {

// Taps up to which float64 goes direct: weights of more do not find room in registers.
inline constexpr int64_t kDirectFloat64Taps = 25;

}  // namespace dwconv
