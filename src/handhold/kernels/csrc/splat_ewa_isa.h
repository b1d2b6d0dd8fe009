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
  static HH_METHOD void add(const Splat&, const Pair& p, vf q, vf wz, vf* s) {
    const vf qx = q * p.dx, qy = q * p.dy;
    s[0] += qx, s[1] += qy, s[2] += qx * p.dx, s[3] += qx * p.dy, s[4] += qy * p.dy, s[5] += wz;
  }
};

struct Cov {
  vf mean[3], quat[4], scale[3];
  vf R[9], M[9], t[3], rz, u, v, J0, J2, J4, J5, T[6], B[6];  // rotation, R diag(s), camera point, Jacobian, J W, J W R diag(s)
  vf c00, c01, c11, det, inv_norm;
  vi x_free, y_free;                                         // false where the Jacobian's point was clamped to 1.3 x the image
};

// The lanes that are in front of the camera and not too large for floats.
HH_INLINE vi cov2d(const Project& c, const int64_t* at, Cov& p) {
  const float* V = c.view;
  load_lanes<3>(c.means, at, p.mean), load_lanes<4>(c.quats, at, p.quat), load_lanes<3>(c.scales, at, p.scale);
  camera_point(c, p.mean, p.t);
  vf *R = p.R, *M = p.M, *B = p.B, *T = p.T;
  p.inv_norm = rotation(p.quat, R);
  for (int i = 0; i < 9; ++i) M[i] = R[i] * p.scale[i % 3];
  const float mx = 0.15f * c.W / c.fx, my = 0.15f * c.H / c.fy;
  const float x_hi = (c.W - c.cx) / c.fx + mx, x_lo = -c.cx / c.fx - mx, y_hi = (c.H - c.cy) / c.fy + my, y_lo = -c.cy / c.fy - my;
  p.rz = 1.f / p.t[2];
  const vf xr = p.t[0] * p.rz, yr = p.t[1] * p.rz;
  p.x_free = (xr <= x_hi) & (xr >= x_lo), p.y_free = (yr <= y_hi) & (yr >= y_lo);
  p.u = minv(maxv(xr, all(x_lo)), all(x_hi)), p.v = minv(maxv(yr, all(y_lo)), all(y_hi));
  p.J0 = c.fx * p.rz, p.J2 = -p.J0 * p.u, p.J4 = c.fy * p.rz, p.J5 = -p.J4 * p.v;
  for (int j = 0; j < 3; ++j) T[j] = p.J0 * V[j] + p.J2 * V[8 + j], T[3 + j] = p.J4 * V[4 + j] + p.J5 * V[8 + j];
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 3; ++j) B[3 * i + j] = T[3 * i] * M[j] + T[3 * i + 1] * M[3 + j] + T[3 * i + 2] * M[6 + j];
  const vf c00 = B[0] * B[0] + B[1] * B[1] + B[2] * B[2], c11 = B[3] * B[3] + B[4] * B[4] + B[5] * B[5];
  const vf k0 = B[1] * B[5] - B[2] * B[4], k1 = B[2] * B[3] - B[0] * B[5], k2 = B[0] * B[4] - B[1] * B[3];
  p.c00 = c00 + kDilation, p.c11 = c11 + kDilation, p.c01 = B[0] * B[3] + B[1] * B[4] + B[2] * B[5];
  // |b0 x b1|^2 is what c00 c11 - c01^2 is of the undilated covariance, but does not cancel for needles
  p.det = k0 * k0 + k1 * k1 + k2 * k2 + kDilation * (c00 + c11 + kDilation);
  return (p.t[2] >= kNear) & (p.t[2] <= kFar) & (p.det < 1e30f);
}

