// 3D Gaussians in the image (Zwicker et al., EWA splatting, 2001; Kerbl et al., SIGGRAPH 2023): covariance J W Sigma W^T J^T + 0.3 px^2.
#pragma once

namespace hh {
namespace {

constexpr float kDilation = 0.3f;
constexpr int kSplatSlot = 10;  // rgb, sum of q = alpha dL/dalpha, of q dx, q dy, q dx^2, q dx dy, q dy^2, depth

struct Ewa {
  using Item = Splat;
  static constexpr int kSlot = kSplatSlot;
  static constexpr float kTop = 1e-3f;  // rounding alone may lift the exponent above its peak, but not by more than this

  // The blocks of 4 x kBlockH pixels of the tile at (ox, oy) that the ellipse meets; block bx, by is bit bx * kBlockRows + by.
  static HH_METHOD uint64_t blocks(const Splat& g, float ox, float oy) {
    uint64_t found = 0;
    const float left = g.x - ox, up = oy - g.y + 0.5f;
    for (int r = 0; r < kBlockRows; r += HH_LANES) {
      vf lo;
      for (int i = 0; i < HH_LANES; ++i) lo[i] = (float)((r + i) * kBlockH);
      lo += up;
      const vf hi = lo + (kBlockH - 1.f);
      const vf tr = minv(maxv(all(g.top), lo), hi), tl = minv(maxv(all(-g.top), lo), hi);
      const vf hr = g.w2 - g.m * tr * tr, hl = g.w2 - g.m * tl * tl;
      const vf xr = g.slope * tr + sqrtv(maxv(hr, vf{})) + left, xl = g.slope * tl - sqrtv(maxv(hl, vf{})) + left;
      const vi in = (hr >= 0.f) | (hl >= 0.f);
      for (int bx = 0; bx < 4; ++bx) found |= (uint64_t)bits(in & (xr >= bx * 4 + 0.49f) & (xl <= bx * 4 + 3.51f)) << (bx * kBlockRows + r);
    }
    return found;
  }

  struct Pair {
    vf dx, dy, y;
  };
  static HH_METHOD Pair meet(const Splat& g, vf px, vf py) {
    Pair p;
    p.dx = px - g.x, p.dy = py - g.y;
    const vf t = g.C * p.dy;
    p.y = (g.A * p.dx + g.B * p.dy) * p.dx + (t * p.dy + g.lop);
    return p;
  }
  static HH_METHOD vf depth(const Splat& g, const Pair&) { return all(g.depth); }

  // q: alpha dL/dalpha; wz: weight times dL/ddepth
  static HH_METHOD void sums(const Splat&, const Pair& p, vf q, vf wz, vf* s) {
    const vf qx = q * p.dx, qy = q * p.dy;
    s[0] = qx, s[1] = qy, s[2] = qx * p.dx, s[3] = qx * p.dy, s[4] = qy * p.dy, s[5] = wz;
  }
};

struct Cov {
  float R[9], M[9], t[3], J[6], T[6], B[6];  // rotation, R diag(s), camera point, Jacobian, J W, J W R diag(s)
  float c00, c01, c11, det, inv_norm;
  bool x_free, y_free;                       // false where the Jacobian's point was clamped to 1.3 x the image
};

HH_INLINE bool cov2d(const Project& c, int64_t n, Cov& p) {
  const float *s = c.scales + 3 * n, *V = c.view;
  camera_point(c, n, p.t);
  if (!(p.t[2] >= kNear && p.t[2] <= kFar)) return false;
  float *R = p.R, *M = p.M, *B = p.B, *T = p.T;
  p.inv_norm = rotation(c.quats + 4 * n, R);
  for (int i = 0; i < 9; ++i) M[i] = R[i] * s[i % 3];
  const float rz = 1.f / p.t[2], mx = 0.15f * c.W / c.fx, my = 0.15f * c.H / c.fy;
  const float xr = p.t[0] * rz, yr = p.t[1] * rz;
  const float x_hi = (c.W - c.cx) / c.fx + mx, x_lo = -c.cx / c.fx - mx, y_hi = (c.H - c.cy) / c.fy + my, y_lo = -c.cy / c.fy - my;
  p.x_free = xr <= x_hi && xr >= x_lo, p.y_free = yr <= y_hi && yr >= y_lo;
  p.J[0] = c.fx * rz, p.J[1] = 0, p.J[2] = -c.fx * rz * clampf(xr, x_lo, x_hi);
  p.J[3] = 0, p.J[4] = c.fy * rz, p.J[5] = -c.fy * rz * clampf(yr, y_lo, y_hi);
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 3; ++j) T[3 * i + j] = p.J[3 * i] * V[j] + p.J[3 * i + 1] * V[4 + j] + p.J[3 * i + 2] * V[8 + j];
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 3; ++j) B[3 * i + j] = T[3 * i] * M[j] + T[3 * i + 1] * M[3 + j] + T[3 * i + 2] * M[6 + j];
  const float c00 = B[0] * B[0] + B[1] * B[1] + B[2] * B[2], c11 = B[3] * B[3] + B[4] * B[4] + B[5] * B[5];
  const float k0 = B[1] * B[5] - B[2] * B[4], k1 = B[2] * B[3] - B[0] * B[5], k2 = B[0] * B[4] - B[1] * B[3];
  p.c00 = c00 + kDilation, p.c11 = c11 + kDilation, p.c01 = B[0] * B[3] + B[1] * B[4] + B[2] * B[5];
  // |b0 x b1|^2 is what c00 c11 - c01^2 is of the undilated covariance, but does not cancel for needles
  p.det = k0 * k0 + k1 * k1 + k2 * k2 + kDilation * (c00 + c11 + kDilation);
  return true;
}

