// Trilinear signed-distance + colour grid. Value and spatial gradient are both linear in the grid, so one analytic backward
// covers losses on colour, normal (eikonal) and position at once: no double backward anywhere.
#pragma once

namespace hh {
namespace {

typedef float vfu __attribute__((vector_size(HH_LANES * 4), aligned(4)));
HH_INLINE vf load(const float* p) { return (vf)(*(const vfu*)p); }
HH_INLINE void store(float* p, vf v) { *(vfu*)p = (vfu)v; }

#if HH_LANES == 8 && defined(__AVX2__)
// v[0][i], v[1][i] = the two floats at the i-th address
HH_INLINE void load_pairs(const float* a, const float* b, const float* c, const float* d, const float* e, const float* f, const float* g, const float* h, vf* v) {
#define HH_PAIR(p, q) _mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)(p))), (const __m64*)(q))
  const __m256 lo = _mm256_set_m128(HH_PAIR(e, f), HH_PAIR(a, b)), hi = _mm256_set_m128(HH_PAIR(g, h), HH_PAIR(c, d));
#undef HH_PAIR
  v[0] = (vf)_mm256_shuffle_ps(lo, hi, 0x88);
  v[1] = (vf)_mm256_shuffle_ps(lo, hi, 0xdd);
}
#endif

// Cells of HH_LANES points: index of the low corner's voxel, its row and plane, fractions, and per axis whether the point was inside.
struct Cells {
  int32_t index[HH_LANES], row[HH_LANES], plane[HH_LANES];
  alignas(32) float f[3][HH_LANES];
  vi inside[3];
};

HH_INLINE void find_cells(const GridView& g, const vf* x, float inv, Cells& c) {
  const vf zero = {}, top = all(g.R - 1.0001f);
  vi i[3];
  for (int k = 0; k < 3; ++k) {
    const vf p = (x[k] - g.lo[k]) * inv, q = p > zero ? (p < top ? p : top) : zero;  // NaN goes to 0
    c.inside[k] = (p >= zero) & (p <= top);
    i[k] = __builtin_convertvector(q, vi);
    *(vf*)c.f[k] = q - __builtin_convertvector(i[k], vf);
  }
  const vi row = i[0] * g.R + i[1], index = row * g.R + i[2];
  __builtin_memcpy(c.row, &row, sizeof(vi));
  __builtin_memcpy(c.plane, &i[0], sizeof(vi));
  __builtin_memcpy(c.index, &index, sizeof(vi));
}

// HH_LANES numbers `stride` floats apart. A list, because filling a vector lane by lane goes through memory and stalls.
HH_INLINE vf strided(const float* p, int64_t stride) {
#if HH_LANES == 8
  return vf{p[0], p[stride], p[2 * stride], p[3 * stride], p[4 * stride], p[5 * stride], p[6 * stride], p[7 * stride]};
#else
  return vf{p[0], p[stride], p[2 * stride], p[3 * stride]};
#endif
}

// Columns [0,C) of HH_LANES rows `stride` floats apart, one row per lane; only the first `lanes` rows exist, the others give 0.
template <int C>
HH_INLINE void load_rows(const float* p, int64_t stride, int64_t lanes, vf* v) {
  if (lanes < HH_LANES) {
    for (int c = 0; c < C; ++c) {
      v[c] = vf{};
      for (int i = 0; i < lanes; ++i) v[c][i] = p[i * stride + c];
    }
    return;
  }
#if HH_LANES == 8 && defined(__AVX2__)
  if (C % 2 == 0) {
    for (int c = 0; c < C; c += 2) load_pairs(p + c, p + stride + c, p + 2 * stride + c, p + 3 * stride + c, p + 4 * stride + c, p + 5 * stride + c,
                                              p + 6 * stride + c, p + 7 * stride + c, v + c);
    return;
  }
#endif
  for (int c = 0; c < C; ++c) v[c] = strided(p + c, stride);
}

template <int C>
HH_INLINE void store_rows(float* p, int64_t stride, int64_t lanes, const vf* v) {
#if HH_LANES == 8 && defined(__AVX2__)
  if (C % 2 == 0 && lanes == HH_LANES) {
    for (int c = 0; c < C; c += 2) {
      const __m256 lo = _mm256_unpacklo_ps((__m256)v[c], (__m256)v[c + 1]), hi = _mm256_unpackhi_ps((__m256)v[c], (__m256)v[c + 1]);
      const __m128 q[4] = {_mm256_castps256_ps128(lo), _mm256_castps256_ps128(hi), _mm256_extractf128_ps(lo, 1), _mm256_extractf128_ps(hi, 1)};
      for (int i = 0; i < 4; ++i) {
        _mm_storel_pi((__m64*)(p + 2 * i * stride + c), q[i]);
        _mm_storeh_pi((__m64*)(p + (2 * i + 1) * stride + c), q[i]);
      }
    }
    return;
  }
#endif
  alignas(32) float t[C][HH_LANES];
  for (int c = 0; c < C; ++c) *(vf*)t[c] = v[c];
  for (int i = 0; i < lanes; ++i)
    for (int c = 0; c < C; ++c) p[i * stride + c] = t[c][i];
}

HH_INLINE void load_points(const float* x, int64_t at, int64_t end, vf* p) {
  if (at + HH_LANES <= end) {
    for (int k = 0; k < 3; ++k) p[k] = strided(x + 3 * at + k, 3);
    return;
  }
  for (int i = 0; i < HH_LANES; ++i) {
    const float* q = x + 3 * (at + i < end ? at + i : end - 1);  // lanes past the end repeat the last point
    p[0][i] = q[0], p[1][i] = q[1], p[2][i] = q[2];
  }
}

// Asks for the cells' corners ahead of time: of the grid's 16 R^3 bytes little is still in cache from one call to the next.
template <int kWrite>
HH_INLINE void prefetch_cells(const float* data, int R, const Cells& c) {
  const int64_t sx = (int64_t)R * R * 4, sy = (int64_t)R * 4;
  for (int i = 0; i < HH_LANES; ++i) {
    const float* p = data + 4 * (int64_t)c.index[i];
    __builtin_prefetch(p, kWrite), __builtin_prefetch(p + sy, kWrite), __builtin_prefetch(p + sx, kWrite), __builtin_prefetch(p + sx + sy, kWrite);
  }
}

// The steps of a trilinear lookup, all channels at once: differences along z, y and x, and values on the way.
struct Lerp {
  v4 z[4], y[2], x, t[2], value;
};

HH_INLINE Lerp lerp_cell(const GridView& g, const Cells& c, int lane, bool gradient) {
  const float* p = g.data + 4 * (int64_t)c.index[lane];
  const int64_t sx = (int64_t)g.R * g.R * 4, sy = (int64_t)g.R * 4;
  const float u = c.f[0][lane], v = c.f[1][lane], w = c.f[2][lane];
  Lerp o;
  v4 a[4], m[2];
  for (int k = 0; k < 4; ++k) {
    const float* q = p + (k >> 1) * sx + (k & 1) * sy;
    const v4 low = load4(q);
    o.z[k] = load4(q + 4) - low, a[k] = low + o.z[k] * w;
  }
  for (int k = 0; k < 2; ++k) {
    o.y[k] = a[2 * k + 1] - a[2 * k], m[k] = a[2 * k] + o.y[k] * v;
    if (gradient) o.t[k] = o.z[2 * k] + (o.z[2 * k + 1] - o.z[2 * k]) * v;
  }
  o.x = m[1] - m[0];
  o.value = m[0] + o.x * u;
  return o;
}

void grid_sample(const GridView& g, const float* x, int64_t b, int64_t e, float* val, float* grad) {
  const float inv = 1.f / g.h;
  vf p[3];
  Cells cells[2];
  if (b < e) load_points(x, b, e, p), find_cells(g, p, inv, cells[0]);
  for (int64_t n = b; n < e; n += HH_LANES) {
    const Cells& c = cells[(n - b) / HH_LANES % 2];
    if (n + HH_LANES < e) {
      Cells& next = cells[((n - b) / HH_LANES + 1) % 2];
      load_points(x, n + HH_LANES, e, p), find_cells(g, p, inv, next);
      prefetch_cells<0>(g.data, g.R, next);
    }
    for (int i = 0; i < HH_LANES && n + i < e; ++i) {
      const Lerp l = lerp_cell(g, c, i, true);
      store4(val + 4 * (n + i), l.value);
      float* o = grad + 3 * (n + i);
      o[0] = l.x[0] * inv;
      o[1] = (l.y[0][0] + (l.y[1][0] - l.y[0][0]) * c.f[0][i]) * inv;
      o[2] = (l.t[0][0] + (l.t[1][0] - l.t[0][0]) * c.f[0][i]) * inv;
    }
  }
}

// Adds to grid planes [slab0, slab1) only; list: n samples in ascending order, or null for the first n. Each voxel gets its terms
// in the order of the samples whichever slab it is in, so the sum does not depend on how the planes were dealt to threads.
template <bool LISTED>
HH_INLINE void scatter_points(const GridView& g, const float* x, const int32_t* list, int64_t n, const float* v_val, const float* v_grad, int slab0,
                              int slab1, float* v_data, uint8_t* rows) {
  const float inv = 1.f / g.h;
  const int64_t sx = (int64_t)g.R * g.R * 4, sy = (int64_t)g.R * 4;
  vf p[3];
  const auto load = [&](int64_t at) {
    if (!LISTED) return load_points(x, at, n, p);
    const float* q[HH_LANES];
    for (int i = 0; i < HH_LANES; ++i) q[i] = x + 3 * (int64_t)list[at + i < n ? at + i : n - 1];
    for (int k = 0; k < 3; ++k) {
#if HH_LANES == 8
      p[k] = vf{q[0][k], q[1][k], q[2][k], q[3][k], q[4][k], q[5][k], q[6][k], q[7][k]};
#else
      p[k] = vf{q[0][k], q[1][k], q[2][k], q[3][k]};
#endif
    }
  };
  Cells cells[2];
  if (n > 0) load(0), find_cells(g, p, inv, cells[0]);
  for (int64_t s0 = 0; s0 < n; s0 += HH_LANES) {
    const Cells& c = cells[s0 / HH_LANES % 2];
    if (s0 + HH_LANES < n) {
      Cells& next = cells[(s0 / HH_LANES + 1) % 2];
      load(s0 + HH_LANES), find_cells(g, p, inv, next);
      prefetch_cells<1>(v_data, g.R, next);
    }
    for (int l = 0; l < HH_LANES && s0 + l < n; ++l) {
      const int64_t s = LISTED ? list[s0 + l] : s0 + l;
      const int i = c.plane[l];
      if (i + 1 < slab0 || i >= slab1) continue;
      const v4 v = load4(v_val + 4 * s);
      float gx = 0, gy = 0, gz = 0;
      if (v_grad) gx = v_grad[3 * s] * inv, gy = v_grad[3 * s + 1] * inv, gz = v_grad[3 * s + 2] * inv;
      else if (v[0] == 0 && v[1] == 0 && v[2] == 0 && v[3] == 0) continue;
      const float U[2] = {1 - c.f[0][l], c.f[0][l]}, V[2] = {1 - c.f[1][l], c.f[1][l]}, W[2] = {1 - c.f[2][l], c.f[2][l]};
      for (int a = 0; a < 2; ++a) {
        if (i + a < slab0 || i + a >= slab1) continue;
        const float da = a ? gx : -gx;
        for (int j = 0; j < 2; ++j) {
          float* q = v_data + 4 * (int64_t)c.index[l] + a * sx + j * sy;
          rows[c.row[l] + a * g.R + j] = 1;
          const float uv = U[a] * V[j];
          v4 t0 = v * (uv * W[0]), t1 = v * (uv * W[1]);
          if (v_grad) {
            const float side = da * V[j] + (j ? gy : -gy) * U[a], dz = gz * uv;
            t0 += v4{side * W[0] - dz, 0, 0, 0};
            t1 += v4{side * W[1] + dz, 0, 0, 0};
          }
          store4(q, load4(q) + t0);
          store4(q + 4, load4(q + 4) + t1);
        }
      }
    }
  }
}

void grid_scatter(const GridView& g, const float* x, const int32_t* list, int64_t n, const float* v_val, const float* v_grad, int slab0, int slab1,
                  float* v_data, uint8_t* rows) {
  if (list) scatter_points<true>(g, x, list, n, v_val, v_grad, slab0, slab1, v_data, rows);
  else scatter_points<false>(g, x, list, n, v_val, v_grad, slab0, slab1, v_data, rows);
}

HH_INLINE float dot4(v4 a, v4 b) {
  const v4 p = a * b;
  return (p[0] + p[1]) + (p[2] + p[3]);
}

void grid_v_x(const GridView& g, const float* x, int64_t b, int64_t e, const float* v_val, const float* v_grad, float* v_x) {
  const float inv = 1.f / g.h;
  for (int64_t n = b; n < e; n += HH_LANES) {
    vf p[3];
    Cells c;
    load_points(x, n, e, p);
    find_cells(g, p, inv, c);
    for (int i = 0; i < HH_LANES && n + i < e; ++i) {
      const Lerp l = lerp_cell(g, c, i, true);
      const float u = c.f[0][i];
      const v4 v = load4(v_val + 4 * (n + i));
      float o[3] = {dot4(v, l.x), dot4(v, l.y[0] + (l.y[1] - l.y[0]) * u), dot4(v, l.t[0] + (l.t[1] - l.t[0]) * u)};
      if (v_grad) {  // the mixed second derivatives; a trilinear field has no pure ones
        const float *w = v_grad + 3 * (n + i), z0 = l.z[1][0] - l.z[0][0], z1 = l.z[3][0] - l.z[2][0];
        const float xy = (l.y[1][0] - l.y[0][0]) * inv, xz = (l.t[1][0] - l.t[0][0]) * inv, yz = (z0 + (z1 - z0) * u) * inv;
        o[0] += w[1] * xy + w[2] * xz;
        o[1] += w[0] * xy + w[2] * yz;
        o[2] += w[0] * xz + w[1] * yz;
      }
      for (int k = 0; k < 3; ++k) v_x[3 * (n + i) + k] = c.inside[k][i] ? o[k] * inv : 0.f;
    }
  }
}

// [t0,t1]: the first passage of the ray through |phi| < band. See grid.py for the contract. One lane is one ray; a lane whose ray
// is done takes the next one.
struct March {
  alignas(32) float o[3][HH_LANES], d[3][HH_LANES], a[HH_LANES], b[HH_LANES], best[HH_LANES], best_t[HH_LANES], tin[HH_LANES], tout[HH_LANES], s[HH_LANES];
  alignas(32) int32_t in[HH_LANES], alive[HH_LANES], step[HH_LANES];
  int64_t ray[HH_LANES];
};

HH_INLINE vf& lanes(float* p) { return *(vf*)p; }
HH_INLINE vi& lanes(int32_t* p) { return *(vi*)p; }

// Signed distances at HH_LANES points; f is channel 0 alone.
HH_INLINE vf sdf_at(const GridView& g, const float* f, const vf* x, float inv) {
  Cells c;
  find_cells(g, x, inv, c);
  const int64_t sx = (int64_t)g.R * g.R, sy = g.R;
  vf q[8];
  for (int k = 0; k < 8; k += 2) {
    const float* p = f + (k >> 2) * sx + (k >> 1 & 1) * sy;
    const int32_t* n = c.index;
#if HH_LANES == 8 && defined(__AVX2__)
    load_pairs(p + n[0], p + n[1], p + n[2], p + n[3], p + n[4], p + n[5], p + n[6], p + n[7], q + k);
#else
    for (int i = 0; i < HH_LANES; ++i) q[k][i] = p[n[i]], q[k + 1][i] = p[n[i] + 1];
#endif
  }
  const vf u = lanes(c.f[0]), v = lanes(c.f[1]), w = lanes(c.f[2]);
  for (int k = 0; k < 4; ++k) q[k] = q[2 * k] + (q[2 * k + 1] - q[2 * k]) * w;
  for (int k = 0; k < 2; ++k) q[k] = q[2 * k] + (q[2 * k + 1] - q[2 * k]) * v;
  return q[0] + (q[1] - q[0]) * u;
}

void grid_march(const GridView& g, const float* field, const float* o_, const float* d_, int64_t begin, int64_t end, float min_step, float band, float* t0, float* t1, float* phi_min) {
  const float inv = 1.f / g.h;
  const vf zero = {}, small = all(min_step);
  March m = {};
  int64_t next = begin;
  for (int i = 0; i < HH_LANES; ++i) m.step[i] = -1;  // asks for a ray
  for (;;) {
    for (int i = 0; i < HH_LANES; ++i) {
      while (m.step[i] < 0) {
        if (m.alive[i]) {
          const int64_t n = m.ray[i];
          const bool miss = m.tin[i] < 0;
          t0[n] = miss ? m.best_t[i] - min_step : m.tin[i];
          t1[n] = (miss ? m.best_t[i] + min_step : m.tout[i]) + 0.5f * min_step;
          phi_min[n] = m.best[i];
        }
        m.alive[i] = next < end ? -1 : 0;
        m.step[i] = 0;
        if (!m.alive[i]) break;
        const float *o = o_ + 3 * next, *d = d_ + 3 * next;
        float a = 0, b = 1e9f;
        for (int k = 0; k < 3; ++k) {
          m.o[k][i] = o[k], m.d[k][i] = d[k];
          const float dk = absf(d[k]) > 1e-12f ? d[k] : 1e-12f, r = 1.f / dk;
          const float p = (g.lo[k] - o[k]) * r, q = (g.lo[k] + (g.R - 1) * g.h - o[k]) * r;
          a = maxf(a, minf(p, q));
          b = minf(b, maxf(p, q));
        }
        m.a[i] = m.s[i] = a, m.b[i] = b, m.best[i] = 1e9f, m.best_t[i] = 0.5f * (a + b);
        m.tin[i] = m.tout[i] = -1, m.in[i] = 0;
        m.ray[i] = next++;
        if (!(a < b)) m.step[i] = -1;
      }
    }
    const vi alive = lanes(m.alive);
    if (!any(alive)) return;
    vi done;
    do {
      const vf s = lanes(m.s), x[3] = {lanes(m.o[0]) + s * lanes(m.d[0]), lanes(m.o[1]) + s * lanes(m.d[1]), lanes(m.o[2]) + s * lanes(m.d[2])};
      const vf f = sdf_at(g, field, x, inv), jump = (f - band) * 0.9f, start = s - 0.5f * small;
      const vi closer = f < lanes(m.best), was_in = lanes(m.in), enters = ~was_in & (f < band), in = was_in | enters;
      lanes(m.best_t) = closer ? s : lanes(m.best_t);
      const vf best = lanes(m.best) = closer ? f : lanes(m.best);
      lanes(m.tin) = enters ? (start > lanes(m.a) ? start : lanes(m.a)) : lanes(m.tin);
      lanes(m.tout) = in ? s : lanes(m.tout);
      const vi beyond = in & (f > band), through = in & ((f < -band) | (beyond & (best <= 0.6f * band)));
      const vi slow = in & ~beyond;  // a ray that only grazed the outer band goes on as if it had not been in
      lanes(m.in) = slow;
      const vf t = s + ((slow | ~(jump > small)) ? small : jump);
      lanes(m.s) = t;
      const vi step = lanes(m.step) + 1;
      done = alive & (through | ~(t < lanes(m.b)) | (step >= 256));
      lanes(m.step) = done ? vi{} - 1 : step;
    } while (!any(done));
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

// Voxels [k0,k1) of one inner row of grid_reg_flux. A function of its own because only restrict parameters convince the compiler to vectorise it.
__attribute__((noinline)) void reg_row(int R, int k0, int k1, const float* __restrict p, RegTerms a, float* __restrict fx, float* __restrict fy,
                                       float* __restrict fz, float* __restrict fl, double* __restrict sums) {
  const int64_t sx = (int64_t)R * R, sy = R;
  const float i2h = 0.5f / a.h, ih = 1.f / a.h, we = 2 * a.w_eik * i2h, wl = 2 * a.w_lap * ih;
  float le = 0, ll = 0, count = 0;  // a row is short enough for float sums
  for (int k = k0; k < k1; ++k) {
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
    if (!border) reg_row(R, 1, R - 1, f + at, {h, w_eik, w_lap, band}, o[0], o[1], o[2], o[3], sums);
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

}  // namespace
}  // namespace hh
