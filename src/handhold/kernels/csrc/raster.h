// One triangle as one camera sees it: homogeneous edge functions (Olano and Greer, "Triangle scan conversion using 2D
// homogeneous coordinates", 1997). The ray d = ((x-cx)/fx, (y-cy)/fy, 1) of a pixel meets the triangle v0 v1 v2 where
// z d = sum b_i v_i; b_i / z = n_i.d / det with n_i = v_j x v_k. Nothing is divided by a vertex's z, so a triangle that
// crosses the camera's plane needs no clipping. In double: the n_i of a small triangle cancel too much in float.
#pragma once
#include <cstdint>

#include "isa.h"

namespace hh {
namespace mesh {

struct Camera {
  double fx, fy, cx, cy, reach;  // reach: the longest |d|_1 within the image
  double ray_x(double x) const { return (x - cx) / fx; }
  double ray_y(double y) const { return (y - cy) / fy; }
};

inline double abs1(const double* v) {
  return __builtin_fabs(v[0]) + __builtin_fabs(v[1]) + __builtin_fabs(v[2]);
}
inline double dot(const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
inline void cross(const double* a, const double* b, double* out) {
  out[0] = a[1] * b[2] - a[2] * b[1], out[1] = a[2] * b[0] - a[0] * b[2], out[2] = a[0] * b[1] - a[1] * b[0];
}

// va x vb as va x (vb - va), which cancels less; always from the lower index, so that the two triangles of an edge get
// exactly opposite values.
inline void edge_normal(int64_t ia, int64_t ib, const double* va, const double* vb, double* n) {
  const bool swap = ia > ib;
  const double *p = swap ? vb : va, *q = swap ? va : vb;
  const double e[3] = {q[0] - p[0], q[1] - p[1], q[2] - p[2]};
  cross(p, e, n);
  if (swap) n[0] = -n[0], n[1] = -n[1], n[2] = -n[2];
}

// n (3,3): n_i; sum: n_0 + n_1 + n_2 without its cancellation; false when the triangle is degenerate or seen edge-on.
struct Homogeneous {
  double v[3][3], n[3][3], sum[3], det;
  bool set(const float* cam, const int64_t* f) {
    for (int i = 0; i < 3; ++i)
      for (int k = 0; k < 3; ++k) v[i][k] = cam[3 * f[i] + k];
    double e1[3], e2[3];
    for (int k = 0; k < 3; ++k) e1[k] = v[1][k] - v[0][k], e2[k] = v[2][k] - v[0][k];
    cross(e1, e2, sum);
    det = dot(sum, v[0]);
    if (!(__builtin_fabs(det) > 1e-14 * abs1(v[0]) * abs1(e1) * abs1(e2))) return false;
    for (int i = 0; i < 3; ++i) {
      const int j = (i + 1) % 3, k = (i + 2) % 3;
      edge_normal(f[j], f[k], v[j], v[k], n[i]);
    }
    return true;
  }
};

}  // namespace mesh
}  // namespace hh
