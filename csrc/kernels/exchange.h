// Rows and columns exchanged, which strides make of any array.
#pragma once

#include <utility>

#include "../problem.h"

namespace dwconv {

inline Problem exchange(Problem p) {
  for (View* view : {&p.input, &p.weight, &p.output}) std::swap(view->stride[2], view->stride[3]);
  std::swap(p.height, p.width), std::swap(p.out_height, p.out_width), std::swap(p.kernel_h, p.kernel_w);
  std::swap(p.padding_h, p.padding_w), std::swap(p.stride_h, p.stride_w), std::swap(p.dilation_h, p.dilation_w);
  return p;
}

}  // namespace dwconv