void splat_project(const Project& c, int64_t b, int64_t e) {
  each_lanes(b, e, [&](const int64_t* at, unsigned lanes) {
    for (int i = 0; i < HH_LANES; ++i)
      if (lanes >> i & 1)
        for (int k = 0; k < 4; ++k) c.box[4 * at[i] + k] = 0;
    Cov p;
    vf op;
    load_lanes<1>(c.opacities, at, &op);
    lanes &= bits(cov2d(c, at, p) & (op >= kAlphaMin));
    if (!lanes) return;
    vf lop{};
    for (int i = 0; i < HH_LANES; ++i)
      if (lanes >> i & 1) lop[i] = kLog2e * __builtin_logf(op[i]);
    const vf smax = (lop - kFaintest) * (1.f / kLog2e), id = 1.f / p.det, ic = 1.f / p.c11;
    const vf ex = sqrtv(2.f * smax * p.c00), ey = sqrtv(2.f * smax * p.c11);
    // dx = slope t +- sqrt((2 smax - t^2 / c11) det / c11), a little wide, since blocks of pixels are chosen by it
    const vf field[14] = {
        c.fx * p.t[0] * p.rz + c.cx, c.fy * p.t[1] * p.rz + c.cy, -0.5f * kLog2e * p.c11 * id, kLog2e * p.c01 * id, -0.5f * kLog2e * p.c00 * id, lop,
        p.t[2], p.c01 * ic, 2.0005f * smax * p.det * ic + 1e-4f, p.det * ic * ic, ex * p.c01 / p.c00, op, ex, ey};
    float col[3][HH_LANES];
    for (int i = 0; i < HH_LANES; ++i) {
      const float x = field[0][i], y = field[1][i], rx = field[12][i], ry = field[13][i];
      if (lanes >> i & 1 && !tile_range(c, x - rx, x + rx, y - ry, y + ry, c.box + 4 * at[i])) lanes &= ~(1u << i);
    }
    shade(c, at, lanes, p.mean, col);
    for (int i = 0; i < HH_LANES; ++i) {
      if (!(lanes >> i & 1)) continue;
      Splat& g = static_cast<Splat*>(c.splats)[at[i]];
      g.x = field[0][i], g.y = field[1][i], g.A = field[2][i], g.B = field[3][i], g.C = field[4][i], g.lop = field[5][i];
      g.depth = c.depth[at[i]] = field[6][i], g.slope = field[7][i], g.w2 = field[8][i], g.m = field[9][i], g.top = field[10][i];
      for (int k = 0; k < 3; ++k) g.col[k] = col[k][i];
      g.id = body(c, at[i]), g.op = field[11][i];
    }
  });
}

