// Launches toeplitz_large (toeplitz_large.cuh): how a problem is cut into what a warp, a block and a launch computes,
// and copies of images in channels_last.
#include <algorithm>
#include <cmath>
#include <limits>

#include "device.h"
#include "launch.h"
#include "relayout.h"
#include "stream.cuh"
#include "toeplitz_large.cuh"
#include "toeplitz_large.h"
#include "toeplitz_large_planes.h"
#include "toeplitz_tall_planes.h"
#include "wider_rows.h"

namespace dwconv {
namespace {

constexpr int64_t kMostTasks = std::numeric_limits<int32_t>::max() - 1;

// How a problem is cut.
struct Cut {
  int tiles = 0;                          // column groups of a target that a warp computes at once
  int depth = 0;                          // band matrices that it has at once
  int blocks_m = 0;                       // 16 rows each
  int rows_log = 0;                       // these are 1 << rows_log rows of an image
  int images = 0, rows = 0, columns = 0;  // of a block; `columns` counts tiles of a warp side by side
  int threads = 0;
  double time = std::numeric_limits<double>::infinity();  // expected, in cycles
};

// Lays a block's shared memory out. Returns how much of it there is: the other numbers mean nothing if it is too much.
int64_t apply(Large& a, const Cut& cut) {
  const Bands bands(a.kernel_w, a.stride, a.padding_w, a.width, a.out_width);
  const int tile_rows = 1 << cut.rows_log;
  a.first = static_cast<int>(bands.first), a.depth = static_cast<int>(bands.count);
  a.first_tap = kLargeGroup * a.first - 7 * a.stride + a.padding_w;
  a.images = cut.images, a.rows = cut.rows, a.rows_log = cut.rows_log, a.tiles = cut.columns * cut.tiles;
  a.bands = static_cast<int>(ceil_div(a.out_height, a.rows));
  a.ranges = static_cast<int>(ceil_div(ceil_div(a.out_width, kLargeGroup), a.tiles));
  a.row_tiles = static_cast<int>(ceil_div(a.rows, tile_rows)), a.column_tiles = cut.columns;
  a.image_tiles = static_cast<int>(ceil_div(a.images, std::max(16 * cut.blocks_m >> cut.rows_log, 1)));

  const int64_t groups = std::min<int64_t>(ceil_div(a.width, kLargeGroup), int64_t{a.tiles - 1} * a.stride + a.depth);
  const int64_t source_rows = std::min<int64_t>(a.height, int64_t{a.rows - 1} * a.stride + a.kernel_h);
  const int64_t source_pitch = kLargeGroupBytes * (groups | 1);
  int64_t source_plane = source_rows * source_pitch;
  // Rows of several images meet no bank of shared memory twice, either.
  if (tile_rows < 8)
    while (source_plane / kLargeGroupBytes % (2 * tile_rows) != tile_rows) source_plane += kLargeGroupBytes;
  const int64_t columns = std::min(a.tiles * kLargeGroup, a.out_width), out_plane = round_up(2 * a.rows * columns, 16);
  const int64_t out_pitch = 2 * (a.across ? a.rows : columns);
  const int64_t weight_pitch = 2 * round_up(kLargeGroup * round_up(a.depth, cut.depth) + 7 * a.stride, 2);
  int64_t copy = (a.kernel_h + 1) * weight_pitch;
  copy += (64 - copy % 128 + 128) % 128;  // so that the copies do not meet in a bank
  const int64_t tasks_at = round_up(groups * kLargeGroupBytes, 128);
  const int64_t weights_at = tasks_at + round_up(2 * static_cast<int64_t>(sizeof(LargeTask)), 128);
  const int64_t source_at = weights_at + round_up(2 * copy, 128);
  const int64_t out_at = source_at + round_up(a.images * source_plane, 128), bytes = out_at + a.images * out_plane;
  const auto set = [](int& to, int64_t value) { to = static_cast<int>(value); };
  set(a.source_rows, source_rows), set(a.source_pitch, source_pitch), set(a.source_plane, source_plane);
  set(a.out_pitch, out_pitch), set(a.out_plane, out_plane), set(a.weight_pitch, weight_pitch), set(a.copy, copy);
  set(a.tasks_at, tasks_at), set(a.weights_at, weights_at), set(a.source_at, source_at), set(a.out_at, out_at);

  const auto unit_of = [](std::initializer_list<int64_t> places) {
    int64_t all = 16;
    for (const int64_t place : places) all |= place;
    return static_cast<int>(all & -all);
  };
  // Of rows in memory: how many elements, and where bands of them begin.
  const int64_t source_size = a.across ? a.height : a.width, source_rows_in_memory = a.across ? a.width : a.height;
  const bool parted = a.across && a.bands > 1;
  a.load_unit = unit_of({reinterpret_cast<intptr_t>(a.source), a.batch > 1 ? 2 * a.source_image : 0,
                         a.targets > 1 ? 2 * a.source_channel : 0, source_rows_in_memory > 1 ? 2 * a.source_row : 0,
                         2 * source_size, parted ? 2 * int64_t{a.rows} * a.stride : 0, parted ? 2 * a.padding_h : 0});
  if (a.across) a.load_unit = a.load_unit >= 8 ? 8 : 2;
  const int last = a.out_width - (a.ranges - 1) * a.tiles * kLargeGroup;
  a.joined = a.across ? a.rows == a.out_height && (a.target_row == a.out_height || a.out_width == 1)
                      : a.ranges == 1 && (a.target_row == a.out_width || a.out_height == 1);
  // Parts of a target plane without gaps, and how many bytes they are.
  const int64_t part = a.across ? 2 * a.tiles * kLargeGroup * a.out_height : 2 * int64_t{a.rows} * a.out_width;
  const int64_t parts = a.across ? a.ranges : a.bands;
  const int64_t last_part = 2 * int64_t{a.out_height} * a.out_width - (parts - 1) * part;
  a.store_unit = unit_of({reinterpret_cast<intptr_t>(a.target), a.batch > 1 ? 2 * a.target_image : 0,
                          a.targets > 1 ? 2 * a.target_channel : 0});
  if (a.joined)
    a.store_unit = unit_of({a.store_unit, parts > 1 ? part : 0, last_part});
  else if (a.across)
    a.store_unit = unit_of({a.store_unit, a.out_width > 1 ? 2 * a.target_row : 0, a.bands > 1 ? 2 * a.rows : 0,
                            2 * (a.out_height - (a.bands - 1) * int64_t{a.rows})});
  else
    a.store_unit = unit_of({a.store_unit, a.out_height > 1 ? 2 * a.target_row : 0, 2 * last});
  a.pairs = last % 2 == 0;
  a.by_weight_side = Divider(std::min(a.kernel_w, cut.threads));
  a.weight_lanes = cut.threads / std::min(a.kernel_w, cut.threads);
  a.load = a.across ? LargeWalk(ceil_div(source_rows, a.load_unit == 8 ? 16 : 8), groups, std::max(cut.threads / 32, 1),
                                a.source_image, source_plane)
                    : LargeWalk(groups * (kLargeGroupBytes / a.load_unit), source_rows, cut.threads, a.source_image,
                                source_plane);
  const int64_t run = a.joined ? 2 * columns * a.rows : out_pitch, runs = a.joined ? 1 : a.across ? columns : a.rows;
  a.store = LargeWalk(std::max<int64_t>(run / a.store_unit, 1), runs, cut.threads, a.target_image, out_plane);
  const int64_t image_groups = ceil_div(a.batch, a.images);
  a.tasks = static_cast<int>(std::min<int64_t>(image_groups * a.bands * a.ranges * a.targets, kMostTasks + 1));
  a.by_images = Divider(image_groups), a.by_bands = Divider(a.bands), a.by_ranges = Divider(a.ranges);
  a.by_image_tiles = Divider(a.image_tiles), a.by_column_tiles = Divider(a.column_tiles);
  return bytes;
}

template <int value>
using Constant = std::integral_constant<int, value>;

// The cuts that are compiled. Calls visit(stride, tiles, depth, blocks_m, across) with one after the other until it
// returns true.
template <typename Visitor>
bool visit_variants(std::true_type across, Visitor&& visit) {
  const auto visit_depths = [&](auto tiles) {
    return visit(Constant<1>{}, tiles, Constant<5>{}, Constant<2>{}, across) ||
           visit(Constant<1>{}, tiles, Constant<9>{}, Constant<2>{}, across);
  };
  return visit_depths(Constant<4>{}) || visit_depths(Constant<7>{});
}

template <typename Visitor>
bool visit_variants(std::false_type across, Visitor&& visit_all) {
  const auto visit = [&](auto... parts) { return visit_all(parts..., across); };
  const auto visit_depths = [&](auto tiles, auto blocks_m) {
    return visit(Constant<1>{}, tiles, Constant<3>{}, blocks_m) || visit(Constant<1>{}, tiles, Constant<5>{}, blocks_m);
  };
  const auto visit_tiles = [&](auto tiles) {
    return visit_depths(tiles, Constant<1>{}) || visit_depths(tiles, Constant<2>{});
  };
  const auto visit_deep = [&](auto depth, auto blocks_m) {
    return visit(Constant<1>{}, Constant<7>{}, depth, blocks_m);
  };
  return visit_tiles(Constant<2>{}) || visit_tiles(Constant<4>{}) || visit_tiles(Constant<7>{}) ||
         visit_depths(Constant<2>{}, Constant<4>{}) || visit_deep(Constant<9>{}, Constant<1>{}) ||
         visit_deep(Constant<9>{}, Constant<2>{}) ||
         visit(Constant<2>{}, Constant<2>{}, Constant<3>{}, Constant<1>{}) ||
         visit(Constant<2>{}, Constant<4>{}, Constant<3>{}, Constant<1>{});
}

// What the tiles side by side in a row of a plane take for 16 rows of it and two rows of the kernel.
struct Effort {
  int64_t multiplies = 0;             // of 16 x 16 by 16 x 8
  int64_t loads = 0, band_loads = 0;  // of A, and of half a band matrix

