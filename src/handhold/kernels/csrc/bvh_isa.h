// Walks over a tree of triangles: closest point, winding number, first hit of rays. Boxes and far fields are float, eight
// children at once; what decides a result (a triangle's distance, solid angle or hit) is double. Included by isa.cpp only.
#pragma once

namespace hh {
namespace {

constexpr int BVH_STACK = 256;  // a part is at most a quarter of its parent (bvh.cpp): 14 levels, 7 waiting children each

HH_INLINE double dot3(const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
HH_INLINE void sub3(const double* a, const double* b, double* o) {
  for (int k = 0; k < 3; ++k) o[k] = a[k] - b[k];
}
HH_INLINE void cross3(const double* a, const double* b, double* o) {
  o[0] = a[1] * b[2] - a[2] * b[1];
  o[1] = a[2] * b[0] - a[0] * b[2];
  o[2] = a[0] * b[1] - a[1] * b[0];
}
HH_INLINE double clamp01(double x) { return x > 0 ? (x < 1 ? x : 1.0) : 0.0; }  // NaN gives 0

// Squared distance from p to segment a + s e, s in [0,1].
HH_INLINE double to_segment(const double* ap, const double* e, double ee, double* s) {
  *s = ee > 0 ? clamp01(dot3(ap, e) / ee) : 0.0;
  double d = 0;
  for (int k = 0; k < 3; ++k) {
    const double r = ap[k] - *s * e[k];
    d += r * r;
  }
  return d;
}

// Squared distance from p to the triangle t (three corners), barycentric weights in w.
static double closest_on_triangle(const double* p, const double* t, double* w) {
  const double *a = t, *b = t + 3, *c = t + 6;
  double ab[3], ac[3], ap[3], n[3], x[3];
  sub3(b, a, ab);
  sub3(c, a, ac);
  sub3(p, a, ap);
  cross3(ab, ac, n);
  const double nn = dot3(n, n), bb = dot3(ab, ab), cc = dot3(ac, ac);
  if (nn > 1e-20 * bb * cc) {
    cross3(ap, ac, x);
    const double v = dot3(x, n) / nn;
    cross3(ab, ap, x);
    const double u = dot3(x, n) / nn;
    if (v >= 0 && u >= 0 && u + v <= 1) {
      w[0] = 1 - u - v;
      w[1] = v;
      w[2] = u;
      const double h = dot3(ap, n);
      return h * h / nn;
    }
  }
  double bc[3], bp[3], s[3];
  sub3(c, b, bc);
  sub3(p, b, bp);
  const double d0 = to_segment(ap, ab, bb, &s[0]), d1 = to_segment(ap, ac, cc, &s[1]), d2 = to_segment(bp, bc, dot3(bc, bc), &s[2]);
  if (d0 <= d1 && d0 <= d2) {
    w[0] = 1 - s[0], w[1] = s[0], w[2] = 0;
    return d0;
  }
  if (d1 <= d2) {
    w[0] = 1 - s[1], w[1] = 0, w[2] = s[1];
    return d1;
  }
  w[0] = 0, w[1] = 1 - s[2], w[2] = s[2];
  return d2;
}

struct BvhEntry {
  float key;
  int32_t node;
};

// Squared distances from p to the eight boxes, a little too small so that rounding never hides a triangle.
HH_INLINE void box_distances(const BvhNode& n, const float* p, float* out) {
  for (int v = 0; v < 8; v += HH_LANES) {
    vf d2 = all(0.f);
    for (int k = 0; k < 3; ++k) {
      const vf x = all(p[k]), lo = *(const vf*)(n.lo[k] + v) - x, hi = x - *(const vf*)(n.hi[k] + v);
      vf d = lo > hi ? lo : hi;
      d = d > 0.f ? d : all(0.f);
      d2 += d * d;
    }
    *(vf*)(out + v) = d2 * 0.999999f;
  }
}

static void bvh_closest(const BvhView& m, const double* points, int64_t b, int64_t e, int64_t* face, double* bary, double* d2) {
  int32_t last = 0;  // neighbours in the list are often neighbours in space: the last triangle bounds the next distance
  for (int64_t i = b; i < e; ++i) {
    double p[3], w[3], best_w[3];
    float pf[3];
    for (int k = 0; k < 3; ++k) p[k] = (points[3 * i + k] - m.centre[k]) * m.scale, pf[k] = (float)p[k];
    int32_t best = last;
    double best_d = closest_on_triangle(p, m.triangles + 9 * (int64_t)best, best_w);
    BvhEntry stack[BVH_STACK];
    int top = 0;
    stack[top++] = {0.f, 0};
    while (top > 0) {
      const BvhEntry at = stack[--top];
      if (at.key >= best_d) continue;
      const BvhNode& n = m.nodes[at.node];
      alignas(32) float d[8];
      box_distances(n, pf, d);
      int order[8], count = 0;
      for (int j = 0; j < n.count; ++j) {
        if (!(d[j] < best_d)) continue;
        int at_ = count++;
        while (at_ > 0 && d[order[at_ - 1]] < d[j]) order[at_] = order[at_ - 1], --at_;  // farthest first
        order[at_] = j;
      }
      while (count > 0) {
        const int j = order[--count];
        const int32_t child = n.child[j];
        if (child >= 0) {  // push what remains, farthest below; this one is next
          for (int r = 0; r <= count && top < BVH_STACK; ++r) {
            const int k = order[r];
            if (n.child[k] >= 0) stack[top++] = {d[k], n.child[k]};
          }
          // triangles among what remains are tried now: they are cheap and tighten the bound
          for (int r = count - 1; r >= 0; --r) {
            const int k = order[r];
            if (n.child[k] < 0 && d[k] < best_d) {
              const int32_t t = ~n.child[k];
              const double dd = closest_on_triangle(p, m.triangles + 9 * (int64_t)t, w);
              if (dd < best_d) best_d = dd, best = t, best_w[0] = w[0], best_w[1] = w[1], best_w[2] = w[2];
            }
          }
          break;
        }
        if (d[j] < best_d) {
          const int32_t t = ~child;
          const double dd = closest_on_triangle(p, m.triangles + 9 * (int64_t)t, w);
          if (dd < best_d) best_d = dd, best = t, best_w[0] = w[0], best_w[1] = w[1], best_w[2] = w[2];
        }
      }
    }
    last = best;
    face[i] = m.face[best];
    for (int k = 0; k < 3; ++k) bary[3 * i + k] = best_w[k];
    d2[i] = best_d / (m.scale * m.scale);
  }
}

// Signed solid angle of a triangle over 4 pi (Van Oosterom & Strackee, 1983).
static double solid_angle(const double* q, const double* t) {
  double a[3], b[3], c[3], x[3];
  sub3(t, q, a);
  sub3(t + 3, q, b);
  sub3(t + 6, q, c);
  const double la = __builtin_sqrt(dot3(a, a)), lb = __builtin_sqrt(dot3(b, b)), lc = __builtin_sqrt(dot3(c, c));
  cross3(b, c, x);
  const double det = dot3(a, x), den = la * lb * lc + dot3(a, b) * lc + dot3(b, c) * la + dot3(c, a) * lb;
  if (det == 0 && den == 0) return 0;
  return __builtin_atan2(det, den) * 0.15915494309189535;  // 2 / (4 pi)
}

// Generalised winding number (Jacobson et al. 2013), far clusters by their dipole and its first derivative (Barill et al. 2018).
// beta2: a cluster is far when its squared distance exceeds beta2 times its squared radius; inf: none is.
static void bvh_winding(const BvhView& m, const double* points, int64_t b, int64_t e, float beta2, double* out) {
  for (int64_t i = b; i < e; ++i) {
    double p[3], total = 0;
    float pf[3];
    for (int k = 0; k < 3; ++k) p[k] = (points[3 * i + k] - m.centre[k]) * m.scale, pf[k] = (float)p[k];
    int32_t stack[BVH_STACK];
    int top = 0;
    stack[top++] = 0;
    vf far_sum = all(0.f);
    while (top > 0) {
      const int32_t at = stack[--top];
      const BvhNode& n = m.nodes[at];
      const BvhDipole& f = m.dipoles[at];
      alignas(32) int32_t near[8];
      for (int v = 0; v < 8; v += HH_LANES) {
        const vf x = *(const vf*)(f.centre[0] + v) - pf[0], y = *(const vf*)(f.centre[1] + v) - pf[1], z = *(const vf*)(f.centre[2] + v) - pf[2];
        const vf r2 = x * x + y * y + z * z;
        const vi far = r2 > *(const vf*)(f.radius2 + v) * beta2;
        *(vi*)(near + v) = ~far;
        if (!any(far)) continue;
        alignas(32) float root[HH_LANES], sq[HH_LANES];
        *(vf*)sq = far ? r2 : all(1.f);
        for (int k = 0; k < HH_LANES; ++k) root[k] = __builtin_sqrtf(sq[k]);
        const vf i2 = 1.f / *(vf*)sq, i3 = i2 / *(vf*)root;
        const vf one = *(const vf*)(f.normal[0] + v) * x + *(const vf*)(f.normal[1] + v) * y + *(const vf*)(f.normal[2] + v) * z;
        const vf xx = *(const vf*)(f.moment[0] + v), yy = *(const vf*)(f.moment[1] + v), zz = *(const vf*)(f.moment[2] + v);
        const vf quad = x * (xx * x + *(const vf*)(f.moment[3] + v) * y + *(const vf*)(f.moment[4] + v) * z) +
                        y * (yy * y + *(const vf*)(f.moment[5] + v) * z) + zz * z * z;
        const vf w = i3 * (one + xx + yy + zz - 3.f * i2 * quad);
        far_sum += far ? w : all(0.f);
      }
      for (int j = n.count - 1; j >= 0; --j) {
        if (!near[j]) continue;
        if (n.child[j] < 0)
          total += solid_angle(p, m.triangles + 9 * (int64_t)~n.child[j]);
        else if (top < BVH_STACK)
          stack[top++] = n.child[j];
      }
    }
    out[i] = total + sum(far_sum) * 0.0795774715459477;
  }
}

// First hit of o + t d with 0 <= t < limit: t is inf and the face -1 where there is none. (Moeller & Trumbore 1997, in double.)
static void bvh_rays(const BvhView& m, const double* origins, const double* directions, int64_t b, int64_t e, int64_t* face, double* bary, double* t_hit) {
  for (int64_t i = b; i < e; ++i) {
    double o[3], d[3];
    float of[3], inv[3];
    for (int k = 0; k < 3; ++k) {
      o[k] = (origins[3 * i + k] - m.centre[k]) * m.scale;
      d[k] = directions[3 * i + k];
      of[k] = (float)o[k];
      const float df = (float)d[k];
      inv[k] = 1.f / (absf(df) > 1e-30f ? df : 1e-30f);
    }
    int64_t best = -1;
    double best_t = __builtin_inf(), best_w[3] = {0, 0, 0};
    BvhEntry stack[BVH_STACK];
    int top = 0;
    stack[top++] = {0.f, 0};
    while (top > 0) {
      const BvhEntry at = stack[--top];
      if (at.key > best_t) continue;
      const BvhNode& n = m.nodes[at.node];
      alignas(32) float enter[8];
      alignas(32) int32_t hit[8];
      for (int v = 0; v < 8; v += HH_LANES) {
        vf t0 = all(0.f), t1 = all(3e38f);
        for (int k = 0; k < 3; ++k) {
          const vf a = (*(const vf*)(n.lo[k] + v) - of[k]) * inv[k], c = (*(const vf*)(n.hi[k] + v) - of[k]) * inv[k];
          const vf lo = a < c ? a : c, hi = a < c ? c : a;
          t0 = lo > t0 ? lo : t0;
          t1 = hi < t1 ? hi : t1;
        }
        *(vf*)(enter + v) = t0 * 0.999999f;
        *(vi*)(hit + v) = t0 * 0.999998f <= t1 * 1.000002f;
      }
      int order[8], count = 0;
      for (int j = 0; j < n.count; ++j) {
        if (!hit[j] || enter[j] > best_t) continue;
        if (n.child[j] >= 0) {
          int at_ = count++;
          while (at_ > 0 && enter[order[at_ - 1]] < enter[j]) order[at_] = order[at_ - 1], --at_;
          order[at_] = j;
          continue;
        }
        const int32_t tri = ~n.child[j];
        const double* t = m.triangles + 9 * (int64_t)tri;
        double ab[3], ac[3], ao[3], x[3], y[3];
        sub3(t + 3, t, ab);
        sub3(t + 6, t, ac);
        sub3(o, t, ao);
        cross3(d, ac, x);
        const double det = dot3(ab, x);
        if (det == 0) continue;
        cross3(ao, ab, y);
        const double u = dot3(ao, x) / det, v = dot3(d, y) / det, at_t = dot3(ac, y) / det;
        if (u >= -1e-12 && v >= -1e-12 && u + v <= 1 + 1e-12 && at_t >= 0 && at_t < best_t)
          best_t = at_t, best = tri, best_w[0] = 1 - u - v, best_w[1] = u, best_w[2] = v;
      }
      for (int r = 0; r < count && top < BVH_STACK; ++r) stack[top++] = {enter[order[r]], n.child[order[r]]};
    }
    face[i] = best < 0 ? -1 : m.face[best];
    for (int k = 0; k < 3; ++k) bary[3 * i + k] = best_w[k];
    t_hit[i] = best_t / m.scale;
  }
}

}  // namespace
}  // namespace hh
