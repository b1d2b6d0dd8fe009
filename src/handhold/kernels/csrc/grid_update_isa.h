// Regularisers, blur and Adam of a grid in one sweep: nothing is touched outside the rows' active spans, and the flux of the
// regularisers lives for three planes only. Same arithmetic as the separate steps in grid_isa.h.
#pragma once

namespace hh {
namespace {

HH_INLINE Span join(Span a, Span b) { return {mini(a.lo, b.lo), maxi(a.hi, b.hi)}; }
HH_INLINE Span grow(Span s, int R) { return s.lo < s.hi ? Span{maxi(s.lo - 1, 0), mini(s.hi + 1, R)} : s; }

// [1 2 1]/4 along the two axes of one plane, from g (zero outside its rows' spans) to a; z is scratch.
HH_INLINE void blur_two_axes(int R, const float* g, const Span* g_span, float* z, float* a, Span* a_span) {
  for (int j = 0; j < R; ++j) {
    const float* q = g + (int64_t)j * R;
    float* o = z + (int64_t)j * R;
    const Span s = {maxi(g_span[j].lo - 1, 0), mini(g_span[j].hi + 1, R)};
    for (int k = 0; k < R; ++k) o[k] = 0;
    if (g_span[j].lo >= g_span[j].hi) continue;
    for (int k = maxi(s.lo, 1); k < mini(s.hi, R - 1); ++k) o[k] = .25f * (q[k - 1] + 2 * q[k] + q[k + 1]);
    o[0] = q[0], o[R - 1] = q[R - 1];
  }
  for (int j = 0; j < R; ++j) {
    const float* q = z + (int64_t)j * R;
    float* o = a + (int64_t)j * R;
    Span s = g_span[j];
    const bool edge = j == 0 || j == R - 1;
    if (!edge) s = {mini(s.lo, mini(g_span[j - 1].lo, g_span[j + 1].lo)), maxi(s.hi, maxi(g_span[j - 1].hi, g_span[j + 1].hi))};
    if (s.lo < s.hi) s = {maxi(s.lo - 1, 0), mini(s.hi + 1, R)};
    for (int k = 0; k < R; ++k) o[k] = 0;
    if (edge)
      for (int k = s.lo; k < s.hi; ++k) o[k] = q[k];
    else
      for (int k = s.lo; k < s.hi; ++k) o[k] = .25f * (q[k - R] + 2 * q[k] + q[k + R]);
    a_span[j] = s;
  }
}

// Plane i of the field f, where its rows are within the band, and how many inner voxels are.
void grid_scan(const GridUpdate& u, int i) {
  const int R = u.R;
  int64_t total = 0;
  for (int j = 0; j < R; ++j) {
    const int64_t row = ((int64_t)i * R + j) * R;
    const float* d = u.data + 4 * row;
    float* f = u.f + row;
    if (u.refresh)
      for (int k = 0; k < R; ++k) f[k] = d[4 * k];
    Span s = {R, 0};
    if (i > 0 && j > 0 && i < R - 1 && j < R - 1) {
      int lo = 1, hi = R - 1, count = 0;
      for (int k = lo; k < hi; ++k) count += absf(f[k]) <= u.band;
      if (!count) lo = hi;
      while (lo < hi && !(absf(f[lo]) <= u.band)) ++lo;
      while (hi > lo && !(absf(f[hi - 1]) <= u.band)) --hi;
      if (lo < hi) s = {lo, hi};
      total += count;
    }
    u.band_span[i * R + j] = s;
  }
  u.sums[3 * i + 2] = (double)total;
}

// What one slab works with: the flux of three planes (4 fields each), where they are not zero, and two planes for the blur.
struct Slab {
  float *flux[3], *g, *z;
  Span *flux_span[3], *g_span;
};

HH_INLINE void flux_plane(const GridUpdate& u, int i, bool own, const Slab& w) {
  const int R = u.R, slot = i % 3;
  const int64_t p = (int64_t)R * R;
  double unused[3], *sums = own ? u.sums + 3 * i : unused, count = 0;
  sums[0] = sums[1] = 0;
  for (int j = 0; j < R; ++j) {
    float* o[4];
    for (int c = 0; c < 4; ++c) {
      o[c] = w.flux[slot] + c * p + (int64_t)j * R;
      for (int k = w.flux_span[slot][j].lo; k < w.flux_span[slot][j].hi; ++k) o[c][k] = 0;
    }
    const Span s = w.flux_span[slot][j] = u.band_span[i * R + j];
    double row[3] = {0, 0, 0};
    if (s.lo < s.hi) reg_row(R, s.lo, s.hi, u.f + i * p + (int64_t)j * R, {u.h, u.w_eik, u.w_lap, u.band}, o[0], o[1], o[2], o[3], row);
    sums[0] += row[0], sums[1] += row[1], count += row[2];
  }
}

HH_INLINE bool zero4(v4 v) {
#if defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpneq_ps((__m128)v, _mm_setzero_ps())) == 0;
#else
  return v[0] == 0 && v[1] == 0 && v[2] == 0 && v[3] == 0;
#endif
}

const float kNone[kMaxGrid] = {};  // the flux beyond the border

// The transposed stencils on one row. Flux is zero outside the inner voxels, so k - 1 and k + 1 may lie in the rows beside it.
__attribute__((noinline)) void gather_row(Span s, float scale, const float* __restrict fz, const float* __restrict fl, const float* __restrict bx,
                                          const float* __restrict bl, const float* __restrict ax, const float* __restrict al, const float* __restrict ly,
                                          const float* __restrict ll, const float* __restrict ry, const float* __restrict rl, float* __restrict g) {
  for (int k = s.lo; k < s.hi; ++k)
    g[k] = scale * (bx[k] - ax[k] + ly[k] - ry[k] + fz[k - 1] - fz[k + 1] + (bl[k] + al[k] + ll[k] + rl[k] + fl[k - 1] + fl[k + 1] - 6 * fl[k]));
}

// The whole gradient of channel 0 in plane i, blurred along its two axes, into u.a.
HH_INLINE void gather_plane(const GridUpdate& u, int i, const Slab& w) {
  const int R = u.R;
  const int64_t p = (int64_t)R * R;
  const float *here = w.flux[i % 3], *before = w.flux[(i + 2) % 3], *after = w.flux[(i + 1) % 3];
  const Span none = {R, 0};
  for (int j = 0; j < R; ++j) {
    const int64_t at = (int64_t)j * R;
    float *g = w.g + at, *v = u.v_data + 4 * (i * p + at);
    for (int k = 0; k < R; ++k) g[k] = 0;
    const Span own = w.flux_span[i % 3][j], low = i ? w.flux_span[(i + 2) % 3][j] : none, high = i < R - 1 ? w.flux_span[(i + 1) % 3][j] : none;
    const Span left = j ? w.flux_span[i % 3][j - 1] : none, right = j < R - 1 ? w.flux_span[i % 3][j + 1] : none;
    const Span s = join(join(grow(own, R), join(low, high)), join(left, right));
    if (s.lo < s.hi) {
      const float *f = here + at, *b = i ? before + at : kNone, *a = i < R - 1 ? after + at : kNone;
      const float *l = j ? f - R : kNone, *r = j < R - 1 ? f + R : kNone;
      gather_row(s, u.scale, f + 2 * p, f + 3 * p, b, i ? b + 3 * p : kNone, a, i < R - 1 ? a + 3 * p : kNone, j ? l + p : kNone, j ? l + 3 * p : kNone,
                 j < R - 1 ? r + p : kNone, j < R - 1 ? r + 3 * p : kNone, g);
    }
    int lo = 0, hi = u.rows[i * R + j] ? R : 0;
    while (lo < hi && zero4(load4(v + 4 * lo))) ++lo;
    while (hi > lo && zero4(load4(v + 4 * hi - 4))) --hi;
    const Span seen = lo < hi ? Span{lo, hi} : none;
    for (int k = seen.lo; k < seen.hi; ++k) g[k] += v[4 * k];
    u.v_span[i * R + j] = seen, u.rows[i * R + j] = 0;
    w.g_span[j] = join(s, seen);
  }
  float* a = u.a + i * p;
  Span* a_span = u.a_span + i * R;
  if (u.blur < 1) {
    for (int64_t n = 0; n < p; ++n) a[n] = w.g[n];
    for (int j = 0; j < R; ++j) a_span[j] = w.g_span[j];
  } else {
    blur_two_axes(R, w.g, w.g_span, w.z, a, a_span);
  }
}

// Planes [i0,i1). work: 14 R^2 floats, zero; spans: 4 R.
void grid_slab(const GridUpdate& u, int i0, int i1, float* work, Span* spans) {
  const int R = u.R;
  const int64_t p = (int64_t)R * R;
  Slab w;
  for (int k = 0; k < 3; ++k) w.flux[k] = work + 4 * k * p, w.flux_span[k] = spans + k * R;
  w.g = work + 12 * p, w.z = work + 13 * p, w.g_span = spans + 3 * R;
  for (int n = 0; n < 4 * R; ++n) spans[n] = {R, 0};
  for (int i = maxi(i0 - 1, 0); i <= i1; ++i) {
    if (i < R) flux_plane(u, i, i >= i0 && i < i1, w);
    if (i > i0) gather_plane(u, i - 1, w);
  }
}

// Row j of plane i of `from` blurred across planes.
HH_INLINE Span blur_across_row(int R, int i, int j, const float* from, const Span* span, float* out) {
  const int64_t p = (int64_t)R * R, at = i * p + (int64_t)j * R;
  const float* a = from + at;
  Span s = span[i * R + j];
  const bool edge = i == 0 || i == R - 1;
  if (!edge) s = join(s, join(span[(i - 1) * R + j], span[(i + 1) * R + j]));
  if (edge)
    for (int k = s.lo; k < s.hi; ++k) out[k] = a[k];
  else
    for (int k = s.lo; k < s.hi; ++k) out[k] = .25f * (a[k - p] + 2 * a[k] + a[k + p]);
  return s;
}

// Plane i: across from `from`, then along its two axes into `to`. work: 2 R^2 floats; spans: R.
void grid_blur_next(const GridUpdate& u, int i, const float* from, const Span* from_span, float* to, Span* to_span, float* work, Span* spans) {
  const int R = u.R;
  const int64_t p = (int64_t)R * R;
  for (int j = 0; j < R; ++j) {
    float* row = work + (int64_t)j * R;
    for (int k = 0; k < R; ++k) row[k] = 0;
    spans[j] = blur_across_row(R, i, j, from, from_span, row);
  }
  blur_two_axes(R, work, spans, work + p, to + i * p, to_span + i * R);
}

HH_INLINE vf load_some(const float* p, int stride, int n) {
  if (n == HH_LANES) return stride == 1 ? load(p) : strided(p, stride);
  vf v = {};
  for (int i = 0; i < n; ++i) v[i] = p[i * stride];
  return v;
}

HH_INLINE void store_some(float* p, int stride, int n, vf v) {
  if (n == HH_LANES && stride == 1) return store(p, v);
  alignas(32) float t[HH_LANES];
  *(vf*)t = v;
  for (int i = 0; i < n; ++i) p[i * stride] = t[i];
}

// Adam on n voxels of one channel, where `on`; returns the new values.
HH_INLINE vf adam_channel(const GridUpdate& u, float lr, float eps, float* data, float* m, float* v, vf g, vi on, int n) {
  const vf P = load_some(data, 4, n), M = load_some(m, 1, n), V = load_some(v, 1, n);
  const vf m1 = M * u.b1 + g * (1 - u.b1), v1 = V * u.b2 + g * g * (1 - u.b2);
  vf r = v1 * u.c2;
#if HH_LANES == 8 && defined(__AVX__)
  r = (vf)_mm256_sqrt_ps((__m256)r);
#elif HH_LANES == 4 && defined(__SSE2__)
  r = (vf)_mm_sqrt_ps((__m128)r);
#else
  for (int l = 0; l < HH_LANES; ++l) r[l] = __builtin_sqrtf(r[l]);
#endif
  const vf p = on ? P - lr * (m1 * u.c1) / (r + eps) : P;
  store_some(data, 4, n, p);
  store_some(m, 1, n, on ? m1 : M);
  store_some(v, 1, n, on ? v1 : V);
  return p;
}

// The last blur across and Adam on plane i; clears the gradient. row: 2 R + 2 HH_LANES floats.
void grid_step(const GridUpdate& u, int i, const float* from, const Span* span, float* row) {
  const int R = u.R;
  const int64_t size = (int64_t)R * R * R;
  int32_t* on = (int32_t*)(row + R + HH_LANES);
  double grown = 0, newly = 0;
  for (int j = 0; j < R; ++j) {
    const int64_t at = ((int64_t)i * R + j) * R;
    const Span seen = u.v_span[i * R + j];
    for (int k = 0; k < R + HH_LANES; ++k) row[k] = 0;
    Span s = span[i * R + j];
    if (u.blur < 1)
      for (int k = s.lo; k < s.hi; ++k) row[k] = from[at + k];
    else
      s = blur_across_row(R, i, j, from, span, row);
    s = join(s, seen);
    if (s.lo >= s.hi) continue;
    for (int k = s.lo; k < s.hi + HH_LANES; ++k) on[k] = row[k] != 0 ? -1 : 0;
    for (int k = seen.lo; k < seen.hi; ++k) {
      v4 g = load4(u.v_data + 4 * (at + k));
      g[0] = row[k];
      if (!zero4(g)) on[k] = -1;
    }
    int64_t counted = (at + s.lo + 6) / 7 * 7;  // the next voxel that eps is made of
    for (int k = s.lo; k < s.hi; k += HH_LANES) {
      const int n = mini(HH_LANES, R - k);  // `on` is 0 beyond the span
      vi mask;
      __builtin_memcpy(&mask, on + k, sizeof mask);
      const bool counts = counted < at + k + n;
      if (any(mask)) {
        float before[2] = {0, 0};
        for (int c = 0; c < 2 && counted + 7 * c < at + k + n; ++c) before[c] = u.v[counted + 7 * c];
        const vf p = adam_channel(u, u.lr_sdf, u.eps, u.data + 4 * (at + k), u.m + at + k, u.v + at + k, load(row + k), mask, n);
        store_some(u.f + at + k, 1, n, p);
        for (int c = 0; c < 2 && counted + 7 * c < at + k + n; ++c) {
          const float now = u.v[counted + 7 * c];
          grown += (double)maxf(now, 0) - maxf(before[c], 0), newly += (now > 0) - (before[c] > 0);
        }
      }
      if (counts)
        while (counted < at + k + n) counted += 7;
    }
    // Colour has moments only where a sample ever was.
    Span& ever = u.ever[i * R + j];
    ever = join(ever, seen);
    const Span both = {maxi(ever.lo, s.lo), mini(ever.hi, s.hi)};
    for (int k = both.lo; k < both.hi; k += HH_LANES) {
      const int n = mini(HH_LANES, R - k);
      vi mask;
      __builtin_memcpy(&mask, on + k, sizeof mask);
      if (!any(mask)) continue;
      for (int c = 1; c < 4; ++c) {
        const int64_t e = 4 * (at + k) + c, q = c * size + at + k;
        adam_channel(u, u.lr_color, 1e-12f, u.data + e, u.m + q, u.v + q, load_some(u.v_data + e, 4, n), mask, n);
      }
    }
    for (int64_t k = 4 * (at + seen.lo); k < 4 * (at + seen.hi); ++k) u.v_data[k] = 0;
  }
  u.rms[2 * i] += grown, u.rms[2 * i + 1] += newly;
}

}  // namespace
}  // namespace hh
