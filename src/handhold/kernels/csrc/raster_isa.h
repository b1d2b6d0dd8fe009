// Depth test of a band of rows. Included by isa.cpp only.
#pragma once

namespace hh {
namespace {

typedef double vd __attribute__((vector_size(32)));
typedef int64_t vl __attribute__((vector_size(32)));

HH_INLINE bool any4(vl m) {
#if defined(__AVX__)
  return _mm256_movemask_pd((__m256d)m) != 0;
#else
  return (m[0] | m[1] | m[2] | m[3]) != 0;
#endif
}

// Nearest face of each pixel of rows [y0,y1): inv_z and face, (rows, stride) with stride a multiple of 4, set by the
// caller to 0 and -1. Of equal depths the lower face index wins, since faces come in ascending order.
void mesh_band(const MeshFace* faces, const int32_t* order, int64_t b, int64_t e, int y0, int y1, int stride, double inv_near, double* inv_z,
               int64_t* face) {
  const vd step = {0.5, 1.5, 2.5, 3.5};
  for (int64_t i = b; i < e; ++i) {
    const MeshFace& f = faces[order[i]];
    const vl id = vl{} + order[i];
    const int r0 = maxi(f.y0, y0), r1 = mini(f.y1, y1), c0 = f.x0 & ~3;
    for (int y = r0; y < r1; ++y) {
      const double py = y + 0.5;
      const double s0 = f.b[0] * py + f.c[0], s1 = f.b[1] * py + f.c[1], s2 = f.b[2] * py + f.c[2], sz = f.z[1] * py + f.z[2];
      double* zr = inv_z + (int64_t)(y - y0) * stride;
      int64_t* fr = face + (int64_t)(y - y0) * stride;
      for (int x = c0; x < f.x1; x += 4) {
        const vd px = step + (double)x;
        vl in = (f.a[0] * px + s0 > f.threshold[0]) & (f.a[1] * px + s1 > f.threshold[1]) & (f.a[2] * px + s2 > f.threshold[2]);
        if (!any4(in)) continue;
        const vd z = f.z[0] * px + sz, old = *(vd*)(zr + x);
        in &= (z > old) & (z <= inv_near);
        *(vd*)(zr + x) = in ? z : old;
        *(vl*)(fr + x) = in ? id : *(vl*)(fr + x);
      }
    }
  }
}

}  // namespace
}  // namespace hh
