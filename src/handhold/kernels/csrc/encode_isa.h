// Multiresolution grids, dense and hashed (Mueller et al., SIGGRAPH 2022), with the analytic Jacobian. Value and Jacobian are
// both linear in the table, so one backward covers losses on features, normals, eikonal and position. One lane is one point.
#pragma once

namespace hh {
namespace {

typedef uint32_t vu __attribute__((vector_size(HH_LANES * 4)));

// Where HH_LANES points lie in one level.
struct Site {
  vf s[3];       // interpolation weight of the upper corner: the fraction, or its smoothstep
  vf d[3], c[3]; // its first and second derivative by x; zero on an axis where the point was clamped to the box
  vu index[8];   // rows of the corners, x slowest
};

template <bool kSmooth>
HH_INLINE void find_site(const EncodeArgs& a, const EncodeLevel& l, const vf* x, Site& o) {
  const vf zero = {}, one = zero + 1.f;
  vi i[3];
  for (int k = 0; k < 3; ++k) {
    const vf u = (x[k] - a.lo[k]) * a.inv[k], N = all((float)l.res);
    const vi inside = (u >= zero) & (u <= one);
    vf q = u > zero ? (u < one ? u : one) : zero;  // NaN goes to 0
    q *= N;
    const vi n = __builtin_convertvector(q, vi), last = vi{} + (l.res - 1);
    i[k] = n < last ? n : last;
    const vf f = q - __builtin_convertvector(i[k], vf);
    const vf slope = inside ? N * a.inv[k] : zero;
    if (kSmooth) {
      o.s[k] = f * f * (3.f - 2.f * f);
      o.d[k] = 6.f * f * (1.f - f) * slope;
      o.c[k] = (6.f - 12.f * f) * slope * slope;
    } else {
      o.s[k] = f, o.d[k] = slope;
    }
  }
  const vu X = (vu)i[0], Y = (vu)i[1], Z = (vu)i[2];
  if (l.mask) {
    const vu y0 = Y * 2654435761u, z0 = Z * 805459861u, y1 = y0 + 2654435761u, z1 = z0 + 805459861u;
    for (int c = 0; c < 8; ++c) o.index[c] = ((X + (c >> 2 & 1)) ^ (c & 2 ? y1 : y0) ^ (c & 1 ? z1 : z0)) & l.mask;
  } else {
    const uint32_t n = l.res + 1;
    const vu base = (X * n + Y) * n + Z;
    for (int c = 0; c < 8; ++c) o.index[c] = base + ((c >> 2 & 1) * n * n + (c >> 1 & 1) * n + (c & 1));
  }
}

// q[f][lane] = rows[index[lane]*F + f]
template <int F>
HH_INLINE void gather(const float* rows, const vu& index, vf* q) {
  alignas(32) uint32_t at[HH_LANES];
  *(vu*)at = index;
#if HH_LANES == 8 && defined(__AVX2__)
  if (F % 2 == 0) {
    const float* p[8];
    for (int i = 0; i < 8; ++i) p[i] = rows + F * (int64_t)at[i];
    for (int f = 0; f < F; f += 2) load_pairs(p[0] + f, p[1] + f, p[2] + f, p[3] + f, p[4] + f, p[5] + f, p[6] + f, p[7] + f, q + f);
    return;
  }
#endif
  for (int i = 0; i < HH_LANES; ++i) {
    const float* p = rows + F * (int64_t)at[i];
    for (int f = 0; f < F; ++f) q[f][i] = p[f];
  }
}

// rows[index[lane]*F + f] += g[f][lane], lane by lane: two lanes may share a row.
template <int F>
HH_INLINE void scatter_add(float* rows, const vu& index, const vf* g) {
  alignas(32) uint32_t at[HH_LANES];
  *(vu*)at = index;
  alignas(32) float v[F][HH_LANES];
#if HH_LANES == 8 && defined(__AVX2__)
  if (F == 2) {
    const __m256 lo = _mm256_unpacklo_ps((__m256)g[0], (__m256)g[F > 1]), hi = _mm256_unpackhi_ps((__m256)g[0], (__m256)g[F > 1]);
    const __m128 p[4] = {_mm256_castps256_ps128(lo), _mm256_castps256_ps128(hi), _mm256_extractf128_ps(lo, 1), _mm256_extractf128_ps(hi, 1)};
    for (int i = 0; i < 4; ++i) {
      float *r = rows + 2 * (int64_t)at[2 * i], *s = rows + 2 * (int64_t)at[2 * i + 1];
      _mm_storel_pi((__m64*)r, _mm_add_ps(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)r)), p[i]));
      _mm_storel_pi((__m64*)s, _mm_add_ps(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)s)), _mm_movehl_ps(p[i], p[i])));
    }
    return;
  }
