// Which splats reach which tile, in depth order. Included by splat.cpp only.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "pool.h"

namespace hh {

constexpr int kTile = 16;
constexpr int64_t kMaxIntersections = int64_t(1) << 27;

// An array that is not initialised and keeps its capacity.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  void resize(size_t n) {
    if (n > capacity_) {
      std::free(data_);
      data_ = nullptr, size_ = capacity_ = 0;
      const size_t bytes = (n * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      if (!data_) throw std::bad_alloc();
      capacity_ = bytes / sizeof(T);
    }
    size_ = n;
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  int64_t bytes() const { return static_cast<int64_t>(capacity_ * sizeof(T)); }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

struct Bins {
  Buffer<int32_t> box, order, heavy_first;  // box (n,4): tile range x0 y0 x1 y1 of each splat, empty when culled
  Buffer<int64_t> offset, tile_start;
  Buffer<int32_t> at;
  Buffer<uint32_t> key[2];
  Buffer<int32_t> index[2];

  int64_t bytes() const {
    return box.bytes() + order.bytes() + heavy_first.bytes() + offset.bytes() + tile_start.bytes() + at.bytes() +
           2 * (key[0].bytes() + index[0].bytes());
  }

  // Sets offset: the first slot of each splat. Returns the number of (splat, tile) pairs.
  int64_t count(int n) {
    offset.resize(static_cast<size_t>(n) + 1);
    int64_t total = 0;
    for (int i = 0; i < n; ++i) {
      offset[i] = total;
      const int32_t* b = &box[4 * static_cast<size_t>(i)];
      total += static_cast<int64_t>(b[2] - b[0]) * (b[3] - b[1]);
    }
    return offset[n] = total;
  }

  // Stable counting sorts: of the visible splats by depth, digit by digit, then into tiles, so that each tile's list comes out in
  // depth order. Each sort is cut into parts, which count and then place on their own; the order is the same however many there are.
  void fill(int n, int tiles_x, int tiles, const float* depth, int threads) {
    for (int i = 0; i < 2; ++i) key[i].resize(n), index[i].resize(n);
    uint32_t lo = ~0u, hi = 0;
    size_t m = 0;
    for (int i = 0; i < n; ++i) {
      if (offset[i + 1] == offset[i]) continue;
      uint32_t k;  // positive floats order like their bits
      std::memcpy(&k, &depth[i], 4);
      lo = std::min(lo, k), hi = std::max(hi, k);
      key[0][m] = k, index[0][m++] = i;
    }
    const int parts = tiles > 65536 ? 1 : std::max(1, std::min({threads, 8, static_cast<int>(m / 4096)}));
    const size_t step = (m + parts - 1) / parts;
    const auto each_part = [&](auto&& f) {
      parallel(parts, threads, [&](int64_t s) { f(s, std::min(m, s * step), std::min(m, (s + 1) * step)); });
    };
    // at (parts, bins): counts become the places where each part begins; begin(bin, place) hears where each bin does.
    const auto place = [&](int64_t bins, auto&& begin) {
      int32_t total = 0;
      for (int64_t b = 0; b < bins; ++b) {
        begin(b, total);
        for (int s = 0; s < parts; ++s) {
          const int32_t count = at[s * bins + b];
          at[s * bins + b] = total, total += count;
        }
      }
    };
    uint32_t *k0 = key[0].data(), *k1 = key[1].data();
    int32_t *i0 = index[0].data(), *i1 = index[1].data();
    int bits = 0;
    while (m && bits < 32 && (hi - lo) >> bits) ++bits;
    const int passes = (bits + 11) / 12, width = passes ? (bits + passes - 1) / passes : 0;
    const int64_t digits = int64_t(1) << width;
    at.resize(static_cast<size_t>(parts) * std::max<int64_t>(digits, tiles));
    for (int pass = 0; pass < passes; ++pass) {
      const auto digit = [=](uint32_t k) { return ((k - lo) >> (pass * width)) & (digits - 1); };
      each_part([&](int64_t s, size_t b, size_t e) {
        int32_t* count = at.data() + s * digits;
        std::fill_n(count, digits, 0);
        for (size_t i = b; i < e; ++i) count[digit(k0[i])]++;
      });
      place(digits, [](int64_t, int32_t) {});
      each_part([&](int64_t s, size_t b, size_t e) {
        int32_t* to = at.data() + s * digits;
        for (size_t i = b; i < e; ++i) {
          const int32_t p = to[digit(k0[i])]++;
          k1[p] = k0[i], i1[p] = i0[i];
        }
      });
      std::swap(k0, k1), std::swap(i0, i1);
    }
    const auto each_tile = [&](size_t b, size_t e, int32_t* of, auto&& f) {
      for (size_t j = b; j < e; ++j) {
        const int32_t* box_j = &box[4 * static_cast<size_t>(i0[j])];
        for (int y = box_j[1]; y < box_j[3]; ++y)
          for (int x = box_j[0]; x < box_j[2]; ++x) f(i0[j], of[static_cast<size_t>(y) * tiles_x + x]);
      }
    };
    tile_start.resize(static_cast<size_t>(tiles) + 1);
    order.resize(offset[n]);
    each_part([&](int64_t s, size_t b, size_t e) {
      int32_t* count = at.data() + s * tiles;
      std::fill_n(count, tiles, 0);
      each_tile(b, e, count, [](int32_t, int32_t& c) { ++c; });
    });
    place(tiles, [&](int64_t t, int32_t begin) { tile_start[t] = begin; });
    tile_start[tiles] = offset[n];
    each_part([&](int64_t s, size_t b, size_t e) {
      each_tile(b, e, at.data() + s * tiles, [&](int32_t i, int32_t& to) { order[to++] = i; });
    });
    heavy_first.resize(tiles);  // long tiles first, so that the threads finish together
    for (int t = 0; t < tiles; ++t) heavy_first[t] = t;
    std::stable_sort(heavy_first.data(), heavy_first.data() + tiles,
                     [&](int a, int b) { return tile_start[a + 1] - tile_start[a] > tile_start[b + 1] - tile_start[b]; });
  }
};

}  // namespace hh
