// 3D Gaussians to 2D: covariance (Zwicker et al., EWA splatting, 2001), spherical harmonics, tile ranges; and the way back.
// Constants are those of gsplat's `rasterization`.
#pragma once

namespace hh {
namespace {

constexpr int kTile = 16;
constexpr float kNear = 0.01f, kDilation = 0.3f;
constexpr int kSlot = 10;  // rgb, opacity, sum of q dx, q dy, q dx^2, q dx dy, q dy^2, depth

HH_INLINE void sh_basis(int degree, float x, float y, float z, float* B) {
  B[0] = 0.28209479177387814f;
  if (degree < 1) return;
  const float c = 0.4886025119029199f;
  B[1] = -c * y, B[2] = c * z, B[3] = -c * x;
  if (degree < 2) return;
  const float xx = x * x, yy = y * y, zz = z * z, xy = x * y, yz = y * z, xz = x * z;
  B[4] = 1.0925484305920792f * xy, B[5] = -1.0925484305920792f * yz, B[6] = 0.31539156525252005f * (2 * zz - xx - yy);
  B[7] = -1.0925484305920792f * xz, B[8] = 0.5462742152960396f * (xx - yy);
  if (degree < 3) return;
  B[9] = -0.5900435899266435f * y * (3 * xx - yy), B[10] = 2.890611442640554f * xy * z;
  B[11] = -0.4570457994644658f * y * (4 * zz - xx - yy), B[12] = 0.3731763325901154f * z * (2 * zz - 3 * xx - 3 * yy);
  B[13] = -0.4570457994644658f * x * (4 * zz - xx - yy), B[14] = 1.445305721320277f * z * (xx - yy);
  B[15] = -0.5900435899266435f * x * (xx - 3 * yy);
}

// Gradient of sum_k w_k B_k with respect to (x,y,z).
HH_INLINE void sh_basis_grad(int degree, float x, float y, float z, const float* w, float* g) {
  g[0] = g[1] = g[2] = 0;
  if (degree < 1) return;
  const float c1 = 0.4886025119029199f;
  g[1] -= c1 * w[1], g[2] += c1 * w[2], g[0] -= c1 * w[3];
  if (degree < 2) return;
  const float c = 1.0925484305920792f, d = 0.31539156525252005f, e = 0.5462742152960396f;
  g[0] += c * y * w[4] - 2 * d * x * w[6] - c * z * w[7] + 2 * e * x * w[8];
  g[1] += c * x * w[4] - c * z * w[5] - 2 * d * y * w[6] - 2 * e * y * w[8];
  g[2] += -c * y * w[5] + 4 * d * z * w[6] - c * x * w[7];
  if (degree < 3) return;
  const float xx = x * x, yy = y * y, zz = z * z;
  const float k9 = -0.5900435899266435f * w[9], k10 = 2.890611442640554f * w[10], k11 = -0.4570457994644658f * w[11];
  const float k12 = 0.3731763325901154f * w[12], k13 = -0.4570457994644658f * w[13], k14 = 1.445305721320277f * w[14];
  const float k15 = -0.5900435899266435f * w[15];
  g[0] += k9 * 6 * x * y + k10 * y * z - k11 * 2 * x * y - k12 * 6 * x * z + k13 * (4 * zz - 3 * xx - yy) + k14 * 2 * x * z + k15 * 3 * (xx - yy);
  g[1] += k9 * 3 * (xx - yy) + k10 * x * z + k11 * (4 * zz - xx - 3 * yy) - k12 * 6 * y * z - k13 * 2 * x * y - k14 * 2 * y * z - k15 * 6 * x * y;
  g[2] += k10 * x * y + k11 * 8 * y * z + k12 * (6 * zz - 3 * xx - 3 * yy) + k13 * 8 * x * z + k14 * (xx - yy);
}

struct Cov {
  float R[9], M[9], S[6], t[3], J[6], T[6];  // rotation, R diag(s), covariance, camera point, Jacobian, J W
  float c00, c01, c11, inv_norm;
  bool x_free, y_free;                       // false where the Jacobian's point was clamped to 1.3 x the image
};

HH_INLINE bool cov2d(const Project& c, int64_t n, Cov& p) {
  const float *mean = c.means + 3 * n, *q = c.quats + 4 * n, *s = c.scales + 3 * n, *V = c.view;
  for (int i = 0; i < 3; ++i) p.t[i] = V[4 * i] * mean[0] + V[4 * i + 1] * mean[1] + V[4 * i + 2] * mean[2] + V[4 * i + 3];
  if (!(p.t[2] >= kNear)) return false;
  p.inv_norm = 1.f / __builtin_sqrtf(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
  const float w = q[0] * p.inv_norm, x = q[1] * p.inv_norm, y = q[2] * p.inv_norm, z = q[3] * p.inv_norm;
  float *R = p.R, *M = p.M, *S = p.S, *T = p.T;
  R[0] = 1 - 2 * (y * y + z * z), R[1] = 2 * (x * y - w * z), R[2] = 2 * (x * z + w * y);
  R[3] = 2 * (x * y + w * z), R[4] = 1 - 2 * (x * x + z * z), R[5] = 2 * (y * z - w * x);
  R[6] = 2 * (x * z - w * y), R[7] = 2 * (y * z + w * x), R[8] = 1 - 2 * (x * x + y * y);
  for (int i = 0; i < 9; ++i) M[i] = R[i] * s[i % 3];
  S[0] = M[0] * M[0] + M[1] * M[1] + M[2] * M[2], S[1] = M[0] * M[3] + M[1] * M[4] + M[2] * M[5];
  S[2] = M[0] * M[6] + M[1] * M[7] + M[2] * M[8], S[3] = M[3] * M[3] + M[4] * M[4] + M[5] * M[5];
  S[4] = M[3] * M[6] + M[4] * M[7] + M[5] * M[8], S[5] = M[6] * M[6] + M[7] * M[7] + M[8] * M[8];
  const float rz = 1.f / p.t[2], mx = 0.15f * c.W / c.fx, my = 0.15f * c.H / c.fy;
  const float xr = p.t[0] * rz, yr = p.t[1] * rz;
  const float x_hi = (c.W - c.cx) / c.fx + mx, x_lo = -c.cx / c.fx - mx, y_hi = (c.H - c.cy) / c.fy + my, y_lo = -c.cy / c.fy - my;
  p.x_free = xr <= x_hi && xr >= x_lo, p.y_free = yr <= y_hi && yr >= y_lo;
  p.J[0] = c.fx * rz, p.J[1] = 0, p.J[2] = -c.fx * rz * clampf(xr, x_lo, x_hi);
  p.J[3] = 0, p.J[4] = c.fy * rz, p.J[5] = -c.fy * rz * clampf(yr, y_lo, y_hi);
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 3; ++j) T[3 * i + j] = p.J[3 * i] * V[j] + p.J[3 * i + 1] * V[4 + j] + p.J[3 * i + 2] * V[8 + j];
  float u[6];
  for (int i = 0; i < 6; i += 3) {
    u[i] = T[i] * S[0] + T[i + 1] * S[1] + T[i + 2] * S[2];
    u[i + 1] = T[i] * S[1] + T[i + 1] * S[3] + T[i + 2] * S[4];
    u[i + 2] = T[i] * S[2] + T[i + 1] * S[4] + T[i + 2] * S[5];
  }
  p.c00 = u[0] * T[0] + u[1] * T[1] + u[2] * T[2] + kDilation;
  p.c01 = u[0] * T[3] + u[1] * T[4] + u[2] * T[5];
  p.c11 = u[3] * T[3] + u[4] * T[4] + u[5] * T[5] + kDilation;
  return true;
}

HH_INLINE void view_direction(const Project& c, int64_t n, float* dir, float* inv_len) {
  for (int k = 0; k < 3; ++k) dir[k] = c.means[3 * n + k] - c.campos[k];
  *inv_len = 1.f / __builtin_sqrtf(dir[0] * dir[0] + dir[1] * dir[1] + dir[2] * dir[2]);
  for (int k = 0; k < 3; ++k) dir[k] *= *inv_len;
}

void splat_project(const Project& c, int64_t b, int64_t e) {
  for (int64_t n = b; n < e; ++n) {
    Splat& g = c.splats[n];
    int32_t* box = c.box + 4 * n;
    box[0] = box[1] = box[2] = box[3] = 0;
    Cov p;
    const float op = c.opacities[n];
    if (!(op >= 1.f / 255.f) || !cov2d(c, n, p)) continue;
    const float det = p.c00 * p.c11 - p.c01 * p.c01;
    if (!(det > 0) || !(det < 1e30f)) continue;
    const float id = 1.f / det, rz = 1.f / p.t[2];
    g.x = c.fx * p.t[0] * rz + c.cx, g.y = c.fy * p.t[1] * rz + c.cy;
    g.a = p.c11 * id, g.b = -p.c01 * id, g.c = p.c00 * id, g.op = op, g.depth = p.t[2];
    g.smax = __builtin_logf(255.f * op);
    g.ex = __builtin_sqrtf(2 * g.smax * p.c00), g.ey = __builtin_sqrtf(2 * g.smax * p.c11);
    // The first and last pixel centre that can be reached, as tiles.
    const float x0 = __builtin_ceilf(g.x - g.ex - 0.5f), x1 = __builtin_floorf(g.x + g.ex - 0.5f);
    const float y0 = __builtin_ceilf(g.y - g.ey - 0.5f), y1 = __builtin_floorf(g.y + g.ey - 0.5f);
    if (!(x1 >= 0 && y1 >= 0 && x0 < c.W && y0 < c.H && x0 <= x1 && y0 <= y1)) continue;
    box[0] = (int)clampf(x0, 0, c.W - 1) / kTile, box[1] = (int)clampf(y0, 0, c.H - 1) / kTile;
    box[2] = (int)clampf(x1, 0, c.W - 1) / kTile + 1, box[3] = (int)clampf(y1, 0, c.H - 1) / kTile + 1;
    g.id = c.ids && c.ids[n] >= 0 && c.ids[n] < c.n_ids ? (int32_t)c.ids[n] : -1;
    c.clamped[n] = 0;
    if (c.sh_degree < 0) {
      for (int k = 0; k < 3; ++k) g.col[k] = c.colors[3 * n + k];
      continue;
    }
    float dir[3], il, B[16], rgb[3] = {0.5f, 0.5f, 0.5f};
    view_direction(c, n, dir, &il);
    sh_basis(c.sh_degree, dir[0], dir[1], dir[2], B);
    const float* s = c.colors + n * c.K * 3;
    for (int k = 0, nb = (c.sh_degree + 1) * (c.sh_degree + 1); k < nb; ++k)
      for (int i = 0; i < 3; ++i) rgb[i] += B[k] * s[3 * k + i];
    for (int i = 0; i < 3; ++i) {
      if (rgb[i] < 0) rgb[i] = 0, c.clamped[n] |= 1 << i;
      g.col[i] = rgb[i];
    }
  }
}

void splat_project_backward(const Project& c, const ProjectGrad& out, int64_t b, int64_t e) {
  const float* V = c.view;
  for (int i = 0; i < 12; ++i) out.view[i] = 0;
  const int per_color = c.sh_degree < 0 ? 3 : 3 * c.K;
  for (int64_t n = b; n < e; ++n) {
    float a[kSlot] = {0};
    float *v_mean = out.means + 3 * n, *v_quat = out.quats + 4 * n, *v_scale = out.scales + 3 * n, *v_color = out.colors + n * per_color;
    bool touched = false;
    for (int64_t s = out.offset[n]; s < out.offset[n + 1]; ++s)
      for (int i = 0; i < kSlot; ++i) a[i] += out.slots[s * kSlot + i];
    for (int i = 0; i < kSlot; ++i) touched |= a[i] != 0.f;
    for (int i = 0; i < per_color; ++i) v_color[i] = 0;
    if (!touched) {
      for (int i = 0; i < 3; ++i) v_mean[i] = v_scale[i] = 0;
      for (int i = 0; i < 4; ++i) v_quat[i] = 0;
      out.opacities[n] = 0;
      continue;
    }
    const Splat& g = c.splats[n];
    Cov p;
    cov2d(c, n, p);
    out.opacities[n] = a[3];
    // sigma = (A dx^2 + C dy^2)/2 + B dx dy and dL/dsigma = -op q, with dx = pixel - centre
    const float s1 = -g.op * a[4], s2 = -g.op * a[5], va = -0.5f * g.op * a[6], h = -0.5f * g.op * a[7], vc = -0.5f * g.op * a[8];
    const float vx = -(g.a * s1 + g.b * s2), vy = -(g.b * s1 + g.c * s2);
    // d conic -> d covariance: -Q G Q
    const float m00 = va * g.a + h * g.b, m01 = va * g.b + h * g.c, m10 = h * g.a + vc * g.b, m11 = h * g.b + vc * g.c;
    const float k00 = -(g.a * m00 + g.b * m10), k01 = -(g.a * m01 + g.b * m11), k11 = -(g.b * m01 + g.c * m11);
    const float *T = p.T, *S = p.S, *M = p.M;
    float KT[6], vS[9], vT[6], vJ[6];
    for (int j = 0; j < 3; ++j) KT[j] = k00 * T[j] + k01 * T[3 + j], KT[3 + j] = k01 * T[j] + k11 * T[3 + j];
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) vS[3 * i + j] = T[i] * KT[j] + T[3 + i] * KT[3 + j];
    for (int i = 0; i < 6; i += 3) {
      const float* r = KT + i;
      vT[i] = 2 * (r[0] * S[0] + r[1] * S[1] + r[2] * S[2]);
      vT[i + 1] = 2 * (r[0] * S[1] + r[1] * S[3] + r[2] * S[4]);
      vT[i + 2] = 2 * (r[0] * S[2] + r[1] * S[4] + r[2] * S[5]);
    }
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 3; ++j) vJ[3 * i + j] = vT[3 * i] * V[4 * j] + vT[3 * i + 1] * V[4 * j + 1] + vT[3 * i + 2] * V[4 * j + 2];
    const float rz = 1.f / p.t[2], rz2 = rz * rz;
    float vt[3] = {c.fx * rz * vx, c.fy * rz * vy, -(c.fx * p.t[0] * vx + c.fy * p.t[1] * vy) * rz2 + a[9]};
    // J = [fx/z, 0, -fx u/z; 0, fy/z, -fy v/z], u = x/z and v = y/z unless clamped
    const float u = -p.J[2] / (c.fx * rz), v = -p.J[5] / (c.fy * rz);
    vt[2] += c.fx * u * rz2 * vJ[2] + c.fy * v * rz2 * vJ[5] - c.fx * rz2 * vJ[0] - c.fy * rz2 * vJ[4];
    if (p.x_free) vt[0] -= c.fx * rz2 * vJ[2], vt[2] += c.fx * u * rz2 * vJ[2];
    if (p.y_free) vt[1] -= c.fy * rz2 * vJ[5], vt[2] += c.fy * v * rz2 * vJ[5];
    for (int j = 0; j < 3; ++j) v_mean[j] = V[j] * vt[0] + V[4 + j] * vt[1] + V[8 + j] * vt[2];
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) out.view[4 * i + j] += p.J[i] * vT[j] + p.J[3 + i] * vT[3 + j] + vt[i] * c.means[3 * n + j];
      out.view[4 * i + 3] += vt[i];
    }
    // covariance = M M^T, M = R diag(s)
    float vR[9];
    const float* s = c.scales + 3 * n;
    for (int j = 0; j < 3; ++j) v_scale[j] = 0;
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) {
        const float vM = 2 * (vS[3 * i] * M[j] + vS[3 * i + 1] * M[3 + j] + vS[3 * i + 2] * M[6 + j]);
        v_scale[j] += p.R[3 * i + j] * vM;
        vR[3 * i + j] = vM * s[j];
      }
    const float *q = c.quats + 4 * n, w = q[0] * p.inv_norm, x = q[1] * p.inv_norm, y = q[2] * p.inv_norm, z = q[3] * p.inv_norm;
    const float gw = 2 * (x * (vR[7] - vR[5]) + y * (vR[2] - vR[6]) + z * (vR[3] - vR[1]));
    const float gx = 2 * (-2 * x * (vR[4] + vR[8]) + y * (vR[1] + vR[3]) + z * (vR[2] + vR[6]) + w * (vR[7] - vR[5]));
    const float gy = 2 * (x * (vR[1] + vR[3]) - 2 * y * (vR[0] + vR[8]) + z * (vR[5] + vR[7]) + w * (vR[2] - vR[6]));
    const float gz = 2 * (x * (vR[2] + vR[6]) + y * (vR[5] + vR[7]) - 2 * z * (vR[0] + vR[4]) + w * (vR[3] - vR[1]));
    const float dot = gw * w + gx * x + gy * y + gz * z;
    v_quat[0] = (gw - dot * w) * p.inv_norm, v_quat[1] = (gx - dot * x) * p.inv_norm;
    v_quat[2] = (gy - dot * y) * p.inv_norm, v_quat[3] = (gz - dot * z) * p.inv_norm;
    if (c.sh_degree < 0) {
      for (int i = 0; i < 3; ++i) v_color[i] = a[i];
      continue;
    }
    float dir[3], il, B[16], vB[16], vd[3];
    view_direction(c, n, dir, &il);
    sh_basis(c.sh_degree, dir[0], dir[1], dir[2], B);
    const float* f = c.colors + n * per_color;
    for (int i = 0; i < 3; ++i)
      if (c.clamped[n] >> i & 1) a[i] = 0;
    for (int k = 0, nb = (c.sh_degree + 1) * (c.sh_degree + 1); k < nb; ++k) {
      for (int i = 0; i < 3; ++i) v_color[3 * k + i] = B[k] * a[i];
      vB[k] = f[3 * k] * a[0] + f[3 * k + 1] * a[1] + f[3 * k + 2] * a[2];
    }
    sh_basis_grad(c.sh_degree, dir[0], dir[1], dir[2], vB, vd);
    const float along = vd[0] * dir[0] + vd[1] * dir[1] + vd[2] * dir[2];
    for (int k = 0; k < 3; ++k) v_mean[k] += vd[k] = (vd[k] - along * dir[k]) * il;
    // the direction also depends on the camera centre, -R^T t
    for (int i = 0; i < 3; ++i) {
      float acc = 0;
      for (int j = 0; j < 3; ++j) acc += V[4 * i + j] * vd[j], out.view[4 * i + j] += V[4 * i + 3] * vd[j];
      out.view[4 * i + 3] += acc;
    }
  }
}

}  // namespace
}  // namespace hh