#endif
  for (int f = 0; f < F; ++f) *(vf*)v[f] = g[f];
  for (int i = 0; i < HH_LANES; ++i) {
    float* r = rows + F * (int64_t)at[i];
    for (int f = 0; f < F; ++f) r[f] += v[f][i];
  }
}

constexpr int64_t kEncodeBlock = 1024;  // points taken through all levels at once: their gradients stay in cache

template <int C>
HH_INLINE void add_rows(float* p, int64_t stride, int64_t lanes, vf* v) {
  vf t[C];
  load_rows<C>(p, stride, lanes, t);
  for (int c = 0; c < C; ++c) v[c] += t[c];
  store_rows<C>(p, stride, lanes, v);
}

// The points of one block, axis by axis.
struct BlockPoints {
  vf x[3][kEncodeBlock / HH_LANES];
};

HH_INLINE void load_block(const float* x, int64_t b, int64_t e, BlockPoints& p) {
  for (int64_t n = b, i = 0; n < e; n += HH_LANES, ++i) {
    vf q[3];
    load_points(x, n, e, q);
    for (int k = 0; k < 3; ++k) p.x[k][i] = q[k];
  }
}

// dL/dvalue and dL/dJacobian of HH_LANES points; 0 where there is none.
template <int F>
HH_INLINE void load_upstream(const EncodeArgs& a, int64_t n, int64_t column, int64_t lanes, vf* v_value, vf* v_jac) {
  if (a.v_val) load_rows<F>(a.v_val + n * a.D + column, a.D, lanes, v_value);
  else
    for (int f = 0; f < F; ++f) v_value[f] = vf{};
  if (a.v_jac) load_rows<3 * F>(a.v_jac + 3 * (n * a.D + column), 3 * a.D, lanes, v_jac);
  else
    for (int f = 0; f < 3 * F; ++f) v_jac[f] = vf{};
}

template <int F, bool kSmooth>
void encode_forward_(const EncodeArgs& a, int64_t b, int64_t e) {
  for (int64_t block = b; block < e; block += kEncodeBlock) {
    const int64_t stop = block + kEncodeBlock < e ? block + kEncodeBlock : e;
    bool first = true;
    BlockPoints points;
    load_block(a.x, block, stop, points);
    for (int l = 0; l < a.L; ++l) {
      const EncodeLevel& level = a.levels[l];
      if (a.sum && level.weight == 0 && !(first && l == a.L - 1)) continue;
      const float* rows = a.table + level.offset * F;
      const int64_t column = a.sum ? 0 : l * F;
      for (int64_t n = block; n < stop; n += HH_LANES) {
        const int64_t lanes = stop - n < HH_LANES ? stop - n : HH_LANES;
        const int64_t at = (n - block) / HH_LANES;
        vf q[8][F], value[F], jac[3 * F];
        if (level.weight == 0) {
          for (int f = 0; f < F; ++f) value[f] = jac[3 * f] = jac[3 * f + 1] = jac[3 * f + 2] = vf{};
        } else {
          Site s;
          const vf x[3] = {points.x[0][at], points.x[1][at], points.x[2][at]};
          find_site<kSmooth>(a, level, x, s);
          for (int c = 0; c < 8; ++c) gather<F>(rows, s.index[c], q[c]);
          const vf u = s.s[0], v = s.s[1], w = s.s[2];
          const vf dx = s.d[0] * level.weight, dy = s.d[1] * level.weight, dz = s.d[2] * level.weight;
          for (int f = 0; f < F; ++f) {
            vf z[4], p[4], y[2], m[2], t[2];
            for (int i = 0; i < 4; ++i) z[i] = q[2 * i + 1][f] - q[2 * i][f], p[i] = q[2 * i][f] + z[i] * w;
            for (int i = 0; i < 2; ++i) y[i] = p[2 * i + 1] - p[2 * i], m[i] = p[2 * i] + y[i] * v, t[i] = z[2 * i] + (z[2 * i + 1] - z[2 * i]) * v;
            value[f] = (m[0] + (m[1] - m[0]) * u) * level.weight;
            jac[3 * f] = (m[1] - m[0]) * dx;
            jac[3 * f + 1] = (y[0] + (y[1] - y[0]) * u) * dy;
            jac[3 * f + 2] = (t[0] + (t[1] - t[0]) * u) * dz;
          }
        }
        float *val = a.val + n * a.D + column, *slope = a.jac + 3 * (n * a.D + column);
        if (a.sum && !first) {
          add_rows<F>(val, a.D, lanes, value);
          if (a.jac) add_rows<3 * F>(slope, 3 * a.D, lanes, jac);
        } else {
          store_rows<F>(val, a.D, lanes, value);
          if (a.jac) store_rows<3 * F>(slope, 3 * a.D, lanes, jac);
        }
      }
      first = false;
    }
  }
}

