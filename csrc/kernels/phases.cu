// Problems with a stride or a dilation, and much to compute, by the kernels for those without (phases.h says how): one
// kernel copies the phases of what the pass reads, the problem that they make is launched, and another kernel copies
// what that wrote to where it belongs. Two more kernels, 5 us, and a picosecond for each element that is copied, are
// for products that take a third of the time, or much less on tensor cores.
//
// Phases are of the same size: where some are smaller, zeros follow, or weights of zero. Where such a zero meets Inf or
// NaN a sum is NaN: what is not finite is computed again, by the taps that meet the image.
#include "phases.h"

#include <algorithm>

#include "common.cuh"
#include "generic.cuh"
#include "launch.h"
#include "overlap.cuh"
#include "widening.h"
#include "window_sides.cuh"

namespace dwconv {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;  // copied at once in channels_last, where all pixels lie so

// Rows of a phase that a thread copies, by so many elements at once.
constexpr int rows_of(int64_t vector) {
  return vector > 1 ? 2 : 8;
}

// One side of an array: element k of phase (q, r) is number step * k + first + by_output * q + by_tap * r of `size`.
struct Side {
  int step, first, by_output, by_tap, size;
  Divider by_size, by_outputs, by_taps;  // of a phase's elements, and of phases
};

// An array and the copy of its phases, which has no gaps; strides are in vectors. A thread copies some rows of a
// column.
struct Gather {
  const void* source;
  void* target;
  int source_stride[4], target_stride[4];
  Side h, w;
  Divider by_channels, by_strips;  // the former of vectors
  uint32_t threads;
  bool in_planes, is_weight;
};

struct Gathers {
  Gather each[2];
  uint32_t blocks;  // of the first
};

template <typename T>
__device__ void gather(const Gather& a, uint32_t rest) {
  constexpr int kRows = rows_of(sizeof(T) / 4);
  if (rest >= a.threads) return;
  // Neighbours in memory first, then columns that lie between them in the source.
  uint32_t channel, x;
  if (a.in_planes)
    x = a.w.by_size.split(rest);
  else
    channel = a.by_channels.split(rest);
  const uint32_t column_tap = a.w.by_taps.split(rest), column_output = a.w.by_outputs.split(rest);
  if (a.in_planes)
    channel = a.by_channels.split(rest);
  else
    x = a.w.by_size.split(rest);
  const uint32_t row_tap = a.h.by_taps.split(rest), row_output = a.h.by_outputs.split(rest);
  const int first_row = a.by_strips.split(rest) * kRows;
  const auto place = [](const Side& side, uint32_t k, uint32_t q, uint32_t r) {
    return side.step * static_cast<int>(k) + side.first + side.by_output * static_cast<int>(q) +
           side.by_tap * static_cast<int>(r);
  };
  const int source_row = place(a.h, first_row, row_output, row_tap);
  const int source_column = place(a.w, x, column_output, column_tap);
  const bool column_inside = source_column >= 0 && source_column < a.w.size;
  const uint32_t image = (rest * a.h.by_outputs.divisor + row_output) * a.w.by_outputs.divisor + column_output;
  const uint32_t plane = (row_tap * a.w.by_taps.divisor + column_tap) * a.by_channels.divisor + channel;
  const T* from = static_cast<const T*>(a.source) +
                  static_cast<int>(rest * a.source_stride[0] + channel * a.source_stride[1] +
                                   source_row * a.source_stride[2] + source_column * a.source_stride[3]);
  T* to = static_cast<T*>(a.target) + static_cast<int>(image * a.target_stride[0] + plane * a.target_stride[1] +
                                                       first_row * a.target_stride[2] + x * a.target_stride[3]);
  const int rows = static_cast<int>(a.h.by_size.divisor) - first_row, source_step = a.h.step * a.source_stride[2];
  wait_for_kernel_before();
  T values[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const int row = source_row + k * a.h.step;
    values[k] = {};
    if (column_inside && row >= 0 && row < a.h.size && k < rows) values[k] = from[k * source_step];
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k)
    if (k < rows) to[k * a.target_stride[2]] = values[k];
}

// Of pixels, which are copied as numbers of the one type, and of weights, of the other.
template <typename Pixels, typename Element>
__global__ void __launch_bounds__(kThreads) gather_phases(const __grid_constant__ Gathers all) {
  let_next_kernel_start();
  const bool is_second = blockIdx.x >= all.blocks;
  const Gather& a = all.each[is_second];
  const uint32_t thread = (blockIdx.x - (is_second ? all.blocks : 0)) * kThreads + threadIdx.x;
  if (a.is_weight)
    gather<Element>(a, thread);
  else
    gather<Pixels>(a, thread);
}

// One side of what is written back.
struct BackSide {
  int step, first, stride, dilation;  // as PhasesOfSide has them
  int size, outputs, taps;            // of a phase of what is written, and numbers of phases
  int outputs_inverse, taps_inverse;  // see phase_of_input()
  Divider by_step, by_common, by_apart, by_every;
};

// A phase and a number in it; the number lies outside where there is none.
struct Place {
  int output, tap, number;
};

constexpr int kNowhere = -(1 << 30);

// The only phase that an input number belongs to: stride * q + dilation * r, where both are divided by their greatest
// common divisor, gives every remainder of the division by apart * every once.
__device__ inline Place phase_of_input(const BackSide& a, int input) {
  const int rest = input - a.first + 3 * a.step;  // so that nothing is negative
  uint32_t remainder = rest;
  remainder = a.by_step.split(remainder);
  if (a.by_common.split(remainder) > 0) return {0, 0, kNowhere};
  uint32_t output = remainder * a.outputs_inverse, tap = remainder * a.taps_inverse;
  const int q = a.by_apart.split(output), r = a.by_every.split(tap);
  if (q >= a.outputs || r >= a.taps) return {0, 0, kNowhere};
  uint32_t number = rest - a.stride * q - a.dilation * r;
  a.by_step.split(number);
  return {q, r, static_cast<int>(number) - 3};
}

// `source` and `target` are of what is copied, and the rest of the problem: what is not finite is computed by that.
struct Back {
  const void* source;
  void* target;
  int source_stride[4], target_stride[4];  // in vectors
  BackSide h, w;
  Divider by_width, by_planes, by_phases, by_strips;  // of the target; by_phases: rows that lie next to each other
  uint32_t threads;
  int planes, height;  // of a phase, in vectors, and rows of the target
  bool in_planes;
  MappingArguments problem;
  WindowSide rows, columns;
  Reach reach_rows, reach_columns;

