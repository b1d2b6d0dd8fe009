// Triplane lookup with the analytic Jacobian: planes (3,R,R,C), bilinear, features contiguous.
#pragma once

namespace hh {
namespace {

constexpr int kPlaneAxes[3][2] = {{0, 1}, {0, 2}, {1, 2}};  // columns, rows

struct Texel {
  int i[2];    // column, row of the low corner
  float f[2];  // fraction
  float d[2];  // derivative of the texel coordinate by x; zero where the point was clamped
};

HH_INLINE Texel find_texel(const TriplaneArgs& a, const float* x, int plane) {
  Texel t;
  for (int k = 0; k < 2; ++k) {
    const int axis = kPlaneAxes[plane][k];
    const float slope = (a.align_corners ? a.R - 1 : a.R) * a.inv[axis], top = a.R - 1;
    const float p = (x[axis] - a.lo[axis]) * slope - (a.align_corners ? 0.f : 0.5f), q = clampf(p, 0.f, top);
    t.i[k] = mini((int)q, a.R - 2);
    t.f[k] = q - t.i[k];
    t.d[k] = p >= 0.f && p <= top ? slope : 0.f;
  }
  return t;
}

HH_INLINE int64_t texel_at(const TriplaneArgs& a, int plane, const Texel& t) {
  return (((int64_t)plane * a.R + t.i[1]) * a.R + t.i[0]) * a.C;
}

// One plane's part of one point: out (C) and, unless null, jac (C,3). Functions of their own: restrict parameters make them vectorise.
__attribute__((noinline)) void plane_value(int C, const float* __restrict p, const float* __restrict q, float u, float v, float* __restrict out, bool add) {
  const float w00 = (1 - u) * (1 - v), w10 = u * (1 - v), w01 = (1 - u) * v, w11 = u * v;
  if (add)
    for (int c = 0; c < C; ++c) out[c] += p[c] * w00 + p[C + c] * w10 + q[c] * w01 + q[C + c] * w11;
  else
    for (int c = 0; c < C; ++c) out[c] = p[c] * w00 + p[C + c] * w10 + q[c] * w01 + q[C + c] * w11;
}

__attribute__((noinline)) void plane_jacobian(int C, const float* __restrict p, const float* __restrict q, const Texel& t, const int* axes,
                                              float* __restrict jac) {
  for (int c = 0; c < C; ++c) {
    const float low = p[C + c] - p[c], high = q[C + c] - q[c], left = q[c] - p[c], right = q[C + c] - p[C + c];
    jac[3 * c + axes[0]] += (low + (high - low) * t.f[1]) * t.d[0];
    jac[3 * c + axes[1]] += (left + (right - left) * t.f[0]) * t.d[1];
  }
}

void triplane_forward(const TriplaneArgs& a, int64_t b, int64_t e) {
  const int64_t row = (int64_t)a.R * a.C, D = a.sum ? a.C : 3 * a.C;
  for (int64_t n = b; n < e; ++n) {
    if (a.jac)
      for (int64_t i = 0; i < 3 * D; ++i) a.jac[3 * n * D + i] = 0;
    for (int k = 0; k < 3; ++k) {
      const Texel t = find_texel(a, a.x + 3 * n, k);
      const float* p = a.planes + texel_at(a, k, t);
      const int64_t at = n * D + (a.sum ? 0 : k * a.C);
      plane_value(a.C, p, p + row, t.f[0], t.f[1], a.val + at, a.sum && k);
      if (a.jac) plane_jacobian(a.C, p, p + row, t, kPlaneAxes[k], a.jac + 3 * at);
    }
  }
}

__attribute__((noinline)) void plane_add(int C, float* __restrict p, const float* __restrict v, const float* __restrict j, const int* axes, float w0, float w1,
                                         float gx0, float gx1, float gy0, float gy1) {
  if (v)
    for (int c = 0; c < C; ++c) p[c] += v[c] * w0, p[C + c] += v[c] * w1;
  if (j)
    for (int c = 0; c < C; ++c) {
      p[c] += j[3 * c + axes[0]] * gx0 + j[3 * c + axes[1]] * gy0;
      p[C + c] += j[3 * c + axes[0]] * gx1 + j[3 * c + axes[1]] * gy1;
    }
}

// Adds to rows [row0,row1) of one plane, in the order of the points.
void triplane_v_planes(const TriplaneArgs& a, int plane, int row0, int row1) {
  const int64_t D = a.sum ? a.C : 3 * a.C;
  for (int64_t n = 0; n < a.n; ++n) {
    const Texel t = find_texel(a, a.x + 3 * n, plane);
    if (t.i[1] + 1 < row0 || t.i[1] >= row1) continue;
    const int64_t at = n * D + (a.sum ? 0 : plane * a.C);
    const float *v = a.v_val ? a.v_val + at : nullptr, *j = a.v_jac ? a.v_jac + 3 * at : nullptr;
    for (int r = 0; r < 2; ++r) {
      if (t.i[1] + r < row0 || t.i[1] + r >= row1) continue;
      const float u = t.f[0], y = r ? t.f[1] : 1 - t.f[1], dy = r ? t.d[1] : -t.d[1];
      plane_add(a.C, a.v_planes + texel_at(a, plane, t) + (int64_t)r * a.R * a.C, v, j, kPlaneAxes[plane], (1 - u) * y, u * y, -t.d[0] * y, t.d[0] * y,
                (1 - u) * dy, u * dy);
    }
  }
}

__attribute__((noinline)) void plane_v_x(int C, const float* __restrict p, const float* __restrict q, const float* __restrict v, const float* __restrict j,
                                         const Texel& t, const int* axes, float* __restrict v_x) {
  float gx = 0, gy = 0, mx = 0, my = 0;
  if (v)
    for (int c = 0; c < C; ++c) {
      const float low = p[C + c] - p[c], high = q[C + c] - q[c], left = q[c] - p[c], right = q[C + c] - p[C + c];
      gx += v[c] * (low + (high - low) * t.f[1]);
      gy += v[c] * (left + (right - left) * t.f[0]);
    }
  if (j)
    for (int c = 0; c < C; ++c) {
      const float mixed = (q[C + c] - q[c]) - (p[C + c] - p[c]);
      mx += j[3 * c + axes[1]] * mixed;
      my += j[3 * c + axes[0]] * mixed;
    }
  v_x[axes[0]] += t.d[0] * (gx + mx * t.d[1]);
  v_x[axes[1]] += t.d[1] * (gy + my * t.d[0]);
}

void triplane_v_x(const TriplaneArgs& a, int64_t b, int64_t e) {
  const int64_t row = (int64_t)a.R * a.C, D = a.sum ? a.C : 3 * a.C;
  for (int64_t n = b; n < e; ++n) {
    float* o = a.v_x + 3 * n;
    o[0] = o[1] = o[2] = 0;
    for (int k = 0; k < 3; ++k) {
      const Texel t = find_texel(a, a.x + 3 * n, k);
      const float* p = a.planes + texel_at(a, k, t);
      const int64_t at = n * D + (a.sum ? 0 : k * a.C);
      plane_v_x(a.C, p, p + row, a.v_val ? a.v_val + at : nullptr, a.v_jac ? a.v_jac + 3 * at : nullptr, t, kPlaneAxes[k], o);
    }
  }
}

}  // namespace
}  // namespace hh