  Effort(const Large& a, const Bands& bands, const Cut& cut) {
    const int64_t tiles = ceil_div(a.out_width, kLargeGroup), groups = ceil_div(a.width, kLargeGroup);
    const int64_t width = (cut.tiles - 1) * a.stride + cut.depth;
    for (int64_t tile = 0; tile < tiles; tile += cut.tiles)
      for (int64_t d = 0; d < bands.count; d += cut.depth) {
        const int64_t group = tile * a.stride + bands.first + d;
        const int64_t low = std::max<int64_t>(-group, 0), high = std::min(groups - group, width);
        if (low >= high) continue;
        band_loads += 2 * cut.depth, loads += high - low;
        for (int64_t c = low; c < high; ++c)
          for (int64_t k = 0; k < cut.depth; ++k)
            multiplies += c >= k && (c - k) % a.stride == 0 && (c - k) / a.stride < cut.tiles;
      }
  }
};

// Pairs of kernel rows that all tiles of `rows` rows of a plane take together; of many tiles, some stand for all.
int64_t pairs_of(const Large& a, int64_t rows) {
  const int64_t each = std::max<int64_t>(ceil_div(a.out_height, rows) / 64, 1);
  int64_t pairs = 0;
  for (int64_t row = 0; row < a.out_height; row += each * rows) {
    const int64_t last = std::min<int64_t>(row + rows, a.out_height) - 1;
    const int64_t begin = std::max<int64_t>(a.padding_h - last * a.stride, 0);
    const int64_t end = std::min<int64_t>(a.height + a.padding_h - row * a.stride, a.kernel_h);
    pairs += each * std::max<int64_t>(ceil_div(end - begin, 2), 0);
  }
  return pairs;
}

// The expected time of a cut that is applied, in cycles. The constants were fitted to some 3000 timings of cuts; most
// are instructions, with what they wait for.
double time_of(const Large& a, const Cut& cut, const Effort& effort, int64_t row_pairs, int64_t bytes,
               int multiprocessors) {
  const double tile_images = std::max(16 * cut.blocks_m >> cut.rows_log, 1), threads = cut.threads;
  const double planes = std::ceil(a.batch / tile_images) * a.targets, pairs = row_pairs * planes;
  const double row_tiles = std::ceil(a.out_height / static_cast<double>(1 << cut.rows_log));
  const double units = row_tiles * a.column_tiles * a.ranges * planes;
  const double chunks = ceil_div(a.depth, cut.depth), columns = a.column_tiles * a.ranges;
  const double multiply =
      pairs * std::max(1.67 * effort.multiplies * cut.blocks_m, 4. * effort.loads * cut.blocks_m + effort.band_loads);
  const double load = static_cast<double>(a.images) * a.source_plane / a.load_unit;
  const double store = static_cast<double>(a.images) * a.out_plane / a.store_unit;
  const double issue =
      pairs * ((effort.multiplies + effort.loads) * cut.blocks_m + effort.band_loads + 15 * chunks * columns) +
      units * (20 + 85 * cut.blocks_m * cut.tiles + 110 * chunks) + a.tasks * (1.3 * load + 10 * store + 5 * threads);
  const int registers = std::min(50 + (4 * cut.tiles + 8) * cut.blocks_m + 2 * cut.depth, 128);
  const double resident =
      std::max(std::min({(228 << 10) / static_cast<int>(bytes + 1024), 65536 / (registers * cut.threads),
                         2048 / cut.threads, static_cast<int>(ceil_div(a.tasks, multiprocessors))}),
               1);
  const double tasks = ceil_div(a.tasks, multiprocessors);  // of a multiprocessor
  const double work = std::hypot(multiply, 0.18 * issue) / a.tasks * (1 + 140 / (resident * threads));
  return tasks * (work + 500 / resident);
}

// The cut that is expected to take the least time.
Cut choose_cut(Large a, int64_t shared_bytes, int multiprocessors) {
  const Bands bands(a.kernel_w, a.stride, a.padding_w, a.width, a.out_width);
  const int64_t tiles = ceil_div(a.out_width, kLargeGroup);
  Cut best;
  const auto next = [](int64_t parts, int64_t most) { return parts == most ? most + 1 : std::min(2 * parts, most); };
  const auto consider = [&](int stride, int cut_tiles, int depth, int blocks_m, bool across) {
    if (stride != a.stride || across != a.across) return false;
    Cut cut;
    cut.tiles = cut_tiles, cut.depth = depth, cut.blocks_m = blocks_m;
    const Effort effort(a, bands, cut);
    const int64_t columns = ceil_div(tiles, cut.tiles);
    // Across, 8 rows are exchanged with 8 columns.
    for (cut.rows_log = across ? 3 : 0; 1 << cut.rows_log <= 16 * blocks_m; ++cut.rows_log) {
      const int tile_images = 16 * blocks_m >> cut.rows_log, tile_rows = 1 << cut.rows_log;
      const int64_t row_tiles = ceil_div(a.out_height, tile_rows), pairs = pairs_of(a, tile_rows);
      for (int64_t parts = 1; parts <= row_tiles; parts = next(parts, row_tiles))
        for (int64_t ranges = 1; ranges <= columns; ranges = next(ranges, columns)) {
          cut.rows = static_cast<int>(ceil_div(row_tiles, parts) * tile_rows);
          cut.columns = static_cast<int>(ceil_div(columns, ranges));
          for (cut.images = tile_images; cut.images < 2 * std::max(a.batch, tile_images); cut.images *= 2) {
            cut.threads = kMaxLargeThreads;
            const int64_t bytes = apply(a, cut);
            if (bytes > shared_bytes || a.tasks > kMostTasks) break;
            const int units = a.row_tiles * a.column_tiles * a.image_tiles;
            for (; cut.threads >= 32; cut.threads /= 2) {
              if (cut.threads > 32 * units && cut.threads > 32) continue;  // a warp would have nothing to do
              cut.time = time_of(a, cut, effort, pairs, bytes, multiprocessors);
              if (cut.time < best.time) best = cut;
            }
          }
        }
    }
    return false;
  };
  visit_variants(std::false_type{}, consider), visit_variants(std::true_type{}, consider);
  return best;
}

// Calls visit(kernel) with the kernel of a cut.
template <typename T, typename Visitor>
void visit_kernel(const Large& a, const Cut& cut, Visitor&& visit) {
  const auto visit_chosen = [&](auto stride, auto tiles, auto depth, auto blocks_m, auto across) {
    if (a.stride != stride || cut.tiles != tiles || cut.depth != depth || cut.blocks_m != blocks_m ||
        a.across != across)
      return false;
    visit(toeplitz_large<T, stride, tiles, depth, blocks_m, across>);
    return true;
  };
  if (!visit_variants(std::false_type{}, visit_chosen) && !visit_variants(std::true_type{}, visit_chosen))
    throw std::runtime_error("dwconv: toeplitz_large finds no cut for this problem");
}

struct Decision {
  Cut cut;
  int blocks;  // that a device has at once
};

template <typename T>
Decision decide(Large a, const Cut& cut, const Device& device) {
  int resident = 0;
  const auto bytes = static_cast<size_t>(apply(a, cut));
  visit_kernel<T>(a, cut, [&](auto kernel) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, cut.threads, bytes);
  });
  return {cut, std::max(resident, 1) * device.multiprocessors};
}