// Adds to the table rows of levels [l0,l1), in the order of the points whoever does it.
template <int F, bool kSmooth>
void encode_v_table_(const EncodeArgs& a, int l0, int l1) {
  for (int64_t block = 0; block < a.n; block += kEncodeBlock) {
    const int64_t stop = block + kEncodeBlock < a.n ? block + kEncodeBlock : a.n;
    BlockPoints points;
    load_block(a.x, block, stop, points);
    for (int l = l0; l < l1; ++l) {
      const EncodeLevel& level = a.levels[l];
      if (level.weight == 0) continue;
      float* rows = a.v_table + level.offset * F;
      const int64_t column = a.sum ? 0 : l * F;
      for (int64_t n = block; n < stop; n += HH_LANES) {
        const int64_t lanes = stop - n < HH_LANES ? stop - n : HH_LANES;
        const int64_t at = (n - block) / HH_LANES;
        const vf x[3] = {points.x[0][at], points.x[1][at], points.x[2][at]};
        vf g[8][F], v_value[F], v_jac[3 * F];
        Site s;
        find_site<kSmooth>(a, level, x, s);
        load_upstream<F>(a, n, column, lanes, v_value, v_jac);
        const vf U[2] = {1.f - s.s[0], s.s[0]}, V[2] = {1.f - s.s[1], s.s[1]}, W[2] = {1.f - s.s[2], s.s[2]};
        for (int f = 0; f < F; ++f) {
          const vf v = v_value[f] * level.weight;
          const vf gx = v_jac[3 * f] * s.d[0] * level.weight, gy = v_jac[3 * f + 1] * s.d[1] * level.weight;
          const vf gz = v_jac[3 * f + 2] * s.d[2] * level.weight;
          for (int i = 0; i < 2; ++i) {
            const vf A = v * U[i] + (i ? gx : -gx), uy = gy * U[i], uz = gz * U[i];
            for (int j = 0; j < 2; ++j) {
              const vf B = A * V[j] + (j ? uy : -uy), z = uz * V[j];
              g[4 * i + 2 * j][f] = B * W[0] - z;
              g[4 * i + 2 * j + 1][f] = B * W[1] + z;
            }
          }
        }
        for (int c = 0; c < 8; ++c) scatter_add<F>(rows, s.index[c], g[c]);
      }
    }
  }
}

