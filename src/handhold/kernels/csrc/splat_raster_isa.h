// Alpha compositing of depth-sorted 2D Gaussians (Kerbl et al., SIGGRAPH 2023), one 16x16 tile at a time.
// A vector of HH_LANES pixels is a block 4 wide; a block is visited only where the Gaussian's extent meets it, and retired when
// every pixel in it has stopped. The backward pass writes to a slot per (Gaussian, tile), so there are no atomics and the sums
// have one order.
#pragma once

namespace hh {
namespace {

constexpr int kBlockH = HH_LANES / 4, kBlocks = 256 / HH_LANES, kBlockRows = kTile / kBlockH;
constexpr int kMaxIds = 12;
constexpr float kAlphaMax = 0.999f, kStopT = 1e-4f;

struct Lanes {
  vf x, y;
};
HH_INLINE Lanes pixel_centres() {
  Lanes l;
  for (int i = 0; i < HH_LANES; ++i) l.x[i] = (i & 3) + 0.5f, l.y[i] = (i >> 2) + 0.5f;
  return l;
}

struct Blocks {
  int x0, x1, y0, y1;
};
HH_INLINE Blocks reached(const Splat& g, float ox, float oy) {
  const float left = g.x - 0.5f - ox, up = g.y - 0.5f - oy, s = 1.f / kBlockH;
  return {(int)clampf((left - g.ex) * 0.25f, 0, 4), (int)clampf((left + g.ex) * 0.25f, -1, 3), (int)clampf((up - g.ey) * s, 0, kBlockRows),
          (int)clampf((up + g.ey) * s, -1, kBlockRows - 1)};
}

void splat_raster(const Raster& r, int tile) {
  const int tx = tile % r.tiles_x, ty = tile / r.tiles_x, C = 4 + r.n_ids;
  const float ox = tx * kTile, oy = ty * kTile;
  const Lanes lane = pixel_centres();
  vf T[kBlocks], A[kBlocks][4], I[kMaxIds][kBlocks];
  vi alive[kBlocks], last[kBlocks];
  uint64_t live = 0;
  for (int b = 0; b < kBlocks; ++b) {
    T[b] = all(1.f), alive[b] = vi{} - 1, last[b] = vi{};
    for (int k = 0; k < 4; ++k) A[b][k] = vf{};
    for (int k = 0; k < r.n_ids; ++k) I[k][b] = vf{};
    if (tx * kTile + (b & 3) * 4 < r.W && ty * kTile + (b >> 2) * kBlockH < r.H) live |= 1ull << b;
  }
  const int64_t s = r.tile_start[tile], e = r.tile_start[tile + 1];
  for (int64_t k = s; k < e && live; ++k) {
    const Splat& g = r.splats[r.order[k]];
    const Blocks box = reached(g, ox, oy);
    const int32_t rank = (int32_t)(k - s) + 1;
    const float ha = 0.5f * g.a, hc = 0.5f * g.c;
    for (int by = box.y0; by <= box.y1; ++by)
      for (int bx = box.x0; bx <= box.x1; ++bx) {
        const int b = by * 4 + bx;
        if (!(live >> b & 1)) continue;
        const vf dx = lane.x + (ox + bx * 4 - g.x), dy = lane.y + (oy + by * kBlockH - g.y);
        const vf sigma = dx * (ha * dx + g.b * dy) + hc * dy * dy;
        vi hit = (sigma <= g.smax) & (sigma >= 0.f) & alive[b];
        if (!any(hit)) continue;
        vf alpha = g.op * exp_neg(sigma);
        alpha = alpha < kAlphaMax ? alpha : all(kAlphaMax);
        const vf next = T[b] * (1.f - alpha);
        const vi stop = hit & (next <= kStopT);
        if (__builtin_expect(any(stop), 0)) {
          alive[b] &= ~stop, hit &= ~stop;
          if (!any(alive[b])) live &= ~(1ull << b);
        }
        const vf w = hit ? alpha * T[b] : vf{};
        A[b][0] += w * g.col[0], A[b][1] += w * g.col[1], A[b][2] += w * g.col[2], A[b][3] += w * g.depth;
        if (g.id >= 0) I[g.id][b] += w;
        T[b] = hit ? next : T[b];
        last[b] = hit ? vi{} + rank : last[b];
      }
  }
  for (int b = 0; b < kBlocks; ++b) {
    float* fT = r.final_T + (int64_t)tile * 256 + b * HH_LANES;
    int32_t* fl = r.last + (int64_t)tile * 256 + b * HH_LANES;
    for (int i = 0; i < HH_LANES; ++i) {
      fT[i] = T[b][i], fl[i] = last[b][i];
      const int px = tx * kTile + (b & 3) * 4 + (i & 3), py = ty * kTile + (b >> 2) * kBlockH + (i >> 2);
      if (px >= r.W || py >= r.H) continue;
      const int64_t pixel = (int64_t)py * r.W + px;
      float* o = r.out + pixel * C;
      for (int k = 0; k < 4; ++k) o[k] = A[b][k][i];
      for (int k = 0; k < r.n_ids; ++k) o[4 + k] = I[k][b][i];
      r.alpha[pixel] = 1.f - T[b][i];
    }
  }
}

void splat_raster_backward(const Raster& r, int tile) {
  const int64_t s = r.tile_start[tile], e = r.tile_start[tile + 1];
  if (s == e) return;
  const int tx = tile % r.tiles_x, ty = tile / r.tiles_x, C = 4 + r.n_ids;
  const float ox = tx * kTile, oy = ty * kTile;
  const Lanes lane = pixel_centres();
  vf T[kBlocks], behind[kBlocks], V[kBlocks][4], VI[kMaxIds][kBlocks];
  vi last[kBlocks];
  int32_t deepest[kBlocks], most = 0;
  for (int b = 0; b < kBlocks; ++b) {
    vf va = vf{};
    deepest[b] = 0;
    for (int k = 0; k < 4; ++k) V[b][k] = vf{};
    for (int k = 0; k < r.n_ids; ++k) VI[k][b] = vf{};
    for (int i = 0; i < HH_LANES; ++i) {
      const int px = tx * kTile + (b & 3) * 4 + (i & 3), py = ty * kTile + (b >> 2) * kBlockH + (i >> 2);
      const bool in = px < r.W && py < r.H;
      T[b][i] = r.final_T[(int64_t)tile * 256 + b * HH_LANES + i];
      last[b][i] = in ? r.last[(int64_t)tile * 256 + b * HH_LANES + i] : 0;
      deepest[b] = maxi(deepest[b], last[b][i]);
      if (!in) continue;
      const int64_t pixel = (int64_t)py * r.W + px;
      const float* o = r.v_out + pixel * C;
      for (int k = 0; k < 4; ++k) V[b][k][i] = o[k];
      for (int k = 0; k < r.n_ids; ++k) VI[k][b][i] = o[4 + k];
      va[i] = r.v_alpha ? r.v_alpha[pixel] : 0.f;
    }
    most = maxi(most, deepest[b]);
    behind[b] = -T[b] * va;  // sum over what lies behind of weight * (its colour . dL/dcolour), and dL/dT of the last T
  }
  for (int64_t k = e - 1; k >= s; --k) {
    const int32_t n = r.order[k], rank = (int32_t)(k - s) + 1, *tiles = r.box + 4 * n;
    float* slot = r.slots + (r.offset[n] + (int64_t)(ty - tiles[1]) * (tiles[2] - tiles[0]) + (tx - tiles[0])) * kSlot;
    if (rank > most) {
      for (int i = 0; i < kSlot; ++i) slot[i] = 0;
      continue;
    }
    const Splat& g = r.splats[n];
    const Blocks box = reached(g, ox, oy);
    const float ha = 0.5f * g.a, hc = 0.5f * g.c;
    vf v0{}, v1{}, v2{}, v3{}, vo{}, s1{}, s2{}, s3{}, s4{}, s5{};
    for (int by = box.y0; by <= box.y1; ++by)
      for (int bx = box.x0; bx <= box.x1; ++bx) {
        const int b = by * 4 + bx;
        if (deepest[b] < rank) continue;
        const vf dx = lane.x + (ox + bx * 4 - g.x), dy = lane.y + (oy + by * kBlockH - g.y);
        const vf sigma = dx * (ha * dx + g.b * dy) + hc * dy * dy;
        const vi hit = (sigma <= g.smax) & (sigma >= 0.f) & (last[b] >= rank);
        if (!any(hit)) continue;
        const vf vis = exp_neg(sigma), raw = g.op * vis;
        vf alpha = raw < kAlphaMax ? raw : all(kAlphaMax);
        alpha = hit ? alpha : vf{};
        const vf inv = 1.f / (1.f - alpha);
        T[b] *= inv;
        const vf w = alpha * T[b];
        vf dot = V[b][0] * g.col[0] + V[b][1] * g.col[1] + V[b][2] * g.col[2] + V[b][3] * g.depth;
        if (g.id >= 0) dot += VI[g.id][b];
        const vf v_alpha = T[b] * dot - inv * behind[b];
        behind[b] += w * dot;
        v0 += w * V[b][0], v1 += w * V[b][1], v2 += w * V[b][2], v3 += w * V[b][3];
        const vf q = (hit & (raw <= kAlphaMax)) ? vis * v_alpha : vf{}, qx = q * dx, qy = q * dy;
        vo += q, s1 += qx, s2 += qy, s3 += qx * dx, s4 += qx * dy, s5 += qy * dy;
      }
    const vf eight[8] = {v0, v1, v2, vo, s1, s2, s3, s4};
    sum8(eight, slot);
    slot[8] = sum(s5), slot[9] = sum(v3);
  }
}

}  // namespace
}  // namespace hh