template <typename T>
void launch(Large a, const Decision& decision, cudaStream_t stream) {
  const int64_t bytes = apply(a, decision.cut);
  // Long tasks are better shared out as blocks end; blocks of short ones take runs of them, all as many.
  constexpr double kLong = 40e3;  // cycles
  const bool is_long = decision.cut.time * decision.blocks > kLong * a.tasks;
  const int64_t blocks = is_long ? a.tasks : ceil_div(a.tasks, ceil_div(a.tasks, decision.blocks));
  visit_kernel<T>(a, decision.cut, [&](auto kernel) {
    launch_early(kernel, a, blocks, decision.cut.threads, stream, {.shared_bytes = bytes});
  });
  check_launch("toeplitz_large");
}

template <typename T>
void launch(const LargeProblem& p, bool across, cudaStream_t stream) {
  const Device& device = current_device();
  static thread_local Decisions<16, Decision> decisions;
  const Large a = arguments_of(p, across);
  launch<T>(
      a,
      decisions({device.id, p.shared_memory, a.batch, a.targets, a.height, a.width, a.out_height, a.out_width,
                 a.kernel_h, a.kernel_w, a.padding_h, a.padding_w, 2 * a.stride + across, a.source_row, a.target_row},
                [&] {
                  const Cut cut = choose_cut(a, p.shared_memory, device.multiprocessors);
                  return decide<T>(a, cut, device);
                }),
      stream);
}

