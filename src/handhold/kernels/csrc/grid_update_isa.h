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
    int lo = 0, hi = R;
    while (lo < hi && zero4(load4(v + 4 * lo))) ++lo;
    while (hi > lo && zero4(load4(v + 4 * hi - 4))) --hi;
    const Span seen = lo < hi ? Span{lo, hi} : none;
    for (int k = seen.lo; k < seen.hi; ++k) g[k] += v[4 * k];
    u.v_span[i * R + j] = seen;
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

// -1 in all four channels of a voxel if it is in any of them.
HH_INLINE vi any_channel(vi m) {
#if HH_LANES == 8 && defined(__AVX__)
  __m256 a = (__m256)m;
  a = _mm256_or_ps(a, _mm256_permute_ps(a, 0xb1));
  return (vi)_mm256_or_ps(a, _mm256_permute_ps(a, 0x4e));
#else
  for (int l = 0; l < HH_LANES; l += 4) m[l] = m[l + 1] = m[l + 2] = m[l + 3] = m[l] | m[l + 1] | m[l + 2] | m[l + 3];
  return m;
#endif
}

// Adam on the voxels with a gradient; false when there are none.
HH_INLINE bool adam_lanes(const GridUpdate& u, vf lr, vf eps, vf& P, vf g, vf& M, vf& V) {
  const vi on = any_channel(g != 0.f);
  if (!any(on)) return false;
  const vf m = M * u.b1 + g * (1 - u.b1), v = V * u.b2 + g * g * (1 - u.b2);
  vf r = v * u.c2;
#if HH_LANES == 8 && defined(__AVX__)
  r = (vf)_mm256_sqrt_ps((__m256)r);
#elif HH_LANES == 4 && defined(__SSE2__)
  r = (vf)_mm_sqrt_ps((__m128)r);
#else
  for (int l = 0; l < HH_LANES; ++l) r[l] = __builtin_sqrtf(r[l]);
#endif
  P = on ? P - lr * (m * u.c1) / (r + eps) : P;
  M = on ? m : M;
  V = on ? v : V;
  return true;
}

// The last blur across and Adam on plane i; clears the gradient. row: R floats.
void grid_step(const GridUpdate& u, int i, const float* from, const Span* span, float* row) {
  const int R = u.R;
  constexpr int kVoxels = HH_LANES / 4;
  vf lr, ep;
  for (int k = 0; k < HH_LANES; ++k) lr[k] = k % 4 ? u.lr_color : u.lr_sdf, ep[k] = k % 4 ? 1e-12f : u.eps;
  double grown = 0, newly = 0;
  for (int j = 0; j < R; ++j) {
    const int64_t at = ((int64_t)i * R + j) * R;
    for (int k = 0; k < R; ++k) row[k] = 0;
    Span s = span[i * R + j];
    if (u.blur < 1)
      for (int k = s.lo; k < s.hi; ++k) row[k] = from[at + k];
    else
      s = blur_across_row(R, i, j, from, span, row);
    s = join(s, u.v_span[i * R + j]);
    int64_t counted = (at + s.lo + 6) / 7 * 7;  // the next voxel that eps is made of
    for (int k = s.lo; k < s.hi; k += kVoxels) {
      const int64_t n = 4 * (at + k);
      if (k + kVoxels > s.hi) {  // the odd one out, through memory
        alignas(32) float part[4][HH_LANES] = {};
        float* all[4] = {u.data + n, u.v_data + n, u.m + n, u.v + n};
        for (int c = 0; c < 4; ++c) store4(part[c], load4(all[c]));
        part[1][0] = row[k];
        const float before = part[3][0];
        if (!adam_lanes(u, lr, ep, *(vf*)part[0], *(vf*)part[1], *(vf*)part[2], *(vf*)part[3])) continue;
        part[1][0] = part[1][1] = part[1][2] = part[1][3] = 0;
        for (int c = 0; c < 4; ++c) store4(all[c], load4(part[c]));
        if (counted == at + k) grown += (double)maxf(part[3][0], 0) - maxf(before, 0), newly += (part[3][0] > 0) - (before > 0);
        continue;
      }
      vf P = load(u.data + n), g = load(u.v_data + n), M = load(u.m + n), V = load(u.v + n);
      const vf V0 = V;
      for (int l = 0; l < kVoxels; ++l) g[4 * l] = row[k + l];
      if (adam_lanes(u, lr, ep, P, g, M, V)) {
        store(u.data + n, P), store(u.v_data + n, vf{}), store(u.m + n, M), store(u.v + n, V);
        for (int l = 0; l < kVoxels; ++l)
          if (counted == at + k + l) grown += (double)maxf(V[4 * l], 0) - maxf(V0[4 * l], 0), newly += (V[4 * l] > 0) - (V0[4 * l] > 0);
      }
      if (counted < at + k + kVoxels) counted += 7;
    }
  }
  u.rms[2 * i] += grown, u.rms[2 * i + 1] += newly;
}

// Sum and count of the second moment over every 7th voxel that has ever had a gradient: the scale of Adam's eps.
void grid_rms(const GridUpdate& u, int i) {
  const int64_t p = (int64_t)u.R * u.R;
  double sum = 0, count = 0;
  for (int64_t n = (i * p + 6) / 7 * 7; n < (i + 1) * p; n += 7)
    if (u.v[4 * n] > 0) sum += u.v[4 * n], ++count;
  u.rms[2 * i] = sum, u.rms[2 * i + 1] = count;
}

}  // namespace
}  // namespace hh