void splat_project(const Project& c, int64_t b, int64_t e) {
  for (int64_t n = b; n < e; ++n) {
    Splat& g = static_cast<Splat*>(c.splats)[n];
    int32_t* box = c.box + 4 * n;
    box[0] = box[1] = box[2] = box[3] = 0;
    Cov p;
    const float op = c.opacities[n];
    if (!(op >= kAlphaMin) || !cov2d(c, n, p)) continue;
    const float det = p.det;
    if (!(det < 1e30f)) continue;
    const float id = 1.f / det, rz = 1.f / p.t[2], smax = __builtin_logf(255.f * op);
    g.x = c.fx * p.t[0] * rz + c.cx, g.y = c.fy * p.t[1] * rz + c.cy;
    const float ex = __builtin_sqrtf(2 * smax * p.c00), ey = __builtin_sqrtf(2 * smax * p.c11);
    if (!tile_range(c, g.x - ex, g.x + ex, g.y - ey, g.y + ey, box)) continue;
    g.A = -0.5f * kLog2e * p.c11 * id, g.B = kLog2e * p.c01 * id, g.C = -0.5f * kLog2e * p.c00 * id;
    g.op = op, g.lop = kLog2e * __builtin_logf(op), g.depth = c.depth[n] = p.t[2], g.id = body(c, n);
    // dx = slope t +- sqrt((2 smax - t^2 / c11) det / c11), a little wide, since blocks of pixels are chosen by it
    const float ic = 1.f / p.c11;
    g.slope = p.c01 * ic, g.w2 = 2.0005f * smax * det * ic + 1e-4f, g.m = det * ic * ic, g.top = ex * p.c01 / p.c00;
    shade(c, n, g.col);
  }
}

