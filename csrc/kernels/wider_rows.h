// Copies of 16-bit planes without gaps whose rows are of an odd number of columns, which kernels would load and store
// one by one, to planes of wider rows, and back.
#pragma once

#include "launch.h"

namespace dwconv {

// Whether planes follow each other without gaps, and 32 bits count their elements.
bool can_have_wider_rows(const View& planes, int64_t batch, int64_t channels, int64_t height, int64_t width);

// Copies all rows of `from` to those of `to`, which are longer, with zeros behind, or shorter.
void launch_wider_rows(const void* from, int64_t from_row, void* to, int64_t to_row, int64_t rows, cudaStream_t stream);

}  // namespace dwconv