// Whether copies of images are better made with rows and columns exchanged.
bool exchange_pays(const Problem& problem) {
  if (!can_exchange(problem)) return false;
  const Device& device = current_device();
  static thread_local Decisions<12, bool> decisions;
  const auto time = [&](Problem p) {
    p.input = {nullptr, {p.channels * p.height * p.width, p.height * p.width, p.width, 1}};
    p.output = {nullptr, {p.filters() * p.out_height * p.out_width, p.out_height * p.out_width, p.out_width, 1}};
    return choose_cut(arguments_of(p), p.shared_memory, device.multiprocessors).time;
  };
  constexpr double kLess = 0.9;
  return decisions({device.id, problem.shared_memory, problem.batch, problem.channels, problem.filters(),
                    problem.height, problem.width, problem.kernel_h, problem.kernel_w, problem.padding_h,
                    problem.padding_w, 4 * problem.stride_h + static_cast<int64_t>(problem.pass)},
                   [&] { return time(exchange(problem)) < kLess * time(problem); });
}

// Whether a tall kernel is better taken across.
bool across_pays(const Problem& p) {
  if (!has_rows(p.input, p.width) || !has_rows(p.output, p.out_width) || p.stride_h != 1 ||
      p.kernel_h < 2 * p.kernel_w || p.width == 1 || p.out_width == 1 || p.height == 1 || p.out_height == 1)
    return false;
  const Device& device = current_device();
  static thread_local Decisions<12, bool> decisions;
  const auto time = [&](const Problem& p, bool across) {
    return choose_cut(arguments_of(p, across), p.shared_memory, device.multiprocessors).time;
  };
  constexpr double kLess = 0.8;  // exchanging takes some, too
  return decisions({device.id, p.shared_memory, p.batch, p.channels, p.multiplier, p.height, p.width, p.kernel_h,
                    p.kernel_w, p.padding_h, p.padding_w, static_cast<int64_t>(p.pass)},
                   [&] { return time(exchange(p), true) < kLess * time(p, false); });
}

