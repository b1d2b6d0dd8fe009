// 2D Gaussians in the image (Huang et al., 2D Gaussian Splatting, SIGGRAPH 2024): the ray of a pixel meets the disk's plane at (u, v)
// standard deviations from its centre, and exp(-(u^2 + v^2) / 2) is never narrower on the screen than 1 / sqrt(2) px (their eq. 11).
//
// With pixels counted from the projected centre, the plane-to-image matrix has rows (m00 m01 0), (m10 m11 0), (p q z), and the two
// planes through the pixel meet the disk at the cross product of their coefficients, whose parts are linear in (dx, dy):
//   u cz = z (m11 dx - m01 dy),  v cz = z (m00 dy - m10 dx),  cz = D + dx (q m10 - p m11) + dy (p m01 - q m00),  D = m00 m11 - m01 m10.
#pragma once

namespace hh {
namespace {

constexpr int kDiskSlot = 17;  // rgb, sum of q = alpha dL/dalpha, then what `sums` lists

struct Flat {
  using Item = Disk;
  static constexpr int kSlot = kDiskSlot;
  static constexpr float kTop = 1e30f;  // the exponent is minus a sum of squares

  static HH_METHOD uint64_t blocks(const Disk& g, float ox, float oy) {
    uint64_t found = 0;
    for (int r = 0; r < kBlockRows; r += HH_LANES) {
      vf lo;
      for (int i = 0; i < HH_LANES; ++i) lo[i] = (float)((r + i) * kBlockH);
      lo += oy;
      const vi in = (lo <= g.box[3]) & (lo + (float)kBlockH >= g.box[1]);
      for (int bx = 0; bx < 4; ++bx)
        if (ox + 4 * bx <= g.box[2] && ox + 4 * bx + 4 >= g.box[0]) found |= (uint64_t)bits(in) << (bx * kBlockRows + r);
    }
    return found;
  }

  struct Pair {
    vf dx, dy, y, r, u, v, z;
    vi met;  // the ray meets the disk; else the pixel is within the low-pass filter of its centre
  };
  static HH_METHOD Pair meet(const Disk& g, vf px, vf py) {
    Pair p;
    p.dx = px - g.x, p.dy = py - g.y;
    p.r = 1.f / (g.d + g.e * p.dx + g.f * p.dy);
    p.u = (g.a1 * p.dx + g.a2 * p.dy) * p.r, p.v = (g.b1 * p.dx + g.b2 * p.dy) * p.r, p.z = g.zd * p.r;
    const vf near = p.u * p.u + p.v * p.v, flat = 2.f * (p.dx * p.dx + p.dy * p.dy);
    p.met = (p.z >= kNear) & (near <= flat);  // false where cz is 0
    p.y = (p.met ? near : flat) * (-0.5f * kLog2e) + g.lop;
    return p;
  }
  static HH_METHOD vf depth(const Disk& g, const Pair& p) { return p.met ? p.z : all(g.depth); }

