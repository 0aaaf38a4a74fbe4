// How the work of march_channels_last.cuh is cut into slabs of channels, spans of columns, and shares of rows: as an
// estimate of the time that each cut takes has it.
#pragma once

#include <cmath>
#include <limits>
#include <numeric>

#include "march_channels_last_tile.cuh"

namespace dwconv {
namespace {

// How the rows of a slab and a span are shared: see March.
struct Deal {
  int workers = 1, grain = 1;
};

// How a pass is cut: see March.
struct Cut {
  int lanes, strips, group;
  int line;  // see cut_pixels
  Deal deal;
};

// What there is to know of a class of tiles.
struct TileSize {
  int kernel_h, kernel_w, channels, fan, pair, step, strip, live, extent_h, extent_w;
  bool leaves, skips, joins, halves, boxes, shifts;
  int loading;                    // threads for that alone where rows come by bulk copies
  int threads_per_block[2];       // at most, where rows come without bulk copies and with them
  int registers[2] = {128, 128};  // of a thread
};

// Fills in how rows are shared.
void take(March& a, const Deal& deal) {
  a.workers = deal.workers, a.shares = Shares(a.all_units, deal.workers, a.all_units / a.units, deal.grain);
}

// Fills in what follows from a cut.
void apply(March& a, const Cut& cut, const TileSize& tile, int64_t element) {
  a.lanes = cut.lanes, a.strips = cut.strips, a.group = cut.group;
  take(a, cut.deal);
  const int64_t units_w = ceil_div(a.target_width + a.skew_w, tile.pair);
  a.by_lanes = Divider(cut.lanes), a.by_slabs = Divider(ceil_div(a.filters, cut.lanes * tile.channels));
  a.by_spans = Divider(ceil_div(units_w, cut.strips * tile.strip));
  a.by_units = Divider(a.units), a.by_fan_out = Divider(a.fan_out);
  const int pixel_bytes = static_cast<int>(cut.lanes * tile.channels * element);
  const int64_t part = std::min<int64_t>(cut.lanes * tile.channels, a.filters) * element;
  const bool split = tile.channels == 2 && (a.split || a.split_stores), shifted = a.source.shift > 0;
  const bool narrow =
      pixel_bytes < 32 && !split && a.target_pixel_bytes == pixel_bytes && a.filters == cut.lanes * tile.channels;
  a.warp_strips = narrow ? 32 / cut.lanes : 0;
  a.threads = narrow ? static_cast<int>(ceil_div(cut.strips, a.warp_strips)) * 32 : cut.lanes * cut.strips;
  const int64_t source_part = part * a.fan_in / a.fan_out;
  if (shifted)
    a.bulk = a.bulk && tile.shifts && !narrow && !a.split_stores;
  else
    a.bulk = a.bulk && !split;
  // A bulk copy of less than some 500 bytes takes longer than its bytes do; but where a row of outputs takes two rows,
  // other copies take as many instructions as the products do.
  const int least = tile.boxes ? kUnit : tile.step > 1 ? 384 : 512;
  const auto pays = [&](int64_t bytes, int64_t pixel) { return bytes == pixel || bytes >= least; };
  // Pixels of more bytes take no longer each by itself than as a run, and leave nothing to clear.
  constexpr int kMostRun = 1 << 10;
  a.source.row_runs = a.bulk && shifted && source_part == a.source.bytes && source_part < kMostRun;
  // Slabs of pixels that are no whole units, where a block has too few threads for all channels.
  constexpr int kLeastApart = 256;
  const int room = tile.threads_per_block[a.bulk] - (a.bulk ? tile.loading : 0);
  const bool apart = a.bulk && tile.joins && tile.channels < 3 && a.source.joined && a.filters > room * tile.channels &&
                     source_part >= kLeastApart;
  const int line = a.bulk ? cut.line : kUnit;
  cut_pixels(a.source, source_part, (cut.strips * tile.strip - 1) * tile.step + tile.extent_w, a.threads, line, apart);
  a.bulk = a.bulk && (a.source.joined  ? tile.joins
                      : a.source.apart ? true
                                       : a.source.unit == kUnit && pays(a.source.slab_bytes, a.source.pixel_bytes));
  if (tile.boxes)
    a.bulk = a.bulk && a.source.slab_bytes % kUnit == 0 && a.source.slab_bytes <= kMostBoxSide * element &&
             a.source.columns <= kMostBoxSide;
  a.slot_bytes = static_cast<int>(round_up(a.source.ring_row_bytes(), line));
  if (tile.boxes && a.bulk) a.slot_bytes = static_cast<int>(round_up(a.slot_bytes, kBoxUnit));
  a.ring_bytes = kGroups * cut.group * a.slot_bytes;
  const int row_bytes = static_cast<int>(round_up(cut.strips * tile.strip * tile.pair * pixel_bytes, kUnit));
  const bool leaves = tile.leaves && a.bulk && a.wide && pixel_bytes % kUnit == 0 && pays(part, a.target_pixel_bytes);
  a.row_bytes = leaves ? row_bytes : 0;
  if (leaves) a.warp_strips = 0, a.threads = cut.lanes * cut.strips;
  a.bulk = a.bulk && (a.warp_strips == 0 || a.source.joined);
  a.stage_bytes = static_cast<int>(round_up(a.warp_strips * tile.strip * tile.pair * pixel_bytes, kUnit));
}

// Threads of a block, and bytes of shared memory.
int threads_of(const March& a, const TileSize& tile) {
  return a.bulk ? static_cast<int>(round_up(a.threads, 32)) + tile.loading : a.threads;
}
int shared_bytes(const March& a) {
  return kRing + a.ring_bytes + a.threads / 32 * a.stage_bytes + 2 * a.row_bytes + a.taps_bytes;
}

// Blocks that fit a multiprocessor, none if a cut is not possible.
int64_t resident_blocks(const March& a, const TileSize& tile, const Device& d) {
  if (threads_of(a, tile) > tile.threads_per_block[a.bulk] || shared_bytes(a) > d.shared_per_block) return 0;
  if (!a.bulk && !a.source.joined && a.source.units > a.threads) return 0;
  // Each scheduler has the registers of whole warps. The estimate of the other tiles was fitted without that.
  const int64_t warps = ceil_div(threads_of(a, tile), 32), registers = round_up(tile.registers[a.bulk], 8);
  const bool schedulers = tile.skips || tile.loading == 0;
  const int64_t most = schedulers ? 4 * ((16 << 10) / (32 * registers)) : (64 << 10) / (32 * registers);
  return std::min<int64_t>({d.shared_per_multiprocessor / (shared_bytes(a) + 1024), most / warps, 64 / warps, 32});
}

// Calls visit(Deal) with the ways to share rows, where `resident` blocks fit a multiprocessor: as many even shares as
// blocks run at once, or so many of whole images; bands of images, more than run at once.
template <typename Visit>
void for_each_deal(const March& a, const TileSize& tile, int64_t resident, const Device& d, Visit&& visit) {
  const int64_t parts = int64_t{a.by_slabs.divisor} * a.by_spans.divisor, images = a.all_units / a.units;
  const int64_t most = std::max<int64_t>(resident * d.multiprocessors / parts, 1);
  visit(Deal{static_cast<int>(std::min<int64_t>(most, a.all_units)), 1});
  // Whole images, if no multiprocessor then has far more of them than others.
  const int64_t whole = ceil_div(images, ceil_div(images, most)), blocks = whole * parts;
  if (4 * round_up(blocks, d.multiprocessors) <= 5 * blocks || blocks <= d.multiprocessors)
    visit(Deal{static_cast<int>(whole), a.units});
  // Three times as many rows as two bands need both; twice, where no columns are read twice, too.
  const double times = tile.extent_w == 1 ? 2 : 3;
  const double least = std::max(3., times * (tile.extent_h - tile.step) / tile.step);
  for (int64_t bands = 1; bands * least <= a.units; bands *= 2)
    if (images * bands > most) visit(Deal{static_cast<int>(images * bands), 1});
}

// What a block has to do that has the largest share of the rows.
struct Work {
  double rows, rolls;         // that are multiplied, and that are not; counted as units
  double units;               // of the target
  double source_rows, again;  // that are loaded; and more of them, which another share loads, too
};

Work work_of(const March& a, const TileSize& tile) {
  const int grain = a.shares.grain;
  const double units = static_cast<double>(ceil_div(a.all_units / grain, a.workers) * grain);
  // Even shares begin and end within an image, if they do not happen to be of whole ones.
  const int share = a.all_units / a.workers;
  const bool aligned = grain > 1 || (a.all_units % a.workers == 0 && (share % a.units == 0 || a.units % share == 0));
  const double images = aligned ? std::max(units / a.units, 1.) : units / a.units + 1;
  const double most = std::max(images, units / a.units) * a.height, own = std::min(units * tile.step, most);
  const double again = std::min(units * tile.step + images * (tile.extent_h - tile.step), most) - own;
  return {units + again / tile.step, images * (tile.live - 1), units, own, again};
}

// Estimates how long a cut takes, in nanoseconds, from what instructions, memory and latency cost. The numbers are
// fitted to 2,400 timings of cuts on an H100, with each of the three felt beside the others.
double time_of(const March& a, const TileSize& tile, int64_t element, int64_t resident, const Device& d) {
  const Work work = work_of(a, tile);
  const double multiprocessors = d.multiprocessors;
  const double parts = static_cast<double>(a.by_slabs.divisor) * a.by_spans.divisor;
  const double grid = parts * a.workers, places = static_cast<double>(resident) * multiprocessors;
  const double waves = std::max(grid / places, 1.);
  const bool many = grid > places;  // blocks begin as others end

  const double warps = std::ceil(a.threads / 32.), unpack = element == 2;
  const double outputs = tile.strip * tile.pair * tile.pair * tile.channels;
  const double columns = (tile.strip - 1) * tile.step + tile.extent_w;
  const double load = a.bulk ? 0 : 140 + 131 * a.slot_bytes / (a.threads * (a.source.joined ? kUnit : a.source.unit));
  const double products = tile.kernel_h * tile.kernel_w * tile.strip * tile.channels * tile.fan;
  const double row = products + tile.step * (20 + load) +
                     tile.step * tile.fan * columns * (2 + 0.57 * unpack * tile.channels) +
                     outputs / tile.channels * unpack;
  const double roll = 0.43 * tile.live * outputs + 15;
  const double skipped = tile.skips ? 0.5 * (work.rows - work.units) * products : 0;
  const double blocks = many ? grid / multiprocessors : std::ceil(grid / multiprocessors);  // of a multiprocessor
  // Where much is multiplied, the scheduler with the most warps of a block ends last.
  const double uneven = tile.skips ? std::ceil(warps / 4) * 4 / warps : 1;
  const double instructions = uneven * blocks * warps * (2675 + work.rows * row + work.rolls * roll - skipped) / 9.9;

  const double pixel = a.source.bytes, outer = (a.by_spans.divisor - 1.) * std::max(tile.extent_w - tile.step, 0);
  const double in = pixel * a.width * work.source_rows * a.workers;
  const double out = static_cast<double>(a.all_units / a.units) * a.target_height * a.target_width * a.filters *
                     element / (tile.halves ? 2 : 1);
  const double again = pixel * a.width * work.again * a.workers;
  const double beside = pixel * outer * (work.source_rows + work.again) * a.workers;
  double bytes = in + out + 0.012 * again + (tile.skips ? 0.3 : 0.88) * beside;
  if (tile.skips && a.bulk && !tile.boxes && a.by_slabs.divisor > 1) bytes *= 1.05;  // a copy for each pixel
  if (a.by_slabs.divisor > 1 && a.source.slab_bytes < 128) bytes *= 1 + 0.1 * (128 - a.source.slab_bytes) / 128;
  const double on_the_way = std::min(grid, places) / multiprocessors * (kGroups - 1) * a.group * a.slot_bytes;
  // The more pages of memory are in use at a time, the slower it gets: blocks side by side had better be neighbours.
  constexpr double kPage = 2 << 20;
  const double pages = std::min<double>(a.workers, places / parts) * std::min((in + out) / a.workers / kPage, 2.);
  const double memory =
      bytes / 4217 * (1 + 0.111 * std::pow(34e3 / on_the_way, 2)) * (1 + 0.371 * pages / (pages + 37));

  const double columns_inside = std::min(a.source.columns, a.width);
  const double copying = a.source.apart ? 20 * blocks * (work.source_rows + work.again) * columns_inside : 0;
  const double waits = tile.step * (56 + 315. / a.group);  // for the source rows of a unit
  const double rounds = std::ceil(waves - 0.05);           // of blocks, one after the other
  const double latency = rounds * (3413 + ((work.rows + work.rolls) * (0.98 * row + waits) - 0.98 * skipped) / 1.75);
  // Multiprocessors that all have as much to do wait for those that get the least of memory's bandwidth, and others for
  // the blocks that end last, or for each block's first rows, if there is no other block meanwhile.
  const double tail = !many ? 0 : 0.237 / waves + (resident == 1 ? 0.179 : 0);
  const auto fourth = [](double x) { return x * x * x * x; };
  return 1680. * a.group / tile.step +
         std::sqrt(std::sqrt(fourth(instructions * (1 + tail)) + fourth(memory * (1 + (many ? tail : 0.184))) +
                             fourth(latency) + fourth(copying)));
}

Cut cut_for(const March& whole, const TileSize& tile, int64_t element, const Device& d) {
  const int64_t all = ceil_div(whole.filters, tile.channels);
  const int64_t strips_w = ceil_div(ceil_div(whole.target_width + whole.skew_w, tile.pair), tile.strip);
  const int room = tile.threads_per_block[whole.bulk] - (whole.bulk ? tile.loading : 0);
  // Slabs begin at a multiple of 16 bytes in both arrays, and with the first filter of a channel.
  const int64_t granule =
      std::lcm(std::max<int64_t>(kUnit * whole.fan_out / (element * tile.channels), 1), whole.fan_out);
  constexpr int kFewThreads = 64;  // fewer were never timed: only where there is nothing else
  Cut best{};
  double best_time = std::numeric_limits<double>::infinity();
  int64_t before = 0;
  for (int64_t slabs = 1; slabs <= all; ++slabs) {
    const int64_t lanes = slabs == 1 ? all : round_up(ceil_div(all, slabs), granule);
    if (lanes > room || lanes == before) continue;
    if (lanes < 16 && slabs > 1 && best.lanes > 0) break;
    before = lanes;
    for (int64_t strips = 1; strips <= std::min(room / lanes, std::max<int64_t>(strips_w, 2)); ++strips) {
      // As few strips as make so many spans.
      if (strips > 1 && strips < strips_w && ceil_div(strips_w, strips) == ceil_div(strips_w, strips - 1)) continue;
      for (const int group : {1, 2, 3}) {
        March a;
        Cut cut{static_cast<int>(lanes), static_cast<int>(strips), group, kUnit, {}};
        const auto blocks_for = [&](int line) {
          a = whole, cut.line = line;
          apply(a, cut, tile, element);
          return resident_blocks(a, tile, d);
        };
        const int64_t resident = blocks_for(kUnit);
        if (resident == 0) continue;
        // Of shifted pixels, as long a line as leaves room for as many blocks.
        constexpr int kLine = 128;
        if (a.bulk && a.source.shift > 0)
          for (int line = kLine; blocks_for(line) < resident; line /= 2) continue;
        const bool few = a.threads < kFewThreads && a.warp_strips == 0;
        for_each_deal(a, tile, resident, d, [&](const Deal& deal) {
          take(a, deal);
          const double time = time_of(a, tile, element, resident, d) * (few ? 4 : 1);
          if (time < best_time * 0.995) best_time = time, best = cut, best.deal = deal;
        });
      }
    }
  }
  if (best.lanes == 0) throw std::runtime_error("dwconv: rows of this size do not fit the GPU's shared memory");
  return best;
}

}  // namespace
}  // namespace dwconv