void splat_project_backward(const Project& c, const ProjectGrad& out, int64_t b, int64_t e) {
  const float* V = c.view;
  vf cam[16];
  for (int i = 0; i < 16; ++i) cam[i] = vf{};
  each_lanes(b, e, [&](const int64_t* at, unsigned lanes) {
    vf a[kSplatSlot];
    lanes = gather<kSplatSlot>(c, out, at, lanes, a);
    if (!lanes) return;
    Cov p;
    cov2d(c, at, p);
    const vi drawn = lane_mask(lanes);
    vf op;
    load_lanes<1>(c.opacities, at, &op);
    const vf v_op = a[3] / op;
    store_lanes<1>(out.opacities, at, lanes, &v_op);
    // sigma = (A dx^2 + C dy^2)/2 + B dx dy and dL/dsigma = -q, with dx = pixel - centre
    const vf id = 1.f / p.det, ga = p.c11 * id, gb = -p.c01 * id, gc = p.c00 * id;
    const vf s1 = -a[4], s2 = -a[5], va = -0.5f * a[6], h = -0.5f * a[7], vc = -0.5f * a[8];
    // A lane that was not drawn may hold anything, NaN too: what is summed over the lanes starts from zeros there.
    for (vf& m : p.mean) m = drawn ? m : vf{};
    const vf vx = drawn ? -(ga * s1 + gb * s2) : vf{}, vy = drawn ? -(gb * s1 + gc * s2) : vf{};
    // d conic -> d covariance: -Q G Q
    const vf m00 = va * ga + h * gb, m01 = va * gb + h * gc, m10 = h * ga + vc * gb, m11 = h * gb + vc * gc;
    const vf k00 = -(ga * m00 + gb * m10), k01 = -(ga * m01 + gb * m11), k11 = -(gb * m01 + gc * m11);
    const vf *T = p.T, *M = p.M, *B = p.B;
    vf KB[6], vT[6], vJ[6];
    for (int j = 0; j < 3; ++j) KB[j] = 2.f * (k00 * B[j] + k01 * B[3 + j]), KB[3 + j] = 2.f * (k01 * B[j] + k11 * B[3 + j]);
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 3; ++j) {
        const vf v = KB[3 * i] * M[3 * j] + KB[3 * i + 1] * M[3 * j + 1] + KB[3 * i + 2] * M[3 * j + 2];
        vT[3 * i + j] = drawn ? v : vf{};
      }
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 3; ++j) vJ[3 * i + j] = vT[3 * i] * V[4 * j] + vT[3 * i + 1] * V[4 * j + 1] + vT[3 * i + 2] * V[4 * j + 2];
    const vf zero{}, rz = drawn ? p.rz : zero, rz2 = rz * rz, u = drawn ? p.u : zero, v = drawn ? p.v : zero;
    const vf tx = drawn ? p.t[0] : zero, ty = drawn ? p.t[1] : zero;
    vf vt[3] = {c.fx * rz * vx, c.fy * rz * vy, -(c.fx * tx * vx + c.fy * ty * vy) * rz2 + a[9]};
    // J = [fx/z, 0, -fx u/z; 0, fy/z, -fy v/z], u = x/z and v = y/z unless clamped
    const vf ux = c.fx * rz2 * vJ[2], uy = c.fy * rz2 * vJ[5];
    vt[2] += u * ux + v * uy - c.fx * rz2 * vJ[0] - c.fy * rz2 * vJ[4];
    vt[0] -= p.x_free ? ux : zero, vt[1] -= p.y_free ? uy : zero;
    vt[2] += (p.x_free ? u * ux : zero) + (p.y_free ? v * uy : zero);
    cam[12] += tx * rz * vx + rz * vJ[0] - (p.x_free ? rz * u * vJ[2] : zero);
    cam[13] += ty * rz * vy + rz * vJ[4] - (p.y_free ? rz * v * vJ[5] : zero);
    // the clamp's bound is (.. - cx) / fx: fx u does not depend on fx there
    cam[14] += vx + (p.x_free ? zero : rz * vJ[2]), cam[15] += vy + (p.y_free ? zero : rz * vJ[5]);
    const vf J0 = c.fx * rz, J4 = c.fy * rz, J[6] = {J0, zero, -J0 * u, zero, J4, -J4 * v};
    vf v_mean[3], v_scale[3] = {}, vR[9], v_quat[4];
    for (int j = 0; j < 3; ++j) v_mean[j] = V[j] * vt[0] + V[4 + j] * vt[1] + V[8 + j] * vt[2];
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) cam[4 * i + j] += J[i] * vT[j] + J[3 + i] * vT[3 + j] + vt[i] * p.mean[j];
      cam[4 * i + 3] += vt[i];
    }
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) {
        const vf vM = T[i] * KB[j] + T[3 + i] * KB[3 + j];
        v_scale[j] += p.R[3 * i + j] * vM;
        vR[3 * i + j] = vM * p.scale[j];
      }
    rotation_backward(p.quat, p.inv_norm, vR, v_quat);
    shade_backward(c, at, lanes, drawn, p.mean, a, out.colors, v_mean, cam);
    store_lanes<3>(out.means, at, lanes, v_mean), store_lanes<3>(out.scales, at, lanes, v_scale), store_lanes<4>(out.quats, at, lanes, v_quat);
  });
  for (int i = 0; i < 16; ++i) out.camera[i] = sum(cam[i]);
}

}  // namespace
}  // namespace hh
