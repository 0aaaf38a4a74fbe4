// grad_weight of 1x1 on channels_last arrays without gaps.
#pragma once

#include "launch.h"

namespace dwconv {

constexpr int64_t kMostFlatChannels = 1024;  // as many as a block has threads

// By flat_grad_weight_channels_last.cu. Returns false, and launches nothing, where one array begins elsewhere within 16
// bytes than the other.
bool launch_flat_grad_weight_channels_last(const Problem& problem, const Allocate& allocate, cudaStream_t stream);

}  // namespace dwconv
