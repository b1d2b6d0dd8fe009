// 2D Gaussians in the image (Huang et al., 2D Gaussian Splatting, SIGGRAPH 2024): the ray of a pixel meets the disk's plane at (u, v)
// standard deviations from its centre, and exp(-(u^2 + v^2) / 2) is never narrower on the screen than 1 / sqrt(2) px (their eq. 11).
//
// With pixels counted from the projected centre, the plane-to-image matrix has rows (m00 m01 0), (m10 m11 0), (p q z), and the two
// planes through the pixel meet the disk at the cross product of their coefficients, whose parts are linear in (dx, dy):
//   u cz = z (m11 dx - m01 dy),  v cz = z (m00 dy - m10 dx),  cz = D + dx (q m10 - p m11) + dy (p m01 - q m00),  D = m00 m11 - m01 m10.
#pragma once

namespace hh {
namespace {

constexpr int kDiskSlot = 17;  // rgb, sum of q = alpha dL/dalpha, then what `add` lists

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
  static HH_METHOD void add(const Disk&, const Pair& p, vf q, vf wz, vf* s) {
    const vf qm = p.met ? -q : vf{}, zm = p.met ? wz : vf{}, r = p.met ? p.r : vf{}, u = p.met ? p.u : vf{}, v = p.met ? p.v : vf{};
    const vf vu = qm * u, vv = qm * v, z = p.met ? p.z : vf{};
    const vf nu = vu * r, nv = vv * r, cz = -(vu * u + vv * v + zm * z) * r;
    s[0] += nu, s[1] += nu * p.dx, s[2] += nu * p.dy, s[3] += nv, s[4] += nv * p.dx, s[5] += nv * p.dy;
    s[6] += cz, s[7] += cz * p.dx, s[8] += cz * p.dy, s[9] += zm * r;
    const vf qf = p.met ? vf{} : 2.f * q;  // the filter's sigma is dx^2 + dy^2, and dx = pixel - x
    s[10] += qf * p.dx, s[11] += qf * p.dy, s[12] += p.met ? vf{} : wz;
  }
};

// Disks in camera axes: tangents times their scale, and the first two columns of the matrix above.
struct Plane {
  vf mean[3], quat[4], scale[3], R[9], t[3], inv_norm, Tu[3], Tv[3], m00, m01, m10, m11, xz, yz;
};
// The lanes that are in front of the camera.
HH_INLINE vi planes_of(const Project& c, const int64_t* at, Plane& p) {
  load_lanes<3>(c.means, at, p.mean), load_lanes<4>(c.quats, at, p.quat), load_lanes<3>(c.scales, at, p.scale);
  camera_point(c, p.mean, p.t);
  p.inv_norm = rotation(p.quat, p.R);
  const float* V = c.view;
  for (int i = 0; i < 3; ++i) {
    p.Tu[i] = (V[4 * i] * p.R[0] + V[4 * i + 1] * p.R[3] + V[4 * i + 2] * p.R[6]) * p.scale[0];
    p.Tv[i] = (V[4 * i] * p.R[1] + V[4 * i + 1] * p.R[4] + V[4 * i + 2] * p.R[7]) * p.scale[1];
  }
  p.xz = p.t[0] / p.t[2], p.yz = p.t[1] / p.t[2];
  p.m00 = c.fx * (p.Tu[0] - p.xz * p.Tu[2]), p.m01 = c.fx * (p.Tv[0] - p.xz * p.Tv[2]);
  p.m10 = c.fy * (p.Tu[1] - p.yz * p.Tu[2]), p.m11 = c.fy * (p.Tv[1] - p.yz * p.Tv[2]);
  return (p.t[2] >= kNear) & (p.t[2] <= kFar);
}

// Pixels from the projected centre that a row (m0 m1 0) of the matrix reaches on the disk of radius^2 rho2, by its dual conic: a box while
// the disk stays in front of the camera.
HH_INLINE void reach(vf m0, vf m1, vf p, vf q, vf z, vf rho2, vf* lo, vf* hi) {
  const vf d = rho2 * (p * p + q * q) - z * z;
  const vi boxed = d < -1e-3f * z * z;
  const vf mid = rho2 * (m0 * p + m1 * q) / d, half = sqrtv(maxv(mid * mid - rho2 * (m0 * m0 + m1 * m1) / d, vf{}));
  *lo = boxed ? mid - half : all(-1e30f), *hi = boxed ? mid + half : all(1e30f);
}

HH_INLINE vf magnitude(vf v) { return maxv(v, -v); }

void disk_project(const Project& c, int64_t b, int64_t e) {
  each_lanes(b, e, [&](const int64_t* at, unsigned lanes) {
    for (int i = 0; i < HH_LANES; ++i)
      if (lanes >> i & 1)
        for (int k = 0; k < 4; ++k) c.box[4 * at[i] + k] = 0;
    Plane m;
    vf op;
    load_lanes<1>(c.opacities, at, &op);
    const vi front = planes_of(c, at, m) & (op >= kAlphaMin);
    const vf p = m.Tu[2], q = m.Tv[2], z = m.t[2], d = m.m00 * m.m11 - m.m01 * m.m10;
    const vf x = c.fx * m.xz + c.cx, y = c.fy * m.yz + c.cy, a1 = z * m.m11, a2 = -z * m.m01, b1 = -z * m.m10, b2 = z * m.m00;
    // written so that NaN fails
    lanes &= bits(front & (magnitude(x) + magnitude(y) + magnitude(d) < 1e30f) & (magnitude(a1) + magnitude(a2) + magnitude(b1) + magnitude(b2) < 1e30f));
    if (!lanes) return;
    vf lop{};
    for (int i = 0; i < HH_LANES; ++i)
      if (lanes >> i & 1) lop[i] = kLog2e * __builtin_logf(op[i]);
    const vf smax = (lop - kFaintest) * (1.f / kLog2e), rho2 = 2.002f * smax, flat = sqrtv(smax) + 0.01f;  // 2 r^2 / 2 reaches smax at sqrt(smax)
    vf x0, x1, y0, y1;
    reach(m.m00, m.m01, p, q, z, rho2, &x0, &x1), reach(m.m10, m.m11, p, q, z, rho2, &y0, &y1);
    x0 = x + minv(x0 - 0.01f, -flat), x1 = x + maxv(x1 + 0.01f, flat), y0 = y + minv(y0 - 0.01f, -flat), y1 = y + maxv(y1 + 0.01f, flat);
    for (int i = 0; i < HH_LANES; ++i)
      if (lanes >> i & 1 && !tile_range(c, x0[i], x1[i], y0[i], y1[i], c.box + 4 * at[i])) lanes &= ~(1u << i);
    const vf field[17] = {x, y, a1, a2, b1, b2, d, q * m.m10 - p * m.m11, p * m.m01 - q * m.m00, z * d, lop, z, op, x0, y0, x1, y1};
    float col[3][HH_LANES];
    shade(c, at, lanes, m.mean, col);
    for (int i = 0; i < HH_LANES; ++i) {
      if (!(lanes >> i & 1)) continue;
      Disk& g = static_cast<Disk*>(c.splats)[at[i]];
      g.x = field[0][i], g.y = field[1][i], g.a1 = field[2][i], g.a2 = field[3][i], g.b1 = field[4][i], g.b2 = field[5][i];
      g.d = field[6][i], g.e = field[7][i], g.f = field[8][i], g.zd = field[9][i], g.lop = field[10][i];
      g.depth = c.depth[at[i]] = field[11][i], g.op = field[12][i], g.id = body(c, at[i]);
      for (int k = 0; k < 4; ++k) g.box[k] = field[13 + k][i];
      for (int k = 0; k < 3; ++k) g.col[k] = col[k][i];
    }
  });
}

void disk_project_backward(const Project& c, const ProjectGrad& out, int64_t b, int64_t e) {
  const float* V = c.view;
  vf cam[16];
  for (int i = 0; i < 16; ++i) cam[i] = vf{};
  each_lanes(b, e, [&](const int64_t* at, unsigned lanes) {
    vf a[kDiskSlot];
    lanes = gather<kDiskSlot>(c, out, at, lanes, a);
    if (!lanes) return;
    Plane m;
    planes_of(c, at, m);
    const vi drawn = lane_mask(lanes);
    // A lane that was not drawn may hold anything, NaN too: what is summed over the lanes starts from zeros there.
    vf* const used[] = {m.Tu, m.Tu + 1, m.Tu + 2, m.Tv, m.Tv + 1, m.Tv + 2, m.mean, m.mean + 1, m.mean + 2, &m.m00, &m.m01, &m.m10, &m.m11, &m.xz, &m.yz};
    for (vf* v : used) *v = drawn ? *v : vf{};
    vf op;
    load_lanes<1>(c.opacities, at, &op);
    const vf v_op = a[3] / op;
    store_lanes<1>(out.opacities, at, lanes, &v_op);
    const vf *s = a + 4, p = m.Tu[2], q = m.Tv[2], z = drawn ? m.t[2] : all(1.f);
    const vf d = m.m00 * m.m11 - m.m01 * m.m10, ce = q * m.m10 - p * m.m11, cf = p * m.m01 - q * m.m00;
    // dx = pixel - x in nu = a1 dx + a2 dy, nv and cz
    const vf vx = s[10] - (z * (m.m11 * s[0] - m.m10 * s[3]) + ce * s[6]), vy = s[11] - (z * (m.m00 * s[3] - m.m01 * s[0]) + cf * s[6]);
    const vf vD = s[6] + z * s[9];
    const vf v00 = z * s[5] + m.m11 * vD - q * s[8], v01 = -z * s[2] - m.m10 * vD + p * s[8];
    const vf v10 = -z * s[4] - m.m01 * vD + q * s[7], v11 = z * s[1] + m.m00 * vD - p * s[7];
    const vf vp = m.m01 * s[8] - m.m11 * s[7], vq = m.m10 * s[7] - m.m00 * s[8];
    const vf vz = m.m11 * s[1] - m.m01 * s[2] - m.m10 * s[4] + m.m00 * s[5] + d * s[9] + s[12];
    const vf vTu[3] = {c.fx * v00, c.fy * v10, vp - c.fx * m.xz * v00 - c.fy * m.yz * v10};
    const vf vTv[3] = {c.fx * v01, c.fy * v11, vq - c.fx * m.xz * v01 - c.fy * m.yz * v11};
    const vf vxz = c.fx * (vx - p * v00 - q * v01), vyz = c.fy * (vy - p * v10 - q * v11), rz = 1.f / z;
    const vf vt[3] = {vxz * rz, vyz * rz, vz - (m.xz * vxz + m.yz * vyz) * rz};
    cam[12] += m.xz * vx + (m.Tu[0] - m.xz * p) * v00 + (m.Tv[0] - m.xz * q) * v01, cam[14] += vx;
    cam[13] += m.yz * vy + (m.Tu[1] - m.yz * p) * v10 + (m.Tv[1] - m.yz * q) * v11, cam[15] += vy;
    vf vR[9], v_mean[3], v_scale[3] = {}, v_quat[4];
    for (int k = 0; k < 3; ++k) {
      const vf gu = V[k] * vTu[0] + V[4 + k] * vTu[1] + V[8 + k] * vTu[2], gv = V[k] * vTv[0] + V[4 + k] * vTv[1] + V[8 + k] * vTv[2];
      v_scale[0] += gu * m.R[3 * k], v_scale[1] += gv * m.R[3 * k + 1];
      vR[3 * k] = gu * m.scale[0], vR[3 * k + 1] = gv * m.scale[1], vR[3 * k + 2] = vf{};
      v_mean[k] = V[k] * vt[0] + V[4 + k] * vt[1] + V[8 + k] * vt[2];
      const vf along = drawn ? m.R[3 * k] * m.scale[0] : vf{}, across = drawn ? m.R[3 * k + 1] * m.scale[1] : vf{};
      for (int i = 0; i < 3; ++i) cam[4 * i + k] += vTu[i] * along + vTv[i] * across + vt[i] * m.mean[k];
    }
    for (int i = 0; i < 3; ++i) cam[4 * i + 3] += vt[i];
    rotation_backward(m.quat, m.inv_norm, vR, v_quat);
    shade_backward(c, at, lanes, drawn, m.mean, a, out.colors, v_mean, cam);
    store_lanes<3>(out.means, at, lanes, v_mean), store_lanes<3>(out.scales, at, lanes, v_scale), store_lanes<4>(out.quats, at, lanes, v_quat);
  });
  for (int i = 0; i < 16; ++i) out.camera[i] = sum(cam[i]);
}

}  // namespace
}  // namespace hh
