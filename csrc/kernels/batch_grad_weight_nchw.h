// What claims_nchw.cpp and the launchers have to know of grad_weight by sums over images.
#pragma once

namespace dwconv {

constexpr int kMaxColumnRows = 11;        // of kernels of one column, with what dilation puts between them
constexpr int kLeastAlignedColumns = 48;  // of planes that chunks of rows are copied of (aligned_grad_weight_nchw.cu)

}  // namespace dwconv
