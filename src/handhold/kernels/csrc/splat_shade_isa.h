// What 3D and 2D Gaussians share on their way to the image and back: rotation, camera point, colour, tile range.
// Constants are those of gsplat's `rasterization`.
#pragma once

namespace hh {
namespace {

constexpr int kTile = 16, kBlockH = HH_LANES / 4, kBlocks = 256 / HH_LANES, kBlockRows = kTile / kBlockH;
constexpr float kNear = 0.01f, kFar = 1e10f, kAlphaMin = 1.f / 255.f;
constexpr float kLog2e = 1.44269504088896341f, kFaintest = -7.99435344f;  // log2(1/255)

HH_INLINE void sh_basis(int degree, vf x, vf y, vf z, vf* B) {
  B[0] = vf{} + 0.28209479177387814f;
  if (degree < 1) return;
  const float c = 0.4886025119029199f;
  B[1] = -c * y, B[2] = c * z, B[3] = -c * x;
  if (degree < 2) return;
  const vf xx = x * x, yy = y * y, zz = z * z, xy = x * y, yz = y * z, xz = x * z;
  B[4] = 1.0925484305920792f * xy, B[5] = -1.0925484305920792f * yz, B[6] = 0.31539156525252005f * (2.f * zz - xx - yy);
  B[7] = -1.0925484305920792f * xz, B[8] = 0.5462742152960396f * (xx - yy);
  if (degree < 3) return;
  B[9] = -0.5900435899266435f * y * (3.f * xx - yy), B[10] = 2.890611442640554f * xy * z;
  B[11] = -0.4570457994644658f * y * (4.f * zz - xx - yy), B[12] = 0.3731763325901154f * z * (2.f * zz - 3.f * xx - 3.f * yy);
  B[13] = -0.4570457994644658f * x * (4.f * zz - xx - yy), B[14] = 1.445305721320277f * z * (xx - yy);
  B[15] = -0.5900435899266435f * x * (xx - 3.f * yy);
}

// Gradient of sum_k w_k B_k with respect to (x,y,z).
HH_INLINE void sh_basis_grad(int degree, vf x, vf y, vf z, const vf* w, vf* g) {
  g[0] = g[1] = g[2] = vf{};
  if (degree < 1) return;
  const float c1 = 0.4886025119029199f;
  g[1] -= c1 * w[1], g[2] += c1 * w[2], g[0] -= c1 * w[3];
  if (degree < 2) return;
  const float c = 1.0925484305920792f, d = 0.31539156525252005f, e = 0.5462742152960396f;
  g[0] += c * y * w[4] - 2.f * d * x * w[6] - c * z * w[7] + 2.f * e * x * w[8];
  g[1] += c * x * w[4] - c * z * w[5] - 2.f * d * y * w[6] - 2.f * e * y * w[8];
  g[2] += -c * y * w[5] + 4.f * d * z * w[6] - c * x * w[7];
  if (degree < 3) return;
  const vf xx = x * x, yy = y * y, zz = z * z;
  const vf k9 = -0.5900435899266435f * w[9], k10 = 2.890611442640554f * w[10], k11 = -0.4570457994644658f * w[11];
  const vf k12 = 0.3731763325901154f * w[12], k13 = -0.4570457994644658f * w[13], k14 = 1.445305721320277f * w[14];
  const vf k15 = -0.5900435899266435f * w[15];
  g[0] += k9 * 6.f * x * y + k10 * y * z - k11 * 2.f * x * y - k12 * 6.f * x * z + k13 * (4.f * zz - 3.f * xx - yy) + k14 * 2.f * x * z + k15 * 3.f * (xx - yy);
  g[1] += k9 * 3.f * (xx - yy) + k10 * x * z + k11 * (4.f * zz - xx - 3.f * yy) - k12 * 6.f * y * z - k13 * 2.f * x * y - k14 * 2.f * y * z - k15 * 6.f * x * y;
  g[2] += k10 * x * y + k11 * 8.f * y * z + k12 * (6.f * zz - 3.f * xx - 3.f * yy) + k13 * 8.f * x * z + k14 * (xx - yy);
}

// LANES Gaussians at a time: `at` are their numbers, clamped to the last one of the range.
template <int K>
HH_INLINE void load_lanes(const float* p, const int64_t* at, vf* out) {
  for (int k = 0; k < K; ++k) {
    vf v;
    for (int i = 0; i < HH_LANES; ++i) v[i] = p[at[i] * K + k];
    out[k] = v;
  }
}
template <int K>
HH_INLINE void store_lanes(float* p, const int64_t* at, unsigned lanes, const vf* v) {
  for (int i = 0; i < HH_LANES; ++i)
    if (lanes >> i & 1)
      for (int k = 0; k < K; ++k) p[at[i] * K + k] = v[k][i];
}

HH_INLINE void view_direction(const Project& c, const vf* mean, vf* dir, vf* inv_len) {
  for (int k = 0; k < 3; ++k) dir[k] = mean[k] - c.campos[k];
  *inv_len = 1.f / sqrtv(dir[0] * dir[0] + dir[1] * dir[1] + dir[2] * dir[2]);
  for (int k = 0; k < 3; ++k) dir[k] *= *inv_len;
}

// Colours of the Gaussians `lanes`, to col (3,LANES).
HH_INLINE void shade(const Project& c, const int64_t* at, unsigned lanes, const vf* mean, float (*col)[HH_LANES]) {
  const int nb = (c.sh_degree + 1) * (c.sh_degree + 1);
  vf dir[3], il, B[16];
  if (c.sh_degree >= 0) view_direction(c, mean, dir, &il), sh_basis(c.sh_degree, dir[0], dir[1], dir[2], B);
  for (int i = 0; i < HH_LANES; ++i) {
    if (!(lanes >> i & 1)) continue;
    c.clamped[at[i]] = 0;
    if (c.sh_degree < 0) {
      for (int k = 0; k < 3; ++k) col[k][i] = c.colors[3 * at[i] + k];
      continue;
    }
    float rgb[3] = {0.5f, 0.5f, 0.5f};
    const float* s = c.colors + at[i] * c.K * 3;
    for (int k = 0; k < nb; ++k)
      for (int j = 0; j < 3; ++j) rgb[j] += B[k][i] * s[3 * k + j];
    for (int j = 0; j < 3; ++j) {
      if (rgb[j] < 0) rgb[j] = 0, c.clamped[at[i]] |= 1 << j;
      col[j][i] = rgb[j];
    }
  }
}

// grad (3): dL/dcolour; drawn: the mask of `lanes`. Writes v_colors, adds to v_mean and to the camera sums.
HH_INLINE void shade_backward(const Project& c, const int64_t* at, unsigned lanes, vi drawn, const vf* mean, const vf* grad, float* v_colors, vf* v_mean, vf* camera) {
  if (c.sh_degree < 0) return store_lanes<3>(v_colors, at, lanes, grad);
  const int nb = (c.sh_degree + 1) * (c.sh_degree + 1), per_color = 3 * c.K;
  const float* V = c.view;
  vf dir[3], il, B[16], vd[3];
  float vB[16][HH_LANES] = {};
  view_direction(c, mean, dir, &il);
  sh_basis(c.sh_degree, dir[0], dir[1], dir[2], B);
  for (int i = 0; i < HH_LANES; ++i) {
    if (!(lanes >> i & 1)) continue;
    const float* f = c.colors + at[i] * per_color;
    float a[3], *v_color = v_colors + at[i] * per_color;
    for (int j = 0; j < 3; ++j) a[j] = c.clamped[at[i]] >> j & 1 ? 0 : grad[j][i];
    for (int k = 0; k < nb; ++k) {
      for (int j = 0; j < 3; ++j) v_color[3 * k + j] = B[k][i] * a[j];
      vB[k][i] = f[3 * k] * a[0] + f[3 * k + 1] * a[1] + f[3 * k + 2] * a[2];
    }
    for (int k = 3 * nb; k < per_color; ++k) v_color[k] = 0;
  }
  vf w[16];
  for (int k = 0; k < nb; ++k)
    for (int i = 0; i < HH_LANES; ++i) w[k][i] = vB[k][i];
  sh_basis_grad(c.sh_degree, dir[0], dir[1], dir[2], w, vd);
  const vf along = vd[0] * dir[0] + vd[1] * dir[1] + vd[2] * dir[2];
  for (int k = 0; k < 3; ++k) v_mean[k] += vd[k] = drawn ? (vd[k] - along * dir[k]) * il : vf{};
  for (int i = 0; i < 3; ++i) {  // the direction also depends on the camera centre, -R^T t
    vf acc{};
    for (int j = 0; j < 3; ++j) acc += V[4 * i + j] * vd[j], camera[4 * i + j] += V[4 * i + 3] * vd[j];
    camera[4 * i + 3] += acc;
  }
}

HH_INLINE void camera_point(const Project& c, const vf* mean, vf* t) {
  const float* V = c.view;
  for (int i = 0; i < 3; ++i) t[i] = V[4 * i] * mean[0] + V[4 * i + 1] * mean[1] + V[4 * i + 2] * mean[2] + V[4 * i + 3];
}

// R from a quaternion wxyz of any length; returns one over that length.
HH_INLINE vf rotation(const vf* q, vf* R) {
  // the largest entry first, so that squares neither overflow nor vanish
  const vf s = 1.f / maxv(maxv(maxv(q[0], -q[0]), maxv(q[1], -q[1])), maxv(maxv(q[2], -q[2]), maxv(q[3], -q[3])));
  const vf a = q[0] * s, b = q[1] * s, c = q[2] * s, d = q[3] * s, il = s / sqrtv(a * a + b * b + c * c + d * d);
  const vf w = q[0] * il, x = q[1] * il, y = q[2] * il, z = q[3] * il;
  R[0] = 1.f - 2.f * (y * y + z * z), R[1] = 2.f * (x * y - w * z), R[2] = 2.f * (x * z + w * y);
  R[3] = 2.f * (x * y + w * z), R[4] = 1.f - 2.f * (x * x + z * z), R[5] = 2.f * (y * z - w * x);
  R[6] = 2.f * (x * z - w * y), R[7] = 2.f * (y * z + w * x), R[8] = 1.f - 2.f * (x * x + y * y);
  return il;
}

HH_INLINE void rotation_backward(const vf* q, vf il, const vf* vR, vf* v_quat) {
  const vf w = q[0] * il, x = q[1] * il, y = q[2] * il, z = q[3] * il;
  const vf gw = 2.f * (x * (vR[7] - vR[5]) + y * (vR[2] - vR[6]) + z * (vR[3] - vR[1]));
  const vf gx = 2.f * (-2.f * x * (vR[4] + vR[8]) + y * (vR[1] + vR[3]) + z * (vR[2] + vR[6]) + w * (vR[7] - vR[5]));
  const vf gy = 2.f * (x * (vR[1] + vR[3]) - 2.f * y * (vR[0] + vR[8]) + z * (vR[5] + vR[7]) + w * (vR[2] - vR[6]));
  const vf gz = 2.f * (x * (vR[2] + vR[6]) + y * (vR[5] + vR[7]) - 2.f * z * (vR[0] + vR[4]) + w * (vR[3] - vR[1]));
  const vf dot = gw * w + gx * x + gy * y + gz * z;
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

// The Gaussians b..e of a range, LANES at a time: f(at, lanes).
template <class F>
HH_INLINE void each_lanes(int64_t b, int64_t e, F&& f) {
  for (int64_t n = b; n < e; n += HH_LANES) {
    int64_t at[HH_LANES];
    for (int i = 0; i < HH_LANES; ++i) at[i] = n + i < e ? n + i : e - 1;
    f(at, n + HH_LANES <= e ? (1u << HH_LANES) - 1 : (1u << (e - n)) - 1);
  }
}

// Sums the slots of some Gaussians into a[0..COUNT) and their features' gradient; everything is zero for those of which nothing
// was drawn. Returns the others.
template <int COUNT>
HH_INLINE unsigned gather(const Project& c, const ProjectGrad& out, const int64_t* at, unsigned lanes, vf* a) {
  const int F = out.n_features, stride = COUNT + F, per_color = c.sh_degree < 0 ? 3 : 3 * c.K;
  float sums[COUNT][HH_LANES] = {};
  unsigned touched = 0;
  for (int i = 0; i < HH_LANES; ++i) {
    if (!(lanes >> i & 1)) continue;
    const int64_t n = at[i];
    float *v_f = out.features + n * F, one[COUNT] = {};
    for (int k = 0; k < F; ++k) v_f[k] = 0;
    for (int64_t s = out.offset[n]; s < out.offset[n + 1]; ++s) {
      if (!out.used[s]) continue;
      const float* slot = out.slots + s * stride;
      for (int k = 0; k < COUNT; ++k) one[k] += slot[k];
      for (int k = 0; k < F; ++k) v_f[k] += slot[COUNT + k];
      touched |= 1u << i;
    }
    for (int k = 0; k < COUNT; ++k) sums[k][i] = one[k];
    if (touched >> i & 1) continue;
    for (int k = 0; k < 3; ++k) out.means[3 * n + k] = out.scales[3 * n + k] = 0;
    for (int k = 0; k < 4; ++k) out.quats[4 * n + k] = 0;
    for (int k = 0; k < per_color; ++k) out.colors[n * per_color + k] = 0;
    out.opacities[n] = 0;
  }
  for (int k = 0; k < COUNT; ++k)
    for (int i = 0; i < HH_LANES; ++i) a[k][i] = sums[k][i];
  return touched;
}

// A mask of -1 for the lanes that are set.
HH_INLINE vi lane_mask(unsigned lanes) {
  vi m;
  for (int i = 0; i < HH_LANES; ++i) m[i] = -(int32_t)(lanes >> i & 1);
  return m;
}

}  // namespace
}  // namespace hh