  // v_nu and its dx, dy; v_nv; v_cz; v_zd; then, where the filter is met: v_x, v_y, v_depth
  static HH_METHOD void sums(const Disk&, const Pair& p, vf q, vf wz, vf* s) {
    const vf qm = p.met ? -q : vf{}, zm = p.met ? wz : vf{}, r = p.met ? p.r : vf{}, u = p.met ? p.u : vf{}, v = p.met ? p.v : vf{};
    const vf vu = qm * u, vv = qm * v, z = p.met ? p.z : vf{};
    const vf nu = vu * r, nv = vv * r, cz = -(vu * u + vv * v + zm * z) * r;
    s[0] = nu, s[1] = nu * p.dx, s[2] = nu * p.dy, s[3] = nv, s[4] = nv * p.dx, s[5] = nv * p.dy;
    s[6] = cz, s[7] = cz * p.dx, s[8] = cz * p.dy, s[9] = zm * r;
    const vf qf = p.met ? vf{} : 2.f * q;  // the filter's sigma is dx^2 + dy^2, and dx = pixel - x
    s[10] = qf * p.dx, s[11] = qf * p.dy, s[12] = p.met ? vf{} : wz;
  }
};

// Half-plane matrix of a disk, in camera axes: columns are the two tangents times their scale.
struct Plane {
  float R[9], t[3], inv_norm, Tu[3], Tv[3], m00, m01, m10, m11, xz, yz;
};
HH_INLINE bool plane_of(const Project& c, int64_t n, Plane& p) {
  camera_point(c, n, p.t);
  if (!(p.t[2] >= kNear && p.t[2] <= kFar)) return false;
  p.inv_norm = rotation(c.quats + 4 * n, p.R);
  const float *V = c.view, *s = c.scales + 3 * n;
  for (int i = 0; i < 3; ++i) {
    p.Tu[i] = (V[4 * i] * p.R[0] + V[4 * i + 1] * p.R[3] + V[4 * i + 2] * p.R[6]) * s[0];
    p.Tv[i] = (V[4 * i] * p.R[1] + V[4 * i + 1] * p.R[4] + V[4 * i + 2] * p.R[7]) * s[1];
  }
  p.xz = p.t[0] / p.t[2], p.yz = p.t[1] / p.t[2];
  p.m00 = c.fx * (p.Tu[0] - p.xz * p.Tu[2]), p.m01 = c.fx * (p.Tv[0] - p.xz * p.Tv[2]);
  p.m10 = c.fy * (p.Tu[1] - p.yz * p.Tu[2]), p.m11 = c.fy * (p.Tv[1] - p.yz * p.Tv[2]);
  return true;
}

// Pixels that a row (m0 m1 0) of the matrix reaches on the disk of radius^2 rho2, from the projected centre.
HH_INLINE void reach(float m0, float m1, float p, float q, float z, float rho2, float* lo, float* hi) {
  const float d = rho2 * (p * p + q * q) - z * z;  // the dual conic; negative while the disk stays in front of the camera
  if (!(d < -1e-3f * z * z)) {
    *lo = -1e30f, *hi = 1e30f;
    return;
  }
  const float mid = rho2 * (m0 * p + m1 * q) / d, half = __builtin_sqrtf(maxf(mid * mid - rho2 * (m0 * m0 + m1 * m1) / d, 0));
  *lo = mid - half, *hi = mid + half;
}

void disk_project(const Project& c, int64_t b, int64_t e) {
  for (int64_t n = b; n < e; ++n) {
    Disk& g = static_cast<Disk*>(c.splats)[n];
    int32_t* box = c.box + 4 * n;
    box[0] = box[1] = box[2] = box[3] = 0;
    Plane m;
    const float op = c.opacities[n];
    if (!(op >= kAlphaMin) || !plane_of(c, n, m)) continue;
    const float smax = __builtin_logf(255.f * op), rho2 = 2.002f * smax, p = m.Tu[2], q = m.Tv[2], z = m.t[2];
    g.x = c.fx * m.xz + c.cx, g.y = c.fy * m.yz + c.cy;
    g.a1 = z * m.m11, g.a2 = -z * m.m01, g.b1 = -z * m.m10, g.b2 = z * m.m00;
    g.d = m.m00 * m.m11 - m.m01 * m.m10, g.e = q * m.m10 - p * m.m11, g.f = p * m.m01 - q * m.m00, g.zd = z * g.d;
    if (!(absf(g.x) < 1e30f && absf(g.y) < 1e30f && absf(g.d) < 1e30f && absf(g.a1) + absf(g.a2) + absf(g.b1) + absf(g.b2) < 1e30f)) continue;
    float x0, x1, y0, y1;
    const float flat = __builtin_sqrtf(smax) + 0.01f;  // where 2 r^2 / 2 reaches smax
    reach(m.m00, m.m01, p, q, z, rho2, &x0, &x1), reach(m.m10, m.m11, p, q, z, rho2, &y0, &y1);
    g.box[0] = g.x + minf(x0 - 0.01f, -flat), g.box[2] = g.x + maxf(x1 + 0.01f, flat);
    g.box[1] = g.y + minf(y0 - 0.01f, -flat), g.box[3] = g.y + maxf(y1 + 0.01f, flat);
    if (!tile_range(c, g.box[0], g.box[2], g.box[1], g.box[3], box)) continue;
    g.op = op, g.lop = kLog2e * __builtin_logf(op), g.depth = c.depth[n] = z, g.id = body(c, n);
    shade(c, n, g.col);
  }
}

void disk_project_backward(const Project& c, const ProjectGrad& out, int64_t b, int64_t e) {
  const float* V = c.view;
  for (int i = 0; i < 16; ++i) out.camera[i] = 0;
  const int per_color = c.sh_degree < 0 ? 3 : 3 * c.K;
  for (int64_t n = b; n < e; ++n) {
    float a[kDiskSlot];
    float *v_mean = out.means + 3 * n, *v_scale = out.scales + 3 * n, *v_color = out.colors + n * per_color;
    for (int i = 0; i < per_color; ++i) v_color[i] = 0;
    if (!gather(out, n, kDiskSlot, a)) {
      no_gradient(out, n);
      continue;
    }
    const Disk& g = static_cast<const Disk*>(c.splats)[n];
    Plane m;
    plane_of(c, n, m);
    out.opacities[n] = a[3] / g.op;
    const float *s = a + 4, p = m.Tu[2], q = m.Tv[2], z = m.t[2];
    // dx = pixel - x in nu = a1 dx + a2 dy, nv and cz
    const float vx = s[10] - (g.a1 * s[0] + g.b1 * s[3] + g.e * s[6]), vy = s[11] - (g.a2 * s[0] + g.b2 * s[3] + g.f * s[6]);
    const float vD = s[6] + z * s[9];
    const float v00 = z * s[5] + m.m11 * vD - q * s[8], v01 = -z * s[2] - m.m10 * vD + p * s[8];
    const float v10 = -z * s[4] - m.m01 * vD + q * s[7], v11 = z * s[1] + m.m00 * vD - p * s[7];
    const float vp = m.m01 * s[8] - m.m11 * s[7], vq = m.m10 * s[7] - m.m00 * s[8];
    const float vz = m.m11 * s[1] - m.m01 * s[2] - m.m10 * s[4] + m.m00 * s[5] + g.d * s[9] + s[12];
    const float vTu[3] = {c.fx * v00, c.fy * v10, vp - c.fx * m.xz * v00 - c.fy * m.yz * v10};
    const float vTv[3] = {c.fx * v01, c.fy * v11, vq - c.fx * m.xz * v01 - c.fy * m.yz * v11};
    const float vxz = c.fx * (vx - p * v00 - q * v01), vyz = c.fy * (vy - p * v10 - q * v11), rz = 1.f / z;
    const float vt[3] = {vxz * rz, vyz * rz, vz - (m.xz * vxz + m.yz * vyz) * rz};
    double* cam = out.camera;
    cam[12] += m.xz * vx + (m.Tu[0] - m.xz * p) * v00 + (m.Tv[0] - m.xz * q) * v01, cam[14] += vx;
    cam[13] += m.yz * vy + (m.Tu[1] - m.yz * p) * v10 + (m.Tv[1] - m.yz * q) * v11, cam[15] += vy;
    const float* sc = c.scales + 3 * n;
    float vR[9];
    v_scale[0] = v_scale[1] = v_scale[2] = 0;
    for (int k = 0; k < 3; ++k) {
      const float gu = V[k] * vTu[0] + V[4 + k] * vTu[1] + V[8 + k] * vTu[2], gv = V[k] * vTv[0] + V[4 + k] * vTv[1] + V[8 + k] * vTv[2];
      v_scale[0] += gu * m.R[3 * k], v_scale[1] += gv * m.R[3 * k + 1];
      vR[3 * k] = gu * sc[0], vR[3 * k + 1] = gv * sc[1], vR[3 * k + 2] = 0;
      v_mean[k] = V[k] * vt[0] + V[4 + k] * vt[1] + V[8 + k] * vt[2];
    }
    for (int i = 0; i < 3; ++i) {
      for (int k = 0; k < 3; ++k)
        cam[4 * i + k] += vTu[i] * m.R[3 * k] * sc[0] + vTv[i] * m.R[3 * k + 1] * sc[1] + vt[i] * c.means[3 * n + k];
      cam[4 * i + 3] += vt[i];
    }
    rotation_backward(c.quats + 4 * n, m.inv_norm, vR, out.quats + 4 * n);
    shade_backward(c, n, a, v_color, v_mean, cam);
  }
}

}  // namespace
}  // namespace hh
