// How the plans `fft` and `fft_grad_weight` cut planes, and what that costs. Host code, for the table of plans too.
#pragma once

#include <algorithm>
#include <array>

#include "../problem.h"

namespace dwconv {

// Lengths of transforms, of rows and of columns alike.
constexpr std::array<int, 7> kFftLengths = {32, 40, 48, 64, 72, 80, 96};

// Frequencies of a row: those of real numbers come in conjugate pairs, of which one is kept.
constexpr int fft_columns(int length) {
  return length / 2 + 1;
}

// Bytes from row to row of a plane in shared memory, real or transformed: a multiple of 16 and an odd one, so that
// neighbouring rows meet different banks.
constexpr int fft_row_bytes(int length) {
  return 4 * (length + 4);
}

// Complex numbers of a transformed plane.
constexpr int fft_spectrum(int length) {
  return length * fft_columns(length);
}

// One side of planes, as a transform of some length sees it. A plane of `size` pixels that `padding` zeros precede
// makes `targets` outputs. What goes round the circle must not meet: of a whole plane pixels and padding have to fit,
// of a tile all that its outputs need.
struct FftSide {
  int64_t size, targets, kernel, padding;
  int64_t tile = 0, tiles = 0;  // outputs of a tile; no tiles where the length does not serve

  FftSide(int64_t size, int64_t targets, int64_t kernel, int64_t padding, int64_t length)
      : size(size), targets(targets), kernel(kernel), padding(padding) {
    if (kernel > length) return;
    const int64_t most = size + padding <= length ? targets : length - kernel + 1;
    tiles = (targets + most - 1) / most;
    tile = (targets + tiles - 1) / tiles;
    if (tiles > 1) tile = std::min((tile + 3) / 4 * 4, most);  // tiles begin with 16 bytes if they can
    tiles = (targets + tile - 1) / tile;
  }
  // Rows of a plane in shared memory: pixels of a tile, or its outputs. They go through transforms in pairs.
  int64_t sources() const { return std::min(size, tiles > 1 ? tile + kernel - 1 : size); }
  int64_t rows() const { return (std::max(sources(), tile) + 1) / 2 * 2; }
};

struct FftCut {
  int length;
  FftSide h, w;

  FftCut(const Problem& p, int length) : length(length), h(side(p, true, length)), w(side(p, false, length)) {}

  bool serves() const { return h.tiles > 0 && w.tiles > 0; }
  int64_t tiles() const { return h.tiles * w.tiles; }

  // Shared memory of a block that has `images` of them.
  int64_t bytes(const Problem& p, int64_t images) const {
    const int64_t row = fft_row_bytes(length), columns = fft_columns(length);
    if (p.pass != Pass::kGradWeight) return images * h.rows() * row + 8 * fft_spectrum(length);
    return images * 2 * (std::max<int64_t>(h.rows(), length / 2) * row + 8 * columns * length / 2);
  }

  // In products that large_float32 makes in the time, per plane: 1.1 to 1.7 L^3 where measured, the
  // most for short ones.
  double cost() const { return 1.6 * length * length * length * tiles(); }

 private:
  static FftSide side(const Problem& p, bool vertical, int64_t length) {
    const int64_t size = vertical ? p.height : p.width, out_size = vertical ? p.out_height : p.out_width;
    const int64_t kernel = vertical ? p.kernel_h : p.kernel_w, padding = vertical ? p.padding_h : p.padding_w;
    if (p.pass == Pass::kGradInput) return {out_size, size, kernel, kernel - 1 - padding, length};
    return {size, out_size, kernel, padding, length};
  }
};

// The cut that costs least; one that does not serve if none does.
inline FftCut choose_fft_cut(const Problem& p) {
  FftCut best(p, kFftLengths.back());
  for (const int length : kFftLengths) {
    const FftCut cut(p, length);
    if (cut.serves() && cut.bytes(p, 1) <= p.shared_memory &&
        (!best.serves() || best.bytes(p, 1) > p.shared_memory || cut.cost() < best.cost()))
      best = cut;
  }
  return best;
}

}  // namespace dwconv
