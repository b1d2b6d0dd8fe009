// Alpha compositing of depth-sorted 2D footprints (Kerbl et al., SIGGRAPH 2023), one 16x16 tile at a time. A footprint K is Ewa
// (3D Gaussians) or Flat (2D Gaussians).
//
// A vector of HH_LANES pixels is a block 4 wide. Forward goes through the tile's list in chunks: a chunk is sorted into one list per
// block by an exact test of footprint against block, then each block is composited with its state in registers and leaves when every
// pixel in it has stopped. Backward takes the chunks from the back and writes a splat's sums over the tile to a slot per (splat, tile):
// no atomics, one order of summation.
#pragma once

namespace hh {
namespace {

constexpr int kChunk = 256, kChunkBack = 128;
constexpr int kMaxFeatures = 32, kMaxExtra = kMaxFeatures + 12;  // features, and bodies besides
constexpr float kAlphaMax = 0.999f, kStopT = 1e-4f, kMedianT = 0.5f;
constexpr float kFaintest = -7.99435344f;  // log2(1/255)

// Block bx, by is number bx * kBlockRows + by.
HH_INLINE void block_pixels(int tile_x, int tile_y, int b, vf* x, vf* y) {
  const float x0 = tile_x * kTile + (b / kBlockRows) * 4 + 0.5f, y0 = tile_y * kTile + (b % kBlockRows) * kBlockH + 0.5f;
  for (int i = 0; i < HH_LANES; ++i) (*x)[i] = (float)(i & 3), (*y)[i] = (float)(i >> 2);
  *x += x0, *y += y0;
}

// f(lane, px, py) for the pixels of a block that are in the image.
template <class F>
HH_INLINE void each_pixel(const Raster& r, int tile_x, int tile_y, int b, F&& f) {
  const int x0 = tile_x * kTile + (b / kBlockRows) * 4, y0 = tile_y * kTile + (b % kBlockRows) * kBlockH;
  for (int i = 0; i < HH_LANES; ++i) {
    const int px = x0 + (i & 3), py = y0 + (i >> 2);
    if (px < r.W && py < r.H) f(i, (int64_t)py * r.W + px);
  }
}

struct BlockState {
  vf T, color[4], threshold;   // threshold: least exponent that is drawn; infinite once the pixel has stopped
  vi stop;
  int32_t median[HH_LANES];
};

template <class K, bool EXTRA>
HH_INLINE bool composite(const Raster& r, const typename K::Item* local, const int32_t* order, const uint8_t* list, int count, int32_t base, int tx,
                         int ty, int b, BlockState& s, vf* extra) {
  vf px, py;
  block_pixels(tx, ty, b, &px, &py);
  vf T = s.T, c0 = s.color[0], c1 = s.color[1], c2 = s.color[2], c3 = s.color[3], threshold = s.threshold;
  vi above{};  // minus the number of entries after which T was over 1/2
  bool stopped = false;
  for (int k = 0; k < count; ++k) {
    const int j = list[k];
    const typename K::Item& g = local[j];
    const auto p = K::meet(g, px, py);
    const vi hit = (p.y >= threshold) & (p.y <= g.lop + K::kTop);
    vf alpha = exp2_near(p.y);
    alpha = alpha < kAlphaMax ? alpha : all(kAlphaMax);
    vf w = hit ? alpha * T : vf{};
    vf next = T - w;
    const vi stop = next <= kStopT;
    if (__builtin_expect(any(stop), 0)) {
      threshold = stop ? all(__builtin_inff()) : threshold;
      s.stop = stop ? vi{} + (base + j) : s.stop;
      w = stop ? vf{} : w, next = stop ? T : next;
      stopped = !any(threshold < 1e30f);
    }
    c0 += w * g.col[0], c1 += w * g.col[1], c2 += w * g.col[2], c3 += w * K::depth(g, p);
    if (EXTRA) {
      const float* f = r.features + (int64_t)order[j] * r.n_features;
      for (int i = 0; i < r.n_features; ++i) extra[i] += w * f[i];
      if (g.id >= 0) extra[r.n_features + g.id] += w;
    }
    T = next;
    above += T > kMedianT;
    if (__builtin_expect(stopped, 0)) break;
  }
  const vi crossed = (s.T > kMedianT) & (T <= kMedianT);
  if (any(crossed))
    for (int i = 0; i < HH_LANES; ++i)
      if (crossed[i]) s.median[i] = order[list[-above[i]]];
  s.T = T, s.color[0] = c0, s.color[1] = c1, s.color[2] = c2, s.color[3] = c3, s.threshold = threshold;
  return stopped;
}

template <class K>
void raster(const Raster& r, int tile) {
  using Item = typename K::Item;
  const int tx = tile % r.tiles_x, ty = tile / r.tiles_x, E = r.n_features + r.n_ids, C = 4 + E;
  const int64_t s = r.tile_start[tile], e = r.tile_start[tile + 1];
  if (s == e) {
    const int x0 = tx * kTile, x1 = mini(x0 + kTile, r.W), y0 = ty * kTile, y1 = mini(y0 + kTile, r.H);
    for (int y = y0; y < y1; ++y) {
      const int64_t row = (int64_t)y * r.W;
      for (int64_t i = (row + x0) * C; i < (row + x1) * C; ++i) r.out[i] = 0;
      for (int64_t i = row + x0; i < row + x1; ++i) r.alpha[i] = 0, r.median[i] = -1;
    }
    return;
  }
  BlockState state[kBlocks];
  vf extra[kBlocks * kMaxExtra];
  uint8_t lists[kBlocks][kChunk];
  int counts[kBlocks];
  uint64_t found[kChunk];
  Item local[kChunk];
  uint64_t live = 0;
  for (int b = 0; b < kBlocks; ++b) {
    BlockState& t = state[b];
    t.T = all(1.f), t.threshold = all(__builtin_inff()), t.stop = vi{} + (int32_t)(e - s);
    for (int k = 0; k < 4; ++k) t.color[k] = vf{};
    for (int i = 0; i < HH_LANES; ++i) t.median[i] = -1;
    for (int k = 0; k < E; ++k) extra[b * E + k] = vf{};
    each_pixel(r, tx, ty, b, [&](int i, int64_t) { t.threshold[i] = kFaintest, live |= 1ull << b; });
  }
  const Item* items = static_cast<const Item*>(r.splats);
  for (int64_t k = s; k < e && live; k += kChunk) {
    const int32_t* order = r.order + k;
    const int m = (int)(e - k < kChunk ? e - k : kChunk);
    for (int b = 0; b < kBlocks; ++b) counts[b] = 0;
    for (int j = 0; j < m; ++j) {
      if (j + 8 < m) __builtin_prefetch(&items[order[j + 8]]);
      local[j] = items[order[j]];
      found[j] = K::blocks(local[j], (float)(tx * kTile), (float)(ty * kTile)) & live;
    }
    for (int j = 0; j < m; ++j)
      for (uint64_t left = found[j]; left; left &= left - 1) {
        const int b = __builtin_ctzll(left);
        lists[b][counts[b]++] = (uint8_t)j;
      }
    for (uint64_t left = live; left; left &= left - 1) {
      const int b = __builtin_ctzll(left);
      const int32_t base = (int32_t)(k - s);
      const bool done = E ? composite<K, true>(r, local, order, lists[b], counts[b], base, tx, ty, b, state[b], extra + b * E)
                          : composite<K, false>(r, local, order, lists[b], counts[b], base, tx, ty, b, state[b], nullptr);
      if (done) live &= ~(1ull << b);
    }
  }
  for (int b = 0; b < kBlocks; ++b) {
    const BlockState& t = state[b];
    float* final_T = r.final_T + (int64_t)tile * 256 + b * HH_LANES;
    int32_t* stop = r.stop + (int64_t)tile * 256 + b * HH_LANES;
    for (int i = 0; i < HH_LANES; ++i) final_T[i] = t.T[i], stop[i] = t.stop[i];
    each_pixel(r, tx, ty, b, [&](int i, int64_t pixel) {
      float* o = r.out + pixel * C;
      for (int k = 0; k < 4; ++k) o[k] = t.color[k][i];
      for (int k = 0; k < E; ++k) o[4 + k] = extra[b * E + k][i];
      r.alpha[pixel] = 1.f - t.T[i], r.median[pixel] = t.median[i];
    });
  }
}

struct BlockGrad {
  vf T, behind, v[4];  // behind: sum over what lies behind of weight * (its colour . dL/dcolour), and dL/dT of the last T
  vi stop;
};

// One block through its list of a chunk, back to front. sums (chunk, stride): each splat's, added to.
template <class K, bool EXTRA>
HH_INLINE void composite_backward(const Raster& r, const typename K::Item* local, const int32_t* order, const uint8_t* list, int count, int32_t base,
                                  int tx, int ty, int b, BlockGrad& s, const vf* v_extra, float* sums, int stride) {
  vf px, py;
  block_pixels(tx, ty, b, &px, &py);
  vf T = s.T, behind = s.behind;
  const vf v0 = s.v[0], v1 = s.v[1], v2 = s.v[2], v3 = s.v[3];
  const vi stop = s.stop - base;
  const int F = r.n_features;
  for (int k = count - 1; k >= 0; --k) {
    const int j = list[k];
    const typename K::Item& g = local[j];
    const auto p = K::meet(g, px, py);
    const vi hit = (p.y >= kFaintest) & (p.y <= g.lop + K::kTop) & (stop > j);
    const vf raw = exp2_near(p.y);
    const vi free = raw <= kAlphaMax;
    vf alpha = free ? raw : all(kAlphaMax);
    alpha = hit ? alpha : vf{};
    const vf inv = 1.f / (1.f - alpha);
    T *= inv;
    const vf w = alpha * T, depth = K::depth(g, p);
    vf dot = v0 * g.col[0] + v1 * g.col[1] + v2 * g.col[2] + v3 * depth;
    float* sum_j = sums + j * stride;
    if (EXTRA) {
      const float* f = r.features + (int64_t)order[j] * F;
      for (int i = 0; i < F; ++i) dot += v_extra[i] * f[i], sum_j[K::kSlot + i] += sum(w * v_extra[i]);
      if (g.id >= 0) dot += v_extra[F + g.id];
    }
    const vf v_alpha = T * dot - inv * behind;
    behind += w * dot;
    const vf q = (hit & free) ? raw * v_alpha : vf{};
    vf out[K::kSlot] = {w * v0, w * v1, w * v2, q};
    K::sums(g, p, q, w * v3, out + 4);
    int i = 0;
    for (; i + 8 <= K::kSlot; i += 8) add_sum8(out + i, sum_j + i);
    if (i + 2 == K::kSlot) add_sum2(out + i, sum_j + i);
    else
      for (; i < K::kSlot; ++i) sum_j[i] += sum(out[i]);
  }
  s.T = T, s.behind = behind;
}

template <class K>
void raster_backward(const Raster& r, int tile) {
  using Item = typename K::Item;
  const int64_t s = r.tile_start[tile], e = r.tile_start[tile + 1];
  if (s == e) return;
  const int tx = tile % r.tiles_x, ty = tile / r.tiles_x, F = r.n_features, E = F + r.n_ids, C = 4 + E;
  BlockGrad block[kBlocks];
  vf v_extra[kBlocks * kMaxExtra];
  int32_t deepest[kBlocks], most = 0;
  for (int b = 0; b < kBlocks; ++b) {
    BlockGrad& t = block[b];
    const float* final_T = r.final_T + (int64_t)tile * 256 + b * HH_LANES;
    const int32_t* stop = r.stop + (int64_t)tile * 256 + b * HH_LANES;
    vf v_alpha{};
    for (int k = 0; k < 4; ++k) t.v[k] = vf{};
    for (int k = 0; k < E; ++k) v_extra[b * E + k] = vf{};
    for (int i = 0; i < HH_LANES; ++i) t.T[i] = final_T[i], t.stop[i] = 0;
    deepest[b] = 0;
    each_pixel(r, tx, ty, b, [&](int i, int64_t pixel) {
      const float* o = r.v_out + pixel * C;
      for (int k = 0; k < 4; ++k) t.v[k][i] = o[k];
      for (int k = 0; k < E; ++k) v_extra[b * E + k][i] = o[4 + k];
      v_alpha[i] = r.v_alpha ? r.v_alpha[pixel] : 0.f;
      t.stop[i] = stop[i];
      deepest[b] = maxi(deepest[b], stop[i]);
    });
    most = maxi(most, deepest[b]);
    t.behind = -t.T * v_alpha;
  }
  constexpr int kSums = K::kSlot + kMaxFeatures;
  alignas(64) float sums[kChunkBack * kSums];
  uint8_t lists[kBlocks][kChunkBack];
  int counts[kBlocks];
  Item local[kChunkBack];
  uint64_t found[kChunkBack];
  const Item* items = static_cast<const Item*>(r.splats);
  const int stride = K::kSlot + F;
  for (int32_t base = (most - 1) / kChunkBack * kChunkBack; most > 0 && base >= 0; base -= kChunkBack) {
    const int32_t* order = r.order + s + base;
    const int m = mini(kChunkBack, most - base);
    uint64_t live = 0;
    for (int b = 0; b < kBlocks; ++b) counts[b] = 0, live |= (uint64_t)(deepest[b] > base) << b;
    for (int j = 0; j < m; ++j) {
      if (j + 8 < m) __builtin_prefetch(&items[order[j + 8]]);
      const int64_t n = order[j];
      __builtin_prefetch(&r.box[4 * n]), __builtin_prefetch(&r.offset[n]);
      local[j] = items[n];
      found[j] = K::blocks(local[j], (float)(tx * kTile), (float)(ty * kTile)) & live;
    }
    for (int j = 0; j < m; ++j)
      for (uint64_t left = found[j]; left; left &= left - 1) {
        const int b = __builtin_ctzll(left);
        lists[b][counts[b]++] = (uint8_t)j;
      }
    for (int i = 0; i < m * stride; ++i) sums[i] = 0;
    for (uint64_t left = live; left; left &= left - 1) {
      const int b = __builtin_ctzll(left);
      if (E) composite_backward<K, true>(r, local, order, lists[b], counts[b], base, tx, ty, b, block[b], v_extra + b * E, sums, stride);
      else composite_backward<K, false>(r, local, order, lists[b], counts[b], base, tx, ty, b, block[b], nullptr, sums, stride);
    }
    for (int j = 0; j < m; ++j) {
      if (!found[j]) continue;
      const int32_t n = order[j], *tiles = r.box + 4 * (int64_t)n;
      const int64_t at = r.offset[n] + (int64_t)(ty - tiles[1]) * (tiles[2] - tiles[0]) + (tx - tiles[0]);
      r.used[at] = 1;
      for (int i = 0; i < stride; ++i) r.slots[at * stride + i] = sums[j * stride + i];
    }
  }
}

const SplatKernels kSplatKernels = {sizeof(Splat), Ewa::kSlot, splat_project, raster<Ewa>, raster_backward<Ewa>, splat_project_backward};
const SplatKernels kDiskKernels = {sizeof(Disk), Flat::kSlot, disk_project, raster<Flat>, raster_backward<Flat>, disk_project_backward};

}  // namespace
}  // namespace hh
