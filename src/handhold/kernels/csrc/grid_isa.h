// Trilinear signed-distance + colour grid. Value and spatial gradient are both linear in the grid, so one analytic backward
// covers losses on colour, normal (eikonal) and position at once: no double backward anywhere.
#pragma once

namespace hh {
namespace {

struct Cell {
  int64_t base;   // float offset of the cell's low corner
  int i;
  float f[3];     // fractional position
  bool inside[3]; // false on an axis where the point was clamped to the grid
};

HH_INLINE Cell find_cell(const GridView& g, const float* x, float inv) {
  Cell c;
  int i[3];
  const float top = g.R - 1.0001f;
  for (int k = 0; k < 3; ++k) {
    float p = (x[k] - g.lo[k]) * inv, q = clampf(p, 0.f, top);
    c.inside[k] = p >= 0.f && p <= top;
    i[k] = (int)q;
    c.f[k] = q - i[k];
  }
  c.i = i[0];
  c.base = (((int64_t)i[0] * g.R + i[1]) * g.R + i[2]) * 4;
  return c;
}

HH_INLINE float sdf_at(const GridView& g, const float* x, float inv) {
  Cell c = find_cell(g, x, inv);
  const float* p = g.data + c.base;
  const int64_t sx = (int64_t)g.R * g.R * 4, sy = (int64_t)g.R * 4;
  float a = p[0] + (p[4] - p[0]) * c.f[2], b = p[sy] + (p[sy + 4] - p[sy]) * c.f[2];
  float d = p[sx] + (p[sx + 4] - p[sx]) * c.f[2], e = p[sx + sy] + (p[sx + sy + 4] - p[sx + sy]) * c.f[2];
  a += (b - a) * c.f[1];
  d += (e - d) * c.f[1];
  return a + (d - a) * c.f[0];
}

HH_INLINE v4 value_at(const GridView& g, const float* x, float inv, float* grad) {
  Cell c = find_cell(g, x, inv);
  const float* p = g.data + c.base;
  const int64_t sx = (int64_t)g.R * g.R * 4, sy = (int64_t)g.R * 4;
  const float u = c.f[0], v = c.f[1], w = c.f[2];
  v4 p000 = load4(p), p001 = load4(p + 4), p010 = load4(p + sy), p011 = load4(p + sy + 4);
  v4 p100 = load4(p + sx), p101 = load4(p + sx + 4), p110 = load4(p + sx + sy), p111 = load4(p + sx + sy + 4);
  v4 a = p000 + (p001 - p000) * w, b = p010 + (p011 - p010) * w, d = p100 + (p101 - p100) * w, e = p110 + (p111 - p110) * w;
  v4 f = a + (b - a) * v, k = d + (e - d) * v;
  if (grad) {
    float z0 = (p001[0] - p000[0]) * (1 - v) + (p011[0] - p010[0]) * v;
    float z1 = (p101[0] - p100[0]) * (1 - v) + (p111[0] - p110[0]) * v;
    grad[0] = (k[0] - f[0]) * inv;
    grad[1] = ((b[0] - a[0]) * (1 - u) + (e[0] - d[0]) * u) * inv;
    grad[2] = (z0 * (1 - u) + z1 * u) * inv;
  }
  return f + (k - f) * u;
}

void grid_sample(const GridView& g, const float* x, int64_t b, int64_t e, float* val, float* grad) {
  const float inv = 1.f / g.h;
  for (int64_t n = b; n < e; ++n) store4(val + 4 * n, value_at(g, x + 3 * n, inv, grad + 3 * n));
}

// Adds to grid planes [slab0, slab1) only. Each voxel gets its terms in the order of the samples whichever slab it is in,
// so the sum does not depend on how the planes were dealt to threads.
void grid_scatter(const GridView& g, const float* x, int64_t n, const float* v_val, const float* v_grad, int slab0, int slab1, float* v_data) {
  const float inv = 1.f / g.h, top = g.R - 1.0001f;
  const int64_t sx = (int64_t)g.R * g.R * 4, sy = (int64_t)g.R * 4;
  for (int64_t s = 0; s < n; ++s) {
    int i = (int)clampf((x[3 * s] - g.lo[0]) * inv, 0.f, top);
    if (i + 1 < slab0 || i >= slab1) continue;
    v4 v = load4(v_val + 4 * s);
    float gx = 0, gy = 0, gz = 0;
    if (v_grad) gx = v_grad[3 * s] * inv, gy = v_grad[3 * s + 1] * inv, gz = v_grad[3 * s + 2] * inv;
    else if (v[0] == 0 && v[1] == 0 && v[2] == 0 && v[3] == 0) continue;
    Cell c = find_cell(g, x + 3 * s, inv);
    const float U[2] = {1 - c.f[0], c.f[0]}, V[2] = {1 - c.f[1], c.f[1]}, W[2] = {1 - c.f[2], c.f[2]};
    for (int a = 0; a < 2; ++a) {
      if (i + a < slab0 || i + a >= slab1) continue;
      const float da = a ? gx : -gx;
      for (int j = 0; j < 2; ++j) {
        float* q = v_data + c.base + a * sx + j * sy;
        const float uv = U[a] * V[j], side = da * V[j] + (j ? gy : -gy) * U[a], dz = gz * uv;
        v4 t0 = v * (uv * W[0]), t1 = v * (uv * W[1]);
        t0[0] += side * W[0] - dz;
        t1[0] += side * W[1] + dz;
        store4(q, load4(q) + t0);
        store4(q + 4, load4(q + 4) + t1);
      }
    }
  }
}

void grid_v_x(const GridView& g, const float* x, int64_t b, int64_t e, const float* v_val, const float* v_grad, float* v_x) {
  const float inv = 1.f / g.h;
  const int64_t sx = (int64_t)g.R * g.R * 4, sy = (int64_t)g.R * 4;
  const float D[2] = {-1, 1};
  for (int64_t n = b; n < e; ++n) {
    Cell c = find_cell(g, x + 3 * n, inv);
    const float U[2] = {1 - c.f[0], c.f[0]}, V[2] = {1 - c.f[1], c.f[1]}, W[2] = {1 - c.f[2], c.f[2]};
    float gx = 0, gy = 0, gz = 0, o[3] = {0, 0, 0};
    if (v_grad) gx = v_grad[3 * n] * inv, gy = v_grad[3 * n + 1] * inv, gz = v_grad[3 * n + 2] * inv;
    v4 v = load4(v_val + 4 * n);
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j)
        for (int k = 0; k < 2; ++k) {
          v4 q = load4(g.data + c.base + i * sx + j * sy + k * 4), r = v * q;
          float s = r[0] + r[1] + r[2] + r[3], xy = D[i] * D[j] * W[k], xz = D[i] * V[j] * D[k], yz = U[i] * D[j] * D[k];
          o[0] += D[i] * V[j] * W[k] * s + q[0] * (gy * xy + gz * xz);
          o[1] += U[i] * D[j] * W[k] * s + q[0] * (gx * xy + gz * yz);
          o[2] += U[i] * V[j] * D[k] * s + q[0] * (gx * xz + gy * yz);
        }
    for (int k = 0; k < 3; ++k) v_x[3 * n + k] = c.inside[k] ? o[k] * inv : 0.f;
  }
}

// [t0,t1]: the first passage of the ray through |phi| < band. See grid.py for the contract.
void grid_march(const GridView& g, const float* o_, const float* d_, int64_t b_, int64_t e_, float min_step, float band, float* t0, float* t1, float* phi_min) {
  const float inv = 1.f / g.h;
  for (int64_t n = b_; n < e_; ++n) {
    const float *o = o_ + 3 * n, *d = d_ + 3 * n;
    float a = 0, b = 1e9f;
    for (int k = 0; k < 3; ++k) {
      float dk = absf(d[k]) > 1e-12f ? d[k] : 1e-12f, r = 1.f / dk;
      float p = (g.lo[k] - o[k]) * r, q = (g.lo[k] + (g.R - 1) * g.h - o[k]) * r;
      a = maxf(a, minf(p, q));
      b = minf(b, maxf(p, q));
    }
    float best = 1e9f, best_t = 0.5f * (a + b), tin = -1, tout = -1, s = a;
    bool in = false;
    for (int it = 0; it < 256 && s < b; ++it) {
      float x[3] = {o[0] + s * d[0], o[1] + s * d[1], o[2] + s * d[2]};
      float f = sdf_at(g, x, inv);
      if (f < best) best = f, best_t = s;
      if (!in) {
        if (!(f < band)) { s += maxf((f - band) * 0.9f, min_step); continue; }
        in = true;
        tin = maxf(a, s - 0.5f * min_step);
      }
      tout = s;
      if (f < -band) break;
      if (f > band) {
        if (best <= 0.6f * band) break;
        in = false;  // it only grazed the outer band: keep looking
        s += maxf((f - band) * 0.9f, min_step);
        continue;
      }
      s += min_step;
    }
    if (tin < 0) tin = best_t - min_step, tout = best_t + min_step;
    t0[n] = tin;
    t1[n] = tout + 0.5f * min_step;
    phi_min[n] = best;
  }
}

// Copies channel 0 of plane i to the contiguous field f.
void grid_extract(const GridView& g, int i, float* f) {
  const int64_t p = (int64_t)g.R * g.R;
  for (int64_t n = i * p; n < (i + 1) * p; ++n) f[n] = g.data[4 * n];
}

struct RegTerms {
  float h, w_eik, w_lap, band;
};

// One inner row of grid_reg_flux. A function of its own because only restrict parameters convince the compiler to vectorise it.
__attribute__((noinline)) void reg_row(int R, const float* __restrict p, RegTerms a, float* __restrict fx, float* __restrict fy,
                                       float* __restrict fz, float* __restrict fl, double* __restrict sums) {
  const int64_t sx = (int64_t)R * R, sy = R;
  const float i2h = 0.5f / a.h, ih = 1.f / a.h, we = 2 * a.w_eik * i2h, wl = 2 * a.w_lap * ih;
  float le = 0, ll = 0, count = 0;  // a row is short enough for float sums
  for (int k = 1; k < R - 1; ++k) {
    const float gx = (p[k + sx] - p[k - sx]) * i2h, gy = (p[k + sy] - p[k - sy]) * i2h, gz = (p[k + 1] - p[k - 1]) * i2h;
    const float on = absf(p[k]) <= a.band ? 1.f : 0.f;
    const float l = __builtin_sqrtf(gx * gx + gy * gy + gz * gz) + 1e-9f, e = l - 1, q = on * we * e / l;
    const float lap = (p[k + sx] + p[k - sx] + p[k + sy] + p[k - sy] + p[k + 1] + p[k - 1] - 6 * p[k]) * ih;
    le += on * e * e, ll += on * lap * lap, count += on;
    fx[k] = q * gx, fy[k] = q * gy, fz[k] = q * gz, fl[k] = on * wl * lap;
  }
  sums[0] += le, sums[1] += ll, sums[2] += count;
}

// First half of the regularisers, on plane i of the field f: the flux of the eikonal term (three fields) and the scaled Laplacian
// (one), each R^3 floats after the other in `flux`; zero at the border and outside the band. sums: eikonal, Laplacian, count.
void grid_reg_flux(int R, int i, const float* f, float h, float w_eik, float w_lap, float band, float* flux, double* sums) {
  const int64_t sx = (int64_t)R * R, size = sx * R;
  sums[0] = sums[1] = sums[2] = 0;
  for (int j = 0; j < R; ++j) {
    const int64_t at = i * sx + (int64_t)j * R;
    float* o[4] = {flux + at, flux + at + size, flux + at + 2 * size, flux + at + 3 * size};
    const bool border = i < 1 || j < 1 || i >= R - 1 || j >= R - 1;
    for (int c = 0; c < 4; ++c)
      for (int k = 0; k < R; k += border ? 1 : R - 1) o[c][k] = 0;
    if (!border) reg_row(R, f + at, {h, w_eik, w_lap, band}, o[0], o[1], o[2], o[3], sums);
  }
}

// Second half: the transposed stencils, gathered. row: R floats of scratch.
void grid_reg_gather(int R, int i, float scale, const float* flux, float* row_, float* v_data) {
  const int64_t sx = (int64_t)R * R, sy = R, size = sx * R;
  float* __restrict row = row_;
  for (int j = 0; j < R; ++j) {
    const int64_t at = i * sx + j * sy;
    const float *fx = flux + at, *fy = fx + size, *fz = fy + size, *fl = fz + size;
    for (int k = 0; k < R; ++k) row[k] = -6 * fl[k];
    if (i) for (int k = 0; k < R; ++k) row[k] += fx[k - sx] + fl[k - sx];
    if (i < R - 1) for (int k = 0; k < R; ++k) row[k] += fl[k + sx] - fx[k + sx];
    if (j) for (int k = 0; k < R; ++k) row[k] += fy[k - sy] + fl[k - sy];
    if (j < R - 1) for (int k = 0; k < R; ++k) row[k] += fl[k + sy] - fy[k + sy];
    for (int k = 1; k < R; ++k) row[k] += fz[k - 1] + fl[k - 1];
    for (int k = 0; k < R - 1; ++k) row[k] += fl[k + 1] - fz[k + 1];
    float* v = v_data + 4 * at;
    for (int k = 0; k < R; ++k) v[4 * k] += row[k] * scale;
  }
}

// [1 2 1]/4 along the two axes of plane i, in place in a; b is scratch. v_data, when given, is read first (channel 0).
void grid_blur_plane(int R, int i, const float* v_data, float* a, float* b) {
  const int64_t p = (int64_t)R * R;
  a += i * p, b += i * p;
  if (v_data)
    for (int64_t n = 0; n < p; ++n) a[n] = v_data[4 * (i * p + n)];
  for (int j = 0; j < R; ++j) {
    const float* q = a + (int64_t)j * R;
    float* o = b + (int64_t)j * R;
    o[0] = q[0], o[R - 1] = q[R - 1];
    for (int k = 1; k < R - 1; ++k) o[k] = .25f * (q[k - 1] + 2 * q[k] + q[k + 1]);
  }
  for (int j = 0; j < R; ++j) {
    const float* q = b + (int64_t)j * R;
    float* o = a + (int64_t)j * R;
    if (j == 0 || j == R - 1)
      for (int k = 0; k < R; ++k) o[k] = q[k];
    else
      for (int k = 0; k < R; ++k) o[k] = .25f * (q[k - R] + 2 * q[k] + q[k + R]);
  }
}

void grid_blur_across(int R, int i, const float* a, float* b, float* v_data) {
  const int64_t p = (int64_t)R * R;
  a += i * p, b += i * p;
  const bool edge = i == 0 || i == R - 1;
  for (int64_t n = 0; n < p; ++n) b[n] = edge ? a[n] : .25f * (a[n - p] + 2 * a[n] + a[n + p]);
  if (v_data)
    for (int64_t n = 0; n < p; ++n) v_data[4 * (i * p + n)] = b[n];
}

// Adam on voxels with a gradient; clears the gradient. c1, c2: bias corrections; eps: for channel 0, relative to the grid's rms.
void grid_adam(int64_t b, int64_t e, float* p, float* g_, float* m, float* v, float lr_sdf, float lr_color, float b1, float b2, float c1, float c2, float eps) {
  const v4 lr = {lr_sdf, lr_color, lr_color, lr_color}, ep = {eps, 1e-12f, 1e-12f, 1e-12f};
  for (int64_t n = 4 * b; n < 4 * e; n += 4) {
    v4 g = load4(g_ + n);
    if (g[0] == 0 && g[1] == 0 && g[2] == 0 && g[3] == 0) continue;
    v4 M = load4(m + n) * b1 + g * (1 - b1), V = load4(v + n) * b2 + g * g * (1 - b2), r;
    for (int k = 0; k < 4; ++k) r[k] = __builtin_sqrtf(V[k] * c2);
    store4(p + n, load4(p + n) - lr * (M * c1) / (r + ep));
    store4(m + n, M);
    store4(v + n, V);
    store4(g_ + n, v4{});
  }
}

}  // namespace
}  // namespace hh
