// Soft occupancy of a tile of 8x8 pixels (Liu et al., "Soft Rasterizer", ICCV 2019, equations 1 and 3). Included by isa.cpp only.
#pragma once

namespace hh {
namespace {

enum { kSoftTile = 8, kSoftVectors = kSoftTile * kSoftTile / HH_LANES };
constexpr float kSoftFull = 1e-7f;  // below this transparency a pixel is full, and nothing more is added to it

// A triangle in a tile's own coordinates, where floats are fine enough.
struct SoftFace {
  float x[3], y[3], ex[3], ey[3], inv[3], y0, y1;
};

HH_INLINE void soft_face(const SoftArgs& s, int32_t index, double x0, double y0, SoftFace& f) {
  for (int i = 0; i < 3; ++i) {
    const double* p = s.screen + 2 * s.faces[3 * (int64_t)index + i];
    f.x[i] = (float)(p[0] - x0), f.y[i] = (float)(p[1] - y0);
  }
  for (int i = 0; i < 3; ++i) {
    const int j = i == 2 ? 0 : i + 1;
    f.ex[i] = f.x[j] - f.x[i], f.ey[i] = f.y[j] - f.y[i];
    const float n = f.ex[i] * f.ex[i] + f.ey[i] * f.ey[i];
    f.inv[i] = n > 1e-20f ? 1.f / n : 0.f;
  }
  f.y0 = minf(minf(f.y[0], f.y[1]), f.y[2]) - s.reach, f.y1 = maxf(maxf(f.y[0], f.y[1]), f.y[2]) + s.reach;
}

// Signed squared distance to the outline over sigma^2, positive inside. edge, t and r (the way from the closest point) are
// of the closest edge.
struct SoftHit {
  vf x, t, rx, ry;
  vi inside, near, edge;
};
HH_INLINE SoftHit soft_hit(const SoftArgs& s, const SoftFace& f, vf px, vf py) {
  SoftHit h;
  vf best = all(3e38f);
  vi plus = vi{} - 1, minus = vi{} - 1;
  h.t = h.rx = h.ry = vf{}, h.edge = vi{};
  for (int i = 0; i < 3; ++i) {
    const vf dx = px - f.x[i], dy = py - f.y[i];
    const vf side = f.ex[i] * dy - f.ey[i] * dx;
    plus &= side > 0.f, minus &= side < 0.f;
    vf t = (dx * f.ex[i] + dy * f.ey[i]) * f.inv[i];
    t = t > 0.f ? (t < 1.f ? t : all(1.f)) : vf{};
    const vf rx = dx - t * f.ex[i], ry = dy - t * f.ey[i], d2 = rx * rx + ry * ry;
    const vi less = d2 < best;
    best = less ? d2 : best, h.t = less ? t : h.t, h.rx = less ? rx : h.rx, h.ry = less ? ry : h.ry;
    h.edge = less ? vi{} + i : h.edge;
  }
  h.inside = plus | minus;
  h.near = (h.inside | (best < s.reach * s.reach)) & (best < 3e38f);
  best *= s.inv_sigma2;
  h.x = h.inside ? best : -best;
  return h;
}

// share of a vector's pixels outside the triangle's grip: 1 / (1 + exp(x))
HH_INLINE vf soft_miss(vf x) {
  const vf e = exp_neg(x < 0.f ? -x : x), r = 1.f / (1.f + e);
  return x > 0.f ? e * r : r;
}

HH_INLINE void soft_pixels(int i, vf& px, vf& py) {
  for (int l = 0; l < HH_LANES; ++l) px[l] = 0.5f + (i * HH_LANES + l) % kSoftTile, py[l] = 0.5f + (i * HH_LANES + l) / kSoftTile;
}

void soft_tile(const SoftArgs& s, int tile) {
  const double x0 = (tile % s.tiles_x) * kSoftTile, y0 = (tile / s.tiles_x) * kSoftTile;
  vf T[kSoftVectors], px[kSoftVectors], py[kSoftVectors];
  for (int i = 0; i < kSoftVectors; ++i) T[i] = all(1.f), soft_pixels(i, px[i], py[i]);
  int64_t k = s.start[tile];
  for (int64_t n = 1; k < s.start[tile + 1]; ++k, ++n) {
    SoftFace f;
    soft_face(s, s.order[k], x0, y0, f);
    for (int i = 0; i < kSoftVectors; ++i) {
      if (!(py[i][HH_LANES - 1] >= f.y0 && py[i][0] <= f.y1) || !any(T[i] > kSoftFull)) continue;
      const SoftHit h = soft_hit(s, f, px[i], py[i]);
      if (any(h.near)) T[i] = h.near ? T[i] * soft_miss(h.x) : T[i];
    }
    if (n % 8 == 0) {  // nothing behind full occupancy matters
      vi open = vi{};
      for (int i = 0; i < kSoftVectors; ++i) open |= T[i] > kSoftFull;
      if (!any(open)) {
        ++k;
        break;
      }
    }
  }
  s.last[tile] = k;
  for (int i = 0; i < kSoftVectors; ++i)
    for (int l = 0; l < HH_LANES; ++l) {
      const int64_t x = (int64_t)x0 + (i * HH_LANES + l) % kSoftTile, y = (int64_t)y0 + (i * HH_LANES + l) / kSoftTile;
      s.transparency[(int64_t)tile * kSoftTile * kSoftTile + i * HH_LANES + l] = T[i][l];
      if (x < s.W && y < s.H) s.out[y * s.W + x] = 1.f - T[i][l];
    }
}

// slots (pairs,6): gradient of each triangle's corners (x0 y0 x1 y1 x2 y2) from this tile's pixels.
void soft_tile_backward(const SoftArgs& s, int tile) {
  const double x0 = (tile % s.tiles_x) * kSoftTile, y0 = (tile / s.tiles_x) * kSoftTile;
  vf g[kSoftVectors], px[kSoftVectors], py[kSoftVectors];
  vi open = vi{};
  for (int i = 0; i < kSoftVectors; ++i) {
    soft_pixels(i, px[i], py[i]);
    for (int l = 0; l < HH_LANES; ++l) {
      const int64_t x = (int64_t)x0 + (i * HH_LANES + l) % kSoftTile, y = (int64_t)y0 + (i * HH_LANES + l) / kSoftTile;
      const float T = s.transparency[(int64_t)tile * kSoftTile * kSoftTile + i * HH_LANES + l];
      g[i][l] = x < s.W && y < s.H && T > kSoftFull ? s.v_out[y * s.W + x] * T * s.inv_sigma2 : 0.f;
    }
    open |= g[i] != 0.f;
  }
  for (int64_t k = s.start[tile]; k < s.start[tile + 1]; ++k) {
    float* out = s.slots + 6 * k;
    for (int j = 0; j < 6; ++j) out[j] = 0;
    if (k >= s.last[tile] || !any(open)) continue;
    SoftFace f;
    soft_face(s, s.order[k], x0, y0, f);
    vf sums[8] = {};
    for (int i = 0; i < kSoftVectors; ++i) {
      if (!(py[i][HH_LANES - 1] >= f.y0 && py[i][0] <= f.y1) || !any(g[i] != 0.f)) continue;
      const SoftHit h = soft_hit(s, f, px[i], py[i]);
      const vi use = h.near & (g[i] != 0.f);
      if (!any(use)) continue;
      // d(d^2) = -2 r . ((1-t) da + t db) at the closest point
      vf v = 2.f * g[i] * (1.f - soft_miss(h.x));
      v = use ? (h.inside ? -v : v) : vf{};
      const vf v1 = v * h.t, v0 = v - v1;
      for (int j = 0; j < 3; ++j) {
        const vi first = h.edge == j, second = h.edge == (j == 0 ? 2 : j - 1);
        const vf w = first ? v0 : (second ? v1 : vf{});
        sums[2 * j] += w * h.rx, sums[2 * j + 1] += w * h.ry;
      }
    }
    float r[8];
    sum8(sums, r);
    for (int j = 0; j < 6; ++j) out[j] = r[j];
  }
}

}  // namespace
}  // namespace hh