// dL/dx with the second-order terms of the Jacobian: mixed derivatives always, pure ones under smoothstep.
template <int F, bool kSmooth>
void encode_v_x_(const EncodeArgs& a, int64_t b, int64_t e) {
  for (int64_t block = b; block < e; block += kEncodeBlock) {
    const int64_t stop = block + kEncodeBlock < e ? block + kEncodeBlock : e, groups = (stop - block + HH_LANES - 1) / HH_LANES;
    BlockPoints points, out;
    load_block(a.x, block, stop, points);
    for (int64_t i = 0; i < groups; ++i) out.x[0][i] = out.x[1][i] = out.x[2][i] = vf{};
    for (int l = 0; l < a.L; ++l) {
      const EncodeLevel& level = a.levels[l];
      if (level.weight == 0) continue;
      const float* rows = a.table + level.offset * F;
      const int64_t column = a.sum ? 0 : l * F;
      for (int64_t i = 0; i < groups; ++i) {
        const int64_t n = block + i * HH_LANES, lanes = stop - n < HH_LANES ? stop - n : HH_LANES;
        const vf x[3] = {points.x[0][i], points.x[1][i], points.x[2][i]};
        vf q[8][F], v_value[F], v_jac[3 * F];
        Site s;
        find_site<kSmooth>(a, level, x, s);
        for (int c = 0; c < 8; ++c) gather<F>(rows, s.index[c], q[c]);
        load_upstream<F>(a, n, column, lanes, v_value, v_jac);
        const vf u = s.s[0], v = s.s[1], w = s.s[2], dx = s.d[0], dy = s.d[1], dz = s.d[2];
        vf r[3] = {};
        for (int f = 0; f < F; ++f) {
          vf z[4], p[4], y[2], m[2], t[2], h[2];
          for (int i = 0; i < 4; ++i) z[i] = q[2 * i + 1][f] - q[2 * i][f], p[i] = q[2 * i][f] + z[i] * w;
          for (int i = 0; i < 2; ++i) {
            y[i] = p[2 * i + 1] - p[2 * i], m[i] = p[2 * i] + y[i] * v;
            h[i] = z[2 * i + 1] - z[2 * i], t[i] = z[2 * i] + h[i] * v;
          }
          const vf gx = m[1] - m[0], gy = y[0] + (y[1] - y[0]) * u, gz = t[0] + (t[1] - t[0]) * u;
          const vf xy = (y[1] - y[0]) * dx * dy, xz = (t[1] - t[0]) * dx * dz, yz = (h[0] + (h[1] - h[0]) * u) * dy * dz;
          const vf jx = v_jac[3 * f], jy = v_jac[3 * f + 1], jz = v_jac[3 * f + 2];
          r[0] += v_value[f] * gx * dx + jy * xy + jz * xz;
          r[1] += v_value[f] * gy * dy + jx * xy + jz * yz;
          r[2] += v_value[f] * gz * dz + jx * xz + jy * yz;
          if (kSmooth) r[0] += jx * gx * s.c[0], r[1] += jy * gy * s.c[1], r[2] += jz * gz * s.c[2];
        }
        for (int k = 0; k < 3; ++k) out.x[k][i] += r[k] * level.weight;
      }
    }
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t n = block + i * HH_LANES;
      const vf o[3] = {out.x[0][i], out.x[1][i], out.x[2][i]};
      store_rows<3>(a.v_x + 3 * n, 3, stop - n < HH_LANES ? stop - n : HH_LANES, o);
    }
  }
}

// clang-format off
#define HH_BY_FEATURES(op, ...)                                                                                    \
  switch (a.F * 2 + a.smooth) {                                                                                     \
    case 2: op<1, false>(__VA_ARGS__); break;  case 3: op<1, true>(__VA_ARGS__); break;                             \
    case 4: op<2, false>(__VA_ARGS__); break;  case 5: op<2, true>(__VA_ARGS__); break;                             \
    case 8: op<4, false>(__VA_ARGS__); break;  case 9: op<4, true>(__VA_ARGS__); break;                             \
    case 16: op<8, false>(__VA_ARGS__); break; case 17: op<8, true>(__VA_ARGS__); break;                            \
  }
// clang-format on
void encode_forward(const EncodeArgs& a, int64_t b, int64_t e) { HH_BY_FEATURES(encode_forward_, a, b, e) }
void encode_v_table(const EncodeArgs& a, int l0, int l1) { HH_BY_FEATURES(encode_v_table_, a, l0, l1) }
void encode_v_x(const EncodeArgs& a, int64_t b, int64_t e) { HH_BY_FEATURES(encode_v_x_, a, b, e) }
#undef HH_BY_FEATURES

}  // namespace
}  // namespace hh