  Back(const Problem& p, const Mapping& map)
      : problem(map),
        rows(window_rows(p, map)),
        columns(window_columns(p, map)),
        reach_rows(rows),
        reach_columns(columns) {}
};

template <typename T, int kVector>
struct alignas(kVector * sizeof(T)) Vector {
  T values[kVector];
};

// Writes the output, or the gradient of the input.
template <typename T, int kVector, bool kForward>
__global__ void __launch_bounds__(kThreads, 4) put_back(const __grid_constant__ Back a) {
  constexpr int kRows = rows_of(kVector);
  let_next_kernel_start();
  uint32_t rest = blockIdx.x * kThreads + threadIdx.x;
  if (rest >= a.threads) return;
  uint32_t plane;
  if (!a.in_planes) plane = a.by_planes.split(rest);
  const uint32_t x = a.by_width.split(rest);
  if (a.in_planes) plane = a.by_planes.split(rest);
  const int step = a.by_phases.divisor, phase_row = a.by_phases.split(rest);
  const int first_row = phase_row + step * static_cast<int>(a.by_strips.split(rest) * kRows), image = rest;
  const auto place_of = [](const BackSide& side, uint32_t number) -> Place {
    if constexpr (kForward) {
      const int q = side.by_apart.split(number);
      return {q, 0, static_cast<int>(number)};
    } else {
      return phase_of_input(side, number);
    }
  };
  const Place row = place_of(a.h, first_row), column = place_of(a.w, x);
  const auto* from = static_cast<const Vector<T, kVector>*>(a.source) +
                     (((image * a.h.outputs + row.output) * a.w.outputs + column.output) * a.source_stride[0] +
                      ((row.tap * a.w.taps + column.tap) * a.planes + static_cast<int>(plane)) * a.source_stride[1] +
                      row.number * a.source_stride[2] + column.number * a.source_stride[3]);
  auto* to = static_cast<Vector<T, kVector>*>(a.target) +
             (image * a.target_stride[0] + static_cast<int>(plane) * a.target_stride[1] +
              first_row * a.target_stride[2] + static_cast<int>(x) * a.target_stride[3]);
  const int to_step = step * a.target_stride[2];
  const bool column_inside = column.number >= 0 && column.number < a.w.size;
  const auto inside = [&](int k) {
    return column_inside && row.number + k >= 0 && row.number + k < a.h.size && first_row + k * step < a.height;
  };
  wait_for_kernel_before();
  Vector<T, kVector> values[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    values[k] = {};
    if (inside(k)) values[k] = from[k * a.source_stride[2]];
  }
  bool finite = true;
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) finite &= is_finite(widen(values[k].values[v]));
    if (first_row + k * step < a.height) to[k * to_step] = values[k];
  }
  if (finite) return;
