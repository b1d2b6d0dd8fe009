// What 3D and 2D Gaussians share on their way to the image and back: rotation, camera point, colour, tile range.
// Constants are those of gsplat's `rasterization`.
#pragma once

namespace hh {
namespace {

constexpr int kTile = 16, kBlockH = HH_LANES / 4, kBlocks = 256 / HH_LANES, kBlockRows = kTile / kBlockH;
constexpr float kNear = 0.01f, kFar = 1e10f, kAlphaMin = 1.f / 255.f;
constexpr float kLog2e = 1.44269504088896341f;

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

HH_INLINE void view_direction(const Project& c, int64_t n, float* dir, float* inv_len) {
  for (int k = 0; k < 3; ++k) dir[k] = c.means[3 * n + k] - c.campos[k];
  *inv_len = 1.f / __builtin_sqrtf(dir[0] * dir[0] + dir[1] * dir[1] + dir[2] * dir[2]);
  for (int k = 0; k < 3; ++k) dir[k] *= *inv_len;
}

HH_INLINE void shade(const Project& c, int64_t n, float* col) {
  c.clamped[n] = 0;
  if (c.sh_degree < 0) {
    for (int k = 0; k < 3; ++k) col[k] = c.colors[3 * n + k];
    return;
  }
  float dir[3], il, B[16], rgb[3] = {0.5f, 0.5f, 0.5f};
  view_direction(c, n, dir, &il);
  sh_basis(c.sh_degree, dir[0], dir[1], dir[2], B);
  const float* s = c.colors + n * c.K * 3;
  for (int k = 0, nb = (c.sh_degree + 1) * (c.sh_degree + 1); k < nb; ++k)
    for (int i = 0; i < 3; ++i) rgb[i] += B[k] * s[3 * k + i];
  for (int i = 0; i < 3; ++i) {
    if (rgb[i] < 0) rgb[i] = 0, c.clamped[n] |= 1 << i;
    col[i] = rgb[i];
  }
}

// g: dL/dcolour. Writes v_color (zero beforehand), adds to v_mean and to the camera sums.
HH_INLINE void shade_backward(const Project& c, int64_t n, const float* grad, float* v_color, float* v_mean, double* camera) {
  if (c.sh_degree < 0) {
    for (int i = 0; i < 3; ++i) v_color[i] = grad[i];
    return;
  }
  const float* V = c.view;
  float dir[3], il, B[16], vB[16], vd[3], a[3];
  view_direction(c, n, dir, &il);
  sh_basis(c.sh_degree, dir[0], dir[1], dir[2], B);
  const float* f = c.colors + n * c.K * 3;
  for (int i = 0; i < 3; ++i) a[i] = c.clamped[n] >> i & 1 ? 0 : grad[i];
  for (int k = 0, nb = (c.sh_degree + 1) * (c.sh_degree + 1); k < nb; ++k) {
    for (int i = 0; i < 3; ++i) v_color[3 * k + i] = B[k] * a[i];
    vB[k] = f[3 * k] * a[0] + f[3 * k + 1] * a[1] + f[3 * k + 2] * a[2];
  }
  sh_basis_grad(c.sh_degree, dir[0], dir[1], dir[2], vB, vd);
  const float along = vd[0] * dir[0] + vd[1] * dir[1] + vd[2] * dir[2];
  for (int k = 0; k < 3; ++k) v_mean[k] += vd[k] = (vd[k] - along * dir[k]) * il;
  for (int i = 0; i < 3; ++i) {  // the direction also depends on the camera centre, -R^T t
    float acc = 0;
    for (int j = 0; j < 3; ++j) acc += V[4 * i + j] * vd[j], camera[4 * i + j] += V[4 * i + 3] * vd[j];
    camera[4 * i + 3] += acc;
  }
}

HH_INLINE void camera_point(const Project& c, int64_t n, float* t) {
  const float *mean = c.means + 3 * n, *V = c.view;
  for (int i = 0; i < 3; ++i) t[i] = V[4 * i] * mean[0] + V[4 * i + 1] * mean[1] + V[4 * i + 2] * mean[2] + V[4 * i + 3];
}

// R from a quaternion wxyz of any length; returns one over that length.
HH_INLINE float rotation(const float* q, float* R) {
  const float il = 1.f / __builtin_sqrtf(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
  const float w = q[0] * il, x = q[1] * il, y = q[2] * il, z = q[3] * il;
  R[0] = 1 - 2 * (y * y + z * z), R[1] = 2 * (x * y - w * z), R[2] = 2 * (x * z + w * y);
  R[3] = 2 * (x * y + w * z), R[4] = 1 - 2 * (x * x + z * z), R[5] = 2 * (y * z - w * x);
  R[6] = 2 * (x * z - w * y), R[7] = 2 * (y * z + w * x), R[8] = 1 - 2 * (x * x + y * y);
  return il;
}

HH_INLINE void rotation_backward(const float* q, float il, const float* vR, float* v_quat) {
  const float w = q[0] * il, x = q[1] * il, y = q[2] * il, z = q[3] * il;
  const float gw = 2 * (x * (vR[7] - vR[5]) + y * (vR[2] - vR[6]) + z * (vR[3] - vR[1]));
  const float gx = 2 * (-2 * x * (vR[4] + vR[8]) + y * (vR[1] + vR[3]) + z * (vR[2] + vR[6]) + w * (vR[7] - vR[5]));
  const float gy = 2 * (x * (vR[1] + vR[3]) - 2 * y * (vR[0] + vR[8]) + z * (vR[5] + vR[7]) + w * (vR[2] - vR[6]));
  const float gz = 2 * (x * (vR[2] + vR[6]) + y * (vR[5] + vR[7]) - 2 * z * (vR[0] + vR[4]) + w * (vR[3] - vR[1]));
  const float dot = gw * w + gx * x + gy * y + gz * z;
  v_quat[0] = (gw - dot * w) * il, v_quat[1] = (gx - dot * x) * il;
  v_quat[2] = (gy - dot * y) * il, v_quat[3] = (gz - dot * z) * il;
}

// Tiles of the pixels whose centres lie in [x0,x1] x [y0,y1] (pixels, may be NaN or far outside). False when there are none.
HH_INLINE bool tile_range(const Project& c, float x0, float x1, float y0, float y1, int32_t* box) {
  x0 = __builtin_ceilf(x0 - 0.5f), x1 = __builtin_floorf(x1 - 0.5f), y0 = __builtin_ceilf(y0 - 0.5f), y1 = __builtin_floorf(y1 - 0.5f);
  if (!(x1 >= 0 && y1 >= 0 && x0 < c.W && y0 < c.H && x0 <= x1 && y0 <= y1)) return false;
  box[0] = (int)clampf(x0, 0, c.W - 1) / kTile, box[1] = (int)clampf(y0, 0, c.H - 1) / kTile;
  box[2] = (int)clampf(x1, 0, c.W - 1) / kTile + 1, box[3] = (int)clampf(y1, 0, c.H - 1) / kTile + 1;
  return true;
}

HH_INLINE int32_t body(const Project& c, int64_t n) { return c.ids && c.ids[n] >= 0 && c.ids[n] < c.n_ids ? (int32_t)c.ids[n] : -1; }

// Sums the slots of one Gaussian into a[0..count) and its features' gradient. False when nothing of it was drawn.
HH_INLINE bool gather(const ProjectGrad& out, int64_t n, int count, float* a) {
  const int F = out.n_features, stride = count + F;
  float* v_f = out.features + n * F;
  bool touched = false;
  for (int i = 0; i < count; ++i) a[i] = 0;
  for (int i = 0; i < F; ++i) v_f[i] = 0;
  for (int64_t s = out.offset[n]; s < out.offset[n + 1]; ++s) {
    if (!out.used[s]) continue;
    const float* slot = out.slots + s * stride;
    for (int i = 0; i < count; ++i) a[i] += slot[i];
    for (int i = 0; i < F; ++i) v_f[i] += slot[count + i];
    touched = true;
  }
  return touched;
}

HH_INLINE void no_gradient(const ProjectGrad& out, int64_t n) {
  for (int i = 0; i < 3; ++i) out.means[3 * n + i] = out.scales[3 * n + i] = 0;
  for (int i = 0; i < 4; ++i) out.quats[4 * n + i] = 0;
  out.opacities[n] = 0;
}

}  // namespace
}  // namespace hh