// Rows of an odd number of columns are copied with so many zeros behind that all are whole units of 16 bytes.
int64_t copied_width(int64_t width) {
  return width % 2 != 0 ? round_up(width, kLargeGroup) : width;
}

// A way for whole planes, if one takes the problem. Returns whether.
bool launch_whole_planes(const LargeProblem& p, cudaStream_t stream) {
  return launch_toeplitz_large_images(p, stream) || launch_toeplitz_large_groups(p, stream) ||
         launch_toeplitz_large_planes(p, stream);
}

void launch_any_size(const LargeProblem& p, bool across, cudaStream_t stream) {
  if (p.dtype == DType::kFloat16)
    launch<__half>(p, across, stream);
  else
    launch<__nv_bfloat16>(p, across, stream);
}

}  // namespace

void launch_toeplitz_large(const Problem& problem, const Allocate& allocate, cudaStream_t stream) {
  if (across_pays(problem)) {
    const Problem exchanged = exchange(problem);
    if (!launch_toeplitz_tall_groups(exchanged, stream) && !launch_toeplitz_tall_planes(exchanged, stream))
      launch_any_size(exchanged, true, stream);
    return;
  }
  LargeProblem p = exchange_pays(problem) ? exchange(problem) : problem;
  const Mapping map(p);
  const bool forward = p.pass == Pass::kForward;
  View &source = forward ? p.input : p.output, &target = forward ? p.output : p.input;
  int64_t &width = forward ? p.width : p.out_width, &out_width = forward ? p.out_width : p.width;
  const View given = source, result = target;
  const auto is_odd = [&](const View& view, int64_t channels, int64_t height, int64_t width) {
    return width % 2 != 0 && can_have_wider_rows(view, p.batch, channels, height, width);
  };
  if (!has_rows(given, map.width)) {
    width = copied_width(map.width);
    source = new_planes_of_lines(p.batch, map.sources, map.height, width, allocate);
    launch_relayout(given, source, true, p.batch, map.sources, map.height, map.width, stream);
  } else if (is_odd(given, map.sources, map.height, map.width)) {
    // One by one, columns would take longer than this copy.
    width = copied_width(map.width);
    source = new_planes(p.batch, map.sources, map.height, width, allocate);
    launch_wider_rows(given.data, map.width, source.data, width, p.batch * map.sources * map.height, stream);
  }
  if (!has_rows(result, map.out_width)) {
    out_width = copied_width(map.out_width);
    target = new_planes_of_lines(p.batch, map.targets, map.out_height, out_width, allocate);
    if (!launch_whole_planes(p, stream)) launch_any_size(p, false, stream);
    launch_relayout(result, target, false, p.batch, map.targets, map.out_height, map.out_width, stream);
  } else if (is_odd(result, map.targets, map.out_height, map.out_width)) {
    // Ways for whole planes are so much faster that another copy pays; others where there is much to store.
    constexpr int64_t kMuch = 3 << 20;
    const int64_t rows = p.batch * map.targets * map.out_height;
    out_width = copied_width(map.out_width);
    target = new_planes(p.batch, map.targets, map.out_height, out_width, allocate);
    bool copies = launch_whole_planes(p, stream);
    if (!copies) {
      copies = rows * map.out_width >= kMuch;
      if (!copies) out_width = map.out_width, target = result;
      launch_any_size(p, false, stream);
    }
    if (copies) launch_wider_rows(target.data, out_width, result.data, map.out_width, rows, stream);
  } else if (!launch_whole_planes(p, stream)) {
    launch_any_size(p, false, stream);
  }
}

}  // namespace dwconv
