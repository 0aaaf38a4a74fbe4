// What claims_channels_last.cpp and flat_grad_weight_channels_last.cu know.
#pragma once

#include <cstdint>

namespace dwconv {

constexpr int64_t kMostFlatChannels = 1024;  // as many as a block has threads

}  // namespace dwconv