void splat_project_backward(const Project& c, const ProjectGrad& out, int64_t b, int64_t e) {
  const float* V = c.view;
  for (int i = 0; i < 16; ++i) out.camera[i] = 0;
  const int per_color = c.sh_degree < 0 ? 3 : 3 * c.K;
  for (int64_t n = b; n < e; ++n) {
    float a[kSplatSlot];
    float *v_mean = out.means + 3 * n, *v_quat = out.quats + 4 * n, *v_scale = out.scales + 3 * n, *v_color = out.colors + n * per_color;
    for (int i = 0; i < per_color; ++i) v_color[i] = 0;
    if (!gather(out, n, kSplatSlot, a)) {
      no_gradient(out, n);
      continue;
    }
    const Splat& g = static_cast<const Splat*>(c.splats)[n];
    Cov p;
    cov2d(c, n, p);
    out.opacities[n] = a[3] / g.op;
    // sigma = (A dx^2 + C dy^2)/2 + B dx dy and dL/dsigma = -q, with dx = pixel - centre
    const float id = 1.f / p.det, ga = p.c11 * id, gb = -p.c01 * id, gc = p.c00 * id;
    const float s1 = -a[4], s2 = -a[5], va = -0.5f * a[6], h = -0.5f * a[7], vc = -0.5f * a[8];
    const float vx = -(ga * s1 + gb * s2), vy = -(gb * s1 + gc * s2);
    // d conic -> d covariance: -Q G Q
    const float m00 = va * ga + h * gb, m01 = va * gb + h * gc, m10 = h * ga + vc * gb, m11 = h * gb + vc * gc;
    const float k00 = -(ga * m00 + gb * m10), k01 = -(ga * m01 + gb * m11), k11 = -(gb * m01 + gc * m11);
    const float *T = p.T, *M = p.M, *B = p.B;
    float KB[6], vT[6], vJ[6];
    for (int j = 0; j < 3; ++j) KB[j] = 2 * (k00 * B[j] + k01 * B[3 + j]), KB[3 + j] = 2 * (k01 * B[j] + k11 * B[3 + j]);
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 3; ++j) vT[3 * i + j] = KB[3 * i] * M[3 * j] + KB[3 * i + 1] * M[3 * j + 1] + KB[3 * i + 2] * M[3 * j + 2];
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 3; ++j) vJ[3 * i + j] = vT[3 * i] * V[4 * j] + vT[3 * i + 1] * V[4 * j + 1] + vT[3 * i + 2] * V[4 * j + 2];
    const float rz = 1.f / p.t[2], rz2 = rz * rz;
    float vt[3] = {c.fx * rz * vx, c.fy * rz * vy, -(c.fx * p.t[0] * vx + c.fy * p.t[1] * vy) * rz2 + a[9]};
    // J = [fx/z, 0, -fx u/z; 0, fy/z, -fy v/z], u = x/z and v = y/z unless clamped
    const float u = -p.J[2] / (c.fx * rz), v = -p.J[5] / (c.fy * rz);
    vt[2] += c.fx * u * rz2 * vJ[2] + c.fy * v * rz2 * vJ[5] - c.fx * rz2 * vJ[0] - c.fy * rz2 * vJ[4];
    double *cam = out.camera, vfx = p.t[0] * rz * vx + rz * vJ[0], vfy = p.t[1] * rz * vy + rz * vJ[4];
    double vcx = vx, vcy = vy;
    if (p.x_free)
      vt[0] -= c.fx * rz2 * vJ[2], vt[2] += c.fx * u * rz2 * vJ[2], vfx -= rz * u * vJ[2];
    else
      vcx += rz * vJ[2];  // the clamp's bound is (.. - cx) / fx: fx u does not depend on fx
    if (p.y_free)
      vt[1] -= c.fy * rz2 * vJ[5], vt[2] += c.fy * v * rz2 * vJ[5], vfy -= rz * v * vJ[5];
    else
      vcy += rz * vJ[5];
    cam[12] += vfx, cam[13] += vfy, cam[14] += vcx, cam[15] += vcy;
    for (int j = 0; j < 3; ++j) v_mean[j] = V[j] * vt[0] + V[4 + j] * vt[1] + V[8 + j] * vt[2];
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) cam[4 * i + j] += p.J[i] * vT[j] + p.J[3 + i] * vT[3 + j] + vt[i] * c.means[3 * n + j];
      cam[4 * i + 3] += vt[i];
    }
    float vR[9];
    const float* s = c.scales + 3 * n;
    for (int j = 0; j < 3; ++j) v_scale[j] = 0;
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) {
        const float vM = T[i] * KB[j] + T[3 + i] * KB[3 + j];
        v_scale[j] += p.R[3 * i + j] * vM;
        vR[3 * i + j] = vM * s[j];
      }
    rotation_backward(c.quats + 4 * n, p.inv_norm, vR, v_quat);
    shade_backward(c, n, a, v_color, v_mean, cam);
  }
}

}  // namespace
}  // namespace hh
