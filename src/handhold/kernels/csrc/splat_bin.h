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
  Buffer<int64_t> offset, tile_start, at;
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

  // Radix sort of the visible splats by depth, then a counting sort into tiles: each tile's list comes out in depth order.
  void fill(int n, int tiles_x, int tiles, const float* depth, int) {
    for (int i = 0; i < 2; ++i) key[i].resize(n), index[i].resize(n);
    tile_start.resize(static_cast<size_t>(tiles) + 1);
    std::fill_n(tile_start.data(), tiles + 1, 0);
    uint32_t lo = ~0u, hi = 0;
    size_t m = 0;
    for (int i = 0; i < n; ++i) {
      if (offset[i + 1] == offset[i]) continue;
      const int32_t* b = &box[4 * static_cast<size_t>(i)];
      uint32_t k;  // positive floats order like their bits
      std::memcpy(&k, &depth[i], 4);
      lo = std::min(lo, k), hi = std::max(hi, k);
      key[0][m] = k, index[0][m++] = i;
      for (int y = b[1]; y < b[3]; ++y)
        for (int x = b[0]; x < b[2]; ++x) tile_start[static_cast<size_t>(y) * tiles_x + x + 1]++;
    }
    uint32_t *k0 = key[0].data(), *k1 = key[1].data();
    int32_t *i0 = index[0].data(), *i1 = index[1].data();
    for (size_t i = 0; i < m; ++i) k0[i] -= lo;
    for (int shift = 0; m && shift < 32 && ((hi - lo) >> shift); shift += 11) {
      uint32_t first[2049] = {0};
      for (size_t i = 0; i < m; ++i) first[((k0[i] >> shift) & 2047) + 1]++;
      for (int i = 0; i < 2048; ++i) first[i + 1] += first[i];
      for (size_t i = 0; i < m; ++i) {
        const uint32_t p = first[(k0[i] >> shift) & 2047]++;
        k1[p] = k0[i], i1[p] = i0[i];
      }
      std::swap(k0, k1), std::swap(i0, i1);
    }
    for (int t = 0; t < tiles; ++t) tile_start[t + 1] += tile_start[t];
    order.resize(offset[n]);
    at.resize(tiles);
    std::copy_n(tile_start.data(), tiles, at.data());
    for (size_t j = 0; j < m; ++j) {
      const int32_t i = i0[j], *b = &box[4 * static_cast<size_t>(i)];
      for (int y = b[1]; y < b[3]; ++y)
        for (int x = b[0]; x < b[2]; ++x) order[at[static_cast<size_t>(y) * tiles_x + x]++] = i;
    }
    heavy_first.resize(tiles);  // long tiles first, so that the threads finish together
    for (int t = 0; t < tiles; ++t) heavy_first[t] = t;
    std::stable_sort(heavy_first.data(), heavy_first.data() + tiles,
                     [&](int a, int b) { return tile_start[a + 1] - tile_start[a] > tile_start[b + 1] - tile_start[b]; });
  }
};

}  // namespace hh