#pragma unroll 1
  for (int y = first_row; y < min(first_row + kRows * step, a.height); y += step, to += to_step)
#pragma unroll 1
    for (int v = 0; v < kVector; ++v) {
      T& element = to->values[v];
      const uint32_t number = plane * kVector + v;
      if (!is_finite(widen(element)))
        element = narrow<T>(tap_by_tap(a.problem, a.problem.source_of<T>(image, number), a.problem.weight_of<T>(number),
                                       taps_of(a.rows, a.reach_rows, y), taps_of(a.columns, a.reach_columns, x)) +
                            a.problem.bias_of<T>(number));
    }
}

struct BackWeights {
  const void *input, *output;  // of the problem
  const void *source, *source_bias;
  void *target, *target_bias;
  Sizes<int64_t> sizes;
  int kernel_h, kernel_w, taps_w;  // of a phase, and how many phases lie side by side
  Divider by_kernel_w, by_kernel_h, by_every_h, by_every_w;
  uint32_t weights, filters;

  explicit BackWeights(const Problem& p) : sizes(p) {}
};

// A gradient of a weight, by the pixels that it meets; a warp computes it.
template <typename T>
__device__ __noinline__ float exact_weight(const BackWeights& b, int64_t filter, int64_t i, int64_t j) {
  const auto& a = b.sizes;
  double sum = 0;
  const int64_t pixels = a.batch * a.out_height * a.out_width;
  for (int64_t pixel = threadIdx.x % 32; pixel < pixels; pixel += 32) {
    int64_t image = pixel;
    const int64_t column = split(image, a.out_width), row = split(image, a.out_height);
    const int64_t y = row * a.stride_h + i * a.dilation_h - a.padding_h;
    const int64_t x = column * a.stride_w + j * a.dilation_w - a.padding_w;
    if (y < 0 || y >= a.height || x < 0 || x >= a.width) continue;
    const T in = static_cast<const T*>(
        b.input)[image * a.input[0] + filter / a.multiplier * a.input[1] + y * a.input[2] + x * a.input[3]];
    const T grad = static_cast<const T*>(
        b.output)[image * a.output[0] + filter * a.output[1] + row * a.output[2] + column * a.output[3]];
    sum += static_cast<double>(widen(in)) * widen(grad);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return static_cast<float>(sum);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) put_weights_back(const __grid_constant__ BackWeights a) {
  let_next_kernel_start();
  const uint32_t number = blockIdx.x * kThreads + threadIdx.x;
  uint32_t filter = min(number, a.weights - 1);
  const uint32_t j = a.by_kernel_w.split(filter), i = a.by_kernel_h.split(filter);
  uint32_t row = i, column = j;
  const uint32_t row_tap = a.by_every_h.split(row), column_tap = a.by_every_w.split(column);
  const int64_t phase = row_tap * a.taps_w + column_tap;
  wait_for_kernel_before();
  float value =
      widen(static_cast<const T*>(a.source)[((phase * a.filters + filter) * a.kernel_h + row) * a.kernel_w + column]);
  uint32_t left = __ballot_sync(~0u, !is_finite(value));
  while (left != 0) {
    const int lane = __ffs(left) - 1;
    left &= left - 1;
    const float exact =
        exact_weight<T>(a, __shfl_sync(~0u, filter, lane), __shfl_sync(~0u, i, lane), __shfl_sync(~0u, j, lane));
    if (threadIdx.x % 32 == lane) value = exact;
  }
  if (number < a.weights) static_cast<T*>(a.target)[number] = narrow<T>(value);
  if (number < a.filters && a.target_bias != nullptr)
    static_cast<T*>(a.target_bias)[number] = static_cast<const T*>(a.source_bias)[number];
}

// Whether channels lie side by side, and all pixels are vectors.
bool has_vectors(const View& view, int64_t element, int64_t channels) {
  const int64_t vector = kVectorBytes / element;
  return view.stride[1] == 1 && (channels | view.stride[0] | view.stride[2] | view.stride[3]) % vector == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % kVectorBytes == 0;
}

// Strides in vectors of so many channels.
void set_strides(int (&strides)[4], const View& view, int64_t vector) {
  for (int d = 0; d < 4; ++d) strides[d] = static_cast<int>(view.stride[d] / (d == 1 ? 1 : vector));
}

// The copies of what a pass reads.
class Copies {
 public:
  Copies(const Phases& phases, const Allocate& allocate) : phases_(phases), allocate_(allocate) {}

  View add_input(const Problem& p) {
    const auto side = [](const PhasesOfSide& s, int64_t size) {
      return side_of(s, s.step, s.first, s.stride, s.dilation, size, s.size);
    };
    return add(p.input, phases_.problem.input, p.batch, p.channels, side(phases_.h, p.height), side(phases_.w, p.width),
               false);
  }
  View add_output(const Problem& p) {
    const auto side = [](const PhasesOfSide& s, int64_t size) {
      return side_of(s, s.apart, 0, 1, 0, size, s.out_size);
    };
    return add(p.output, phases_.problem.output, p.batch, p.filters(), side(phases_.h, p.out_height),
               side(phases_.w, p.out_width), false);
  }
  View add_weight(const Problem& p) {
    const auto side = [](const PhasesOfSide& s, int64_t size) {
      Side side = side_of(s, s.every, 0, 0, 1, size, s.kernel);
      side.by_outputs = Divider(1);
      return side;
    };
    View weight = p.weight;
    weight.stride[1] = weight.stride[0];
    return add(weight, phases_.problem.weight, 1, p.filters(), side(phases_.h, p.kernel_h), side(phases_.w, p.kernel_w),
               true);
  }

  void launch(cudaStream_t stream) {
    if (count_ == 0) return;
    const int64_t element = size_of(phases_.problem.dtype);
    const bool vectors = std::all_of(items_, items_ + count_, [](const Item& item) { return item.has_vectors; });
    int64_t blocks[2] = {};
    for (int i = 0; i < count_; ++i) {
      Gather& a = all_.each[i];
      const int64_t vector = vectors && !a.is_weight ? kVectorBytes / element : 1;
      a.by_channels = Divider(items_[i].channels / vector);
      set_strides(a.source_stride, items_[i].source, vector), set_strides(a.target_stride, items_[i].target, vector);
      const int64_t strips = ceil_div(a.h.by_size.divisor, rows_of(vector));
      a.by_strips = Divider(strips), a.threads = static_cast<uint32_t>(items_[i].columns / vector * strips);
      blocks[i] = ceil_div(a.threads, kThreads);
    }
    all_.blocks = static_cast<uint32_t>(blocks[0]);
    const auto launch = [&](auto kernel) {
      launch_early<Gathers>(kernel, all_, blocks[0] + blocks[1], kThreads, stream);
      check_launch("gather_phases");
    };
    if (element == 2)
      launch(vectors ? gather_phases<uint4, uint16_t> : gather_phases<uint16_t, uint16_t>);
    else
      launch(vectors ? gather_phases<uint4, uint32_t> : gather_phases<uint32_t, uint32_t>);
  }

 private:
  struct Item {
    View source, target;
    int64_t channels, columns;
    bool has_vectors;  // or is of weights, which need none
  };

  static Side side_of(const PhasesOfSide& s, int64_t step, int64_t first, int64_t by_output, int64_t by_tap,
                      int64_t size, int64_t of_phase) {
    return {static_cast<int>(step), static_cast<int>(first), static_cast<int>(by_output), static_cast<int>(by_tap),
            static_cast<int>(size), Divider(of_phase),       Divider(s.outputs),          Divider(s.taps)};
  }

  View add(const View& source, View target, int64_t images, int64_t channels, const Side& h, const Side& w,
           bool is_weight) {
    Gather& a = all_.each[count_];
    a.h = h, a.w = w, a.is_weight = is_weight, a.in_planes = is_weight || phases_.in_planes;
    const auto count = [](const Divider& by) { return static_cast<int64_t>(by.divisor); };
    const int64_t columns = images * count(h.by_outputs) * count(w.by_outputs) * count(h.by_taps) * count(w.by_taps) *
                            channels * count(w.by_size);
    const int64_t element = size_of(phases_.problem.dtype);
    target.data = allocate_(columns * count(h.by_size) * element);
    a.source = source.data, a.target = target.data;
    items_[count_++] = {source, target, channels, columns,
                        !phases_.in_planes && (is_weight || has_vectors(source, element, channels))};
    return target;
  }

  const Phases& phases_;
  const Allocate& allocate_;
  Gathers all_{};
  Item items_[2] = {};
  int count_ = 0;
};

// A number that times `value` leaves 1 after division by `modulus`.
int64_t inverse(int64_t value, int64_t modulus) {
  for (int64_t i = 0; i < modulus; ++i)
    if (value * i % modulus == 1 % modulus) return i;
  return 0;  // unreachable: they have no common divisor
}

BackSide back_side(const PhasesOfSide& s, int64_t size) {
  const int64_t common = std::gcd(s.stride, s.dilation);
  const auto of = [](int64_t value) { return static_cast<int>(value); };
  return {of(s.step),
          of(s.first),
          of(s.stride),
          of(s.dilation),
          of(size),
          of(s.outputs),
          of(s.taps),
          of(inverse(s.stride / common, s.apart)),
          of(inverse(s.dilation / common, s.every)),
          Divider(s.step),
          Divider(common),
          Divider(s.apart),
          Divider(s.every)};
}

void launch_put_back(const Problem& p, const Phases& phases, const View& source, cudaStream_t stream) {
  const bool forward = p.pass == Pass::kForward;
  const Mapping map(p);
  const View& target = map.target;
  Back a(p, map);
  a.source = source.data, a.target = target.data;
  a.h = back_side(phases.h, forward ? phases.h.out_size : phases.h.size);
  a.w = back_side(phases.w, forward ? phases.w.out_size : phases.w.size);
  const int64_t planes = map.targets, height = map.out_height, width = map.out_width;
  const int64_t element = size_of(p.dtype);
  const bool vectors =
      !phases.in_planes && has_vectors(source, element, planes) && has_vectors(target, element, planes);
  const int64_t vector = vectors ? kVectorBytes / element : 1;
  set_strides(a.source_stride, source, vector), set_strides(a.target_stride, target, vector);
  const int64_t apart = forward ? phases.h.apart : phases.h.step, rows = std::min(apart, height);
  const int64_t strips = ceil_div(ceil_div(height, apart), rows_of(vector));
  a.by_width = Divider(width), a.by_planes = Divider(planes / vector), a.by_phases = Divider(rows);
  a.by_strips = Divider(strips);
  a.in_planes = phases.in_planes, a.planes = static_cast<int>(planes / vector);
  a.height = static_cast<int>(height);
  a.threads = static_cast<uint32_t>(p.batch * (planes / vector) * width * rows * strips);
  const auto launch = [&](auto kernel) {
    launch_early<Back>(kernel, a, ceil_div(a.threads, kThreads), kThreads, stream);
    check_launch("put_back");
  };
  visit_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) <= 4) {
      constexpr int kVector = kVectorBytes / sizeof(T);
      if (forward)
        launch(vectors ? put_back<T, kVector, true> : put_back<T, 1, true>);
      else
        launch(vectors ? put_back<T, kVector, false> : put_back<T, 1, false>);
    }
  });
}

void launch_put_weights_back(const Problem& p, const Phases& phases, const Problem& made, cudaStream_t stream) {
  BackWeights a(p);
  a.input = p.input.data, a.output = p.output.data;
  a.source = made.weight.data, a.source_bias = made.bias, a.target = p.weight.data, a.target_bias = p.bias;
  a.kernel_h = static_cast<int>(phases.h.kernel), a.kernel_w = static_cast<int>(phases.w.kernel);
  a.taps_w = static_cast<int>(phases.w.taps);
  a.by_kernel_h = Divider(p.kernel_h), a.by_kernel_w = Divider(p.kernel_w);
  a.by_every_h = Divider(phases.h.every), a.by_every_w = Divider(phases.w.every);
  a.filters = static_cast<uint32_t>(p.filters()), a.weights = static_cast<uint32_t>(p.filters() * p.taps());
  visit_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) <= 4) launch_early(put_weights_back<T>, a, ceil_div(a.weights, kThreads), kThreads, stream);
  });
  check_launch("put_weights_back");
}

}  // namespace

void launch_phases(const Problem& p, const Allocate& allocate, const std::function<void(const Problem&)>& launch,
                   cudaStream_t stream) {
  const Phases phases(p);
  Problem made = phases.problem;
  const int64_t element = size_of(made.dtype);
  Copies copies(phases, allocate);
  if (p.pass != Pass::kGradInput) made.input = copies.add_input(p);
  if (p.pass != Pass::kForward && !phases.keeps_output) made.output = copies.add_output(p);
  if (p.pass != Pass::kGradWeight && !phases.keeps_weight) made.weight = copies.add_weight(p);
  copies.launch(stream);
  switch (p.pass) {
    case Pass::kForward:
      if (!phases.keeps_output)
        made.output.data = allocate(element * made.batch * made.filters() * made.out_height * made.out_width);
      launch(made);
      if (!phases.keeps_output) launch_put_back(p, phases, made.output, stream);
      return;
    case Pass::kGradInput:
      made.input.data = allocate(element * made.batch * made.channels * made.height * made.width);
      launch(made);
      launch_put_back(p, phases, made.input, stream);
      return;
    case Pass::kGradWeight:
      made.weight.data = allocate(element * made.filters() * made.taps());
      if (p.bias != nullptr) made.bias = allocate(element * made.filters());
      {
        const Widening::Pause pause;  // gradients of phases are of the images' dtype
        launch(made);
      }
      launch_put_weights_back(p, phases, made, stream);
  }
}

}  // namespace dwconv
