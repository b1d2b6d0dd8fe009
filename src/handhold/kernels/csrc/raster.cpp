// C ABI of the triangle rasteriser: set-up, bands of rows, threads, gradients.
#include "raster.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "pool.h"

using namespace hh;
using namespace hh::mesh;

namespace {

constexpr int kBand = 16, kChunks = 4;
constexpr int64_t kGrain = 1024;
constexpr float kShortest = 1e-12f;  // as torch.nn.functional.normalize

Camera camera(const float* K, int W, int H) {
  Camera c = {K[0], K[4], K[2], K[5], 0};
  c.reach = 1 + std::max(std::fabs(c.ray_x(0)), std::fabs(c.ray_x(W))) + std::max(std::fabs(c.ray_y(0)), std::fabs(c.ray_y(H)));
  return c;
}

// First pixel whose centre is at or after x; NaN and whatever is outside go to the ends.
int first_pixel(double x, int n) {
  x = std::ceil(x - 0.5);
  return x > 0 ? (x < n ? static_cast<int>(x) : n) : 0;
}

// Pixels around the part of the triangle that is at least `near` away.
void bound(const double v[3][3], const Camera& c, double near, int W, int H, MeshFace& f) {
  double lo[2] = {INFINITY, INFINITY}, hi[2] = {-INFINITY, -INFINITY};
  auto add = [&](double x, double y, double z) {
    const double p[2] = {c.fx * x / z + c.cx, c.fy * y / z + c.cy};
    for (int k = 0; k < 2; ++k) lo[k] = std::min(lo[k], p[k]), hi[k] = std::max(hi[k], p[k]);
  };
  for (int i = 0; i < 3; ++i) {
    const double *a = v[i], *b = v[(i + 1) % 3];
    if (a[2] >= near) add(a[0], a[1], a[2]);
    if ((a[2] >= near) != (b[2] >= near)) {
      const double s = (near - a[2]) / (b[2] - a[2]);
      add(a[0] + s * (b[0] - a[0]), a[1] + s * (b[1] - a[1]), near);
    }
  }
  constexpr double kSlack = 1e-3;  // pixels; the edge functions decide
  f.x0 = first_pixel(lo[0] - kSlack, W), f.x1 = first_pixel(hi[0] + kSlack, W);
  f.y0 = first_pixel(lo[1] - kSlack, H), f.y1 = first_pixel(hi[1] + kSlack, H);
}

bool set_up(const float* cam, const int64_t* index, const Camera& c, double near, int W, int H, MeshFace& f) {
  Homogeneous h;
  f.x0 = f.x1 = f.y0 = f.y1 = 0;
  if (cam[3 * index[0] + 2] < near && cam[3 * index[1] + 2] < near && cam[3 * index[2] + 2] < near) return false;
  if (!h.set(cam, index)) return false;
  bound(h.v, c, near, W, H, f);
  if (f.x0 >= f.x1 || f.y0 >= f.y1) {
    f.x0 = f.x1 = f.y0 = f.y1 = 0;
    return false;
  }
  const double side = h.det > 0 ? 1 : -1;
  double norm[3];
  for (int i = 0; i < 3; ++i) norm[i] = abs1(h.v[i]);
  for (int i = 0; i < 3; ++i) {
    const double* n = h.n[i];
    f.a[i] = side * n[0] / c.fx, f.b[i] = side * n[1] / c.fy;
    f.c[i] = side * (n[2] - n[0] / c.fx * c.cx - n[1] / c.fy * c.cy);
    // Within rounding error of the edge, the pixel belongs to the side that holds its centre moved by (+e, +e^2).
    const double tolerance = 4e-15 * norm[(i + 1) % 3] * norm[(i + 2) % 3] * c.reach;
    const bool mine = f.a[i] > 0 || (f.a[i] == 0 && f.b[i] > 0);
    f.threshold[i] = mine ? -tolerance : tolerance;
  }
  f.z[0] = h.sum[0] / c.fx / h.det, f.z[1] = h.sum[1] / c.fy / h.det;
  f.z[2] = (h.sum[2] - h.sum[0] / c.fx * c.cx - h.sum[1] / c.fy * c.cy) / h.det;
  return true;
}

// Per-chunk sums of per-vertex gradients: fixed chunks, added in order, so that threads do not matter.
struct Sums {
  int64_t n;
  std::vector<double> parts;
  explicit Sums(int64_t n) : n(n), parts(static_cast<size_t>(n) * kChunks) {}
  double* part(int64_t c) { return parts.data() + c * n; }
  void write(float* out) const {
    for (int64_t i = 0; i < n; ++i) {
      double s = 0;
      for (int c = 0; c < kChunks; ++c) s += parts[c * n + i];
      out[i] = static_cast<float>(s);
    }
  }
};

}  // namespace

// cam (V,3) camera frame; faces (T,3) indices within V; K 3x3 row-major. face (H,W), -1 where there is none; bary (H,W,3)
// and depth (H,W), 0 there. 1 when memory runs out.
HH_API int hh_mesh_raster(int64_t T, int W, int H, const float* cam, const int64_t* faces, const float* K, float near, int64_t* face, float* bary,
                          float* depth, int threads) try {
  const Camera c = camera(K, W, H);
  const std::unique_ptr<MeshFace[]> set(new MeshFace[T + 1]);
  parallel_ranges(T, kGrain, threads, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) set_up(cam, faces + 3 * i, c, near, W, H, set[i]);
  });
  const int bands = (H + kBand - 1) / kBand, stride = (W + 3) & ~3;
  std::vector<int64_t> start(bands + 1);
  for (int64_t i = 0; i < T; ++i)
    if (set[i].y1 > set[i].y0)
      for (int k = set[i].y0 / kBand; k <= (set[i].y1 - 1) / kBand; ++k) start[k + 1]++;
  for (int k = 0; k < bands; ++k) start[k + 1] += start[k];
  const std::unique_ptr<int32_t[]> order(new int32_t[start[bands] + 1]);
  std::vector<int64_t> at(start.begin(), start.end() - 1);
  for (int64_t i = 0; i < T; ++i)
    if (set[i].y1 > set[i].y0)
      for (int k = set[i].y0 / kBand; k <= (set[i].y1 - 1) / kBand; ++k) order[at[k]++] = static_cast<int32_t>(i);
  // One depth buffer for the whole image rather than per thread: no allocation can then fail inside a worker.
  struct alignas(32) Quad {
    int64_t x[4];
  };
  const size_t quads = static_cast<size_t>(bands) * kBand * stride / 4;
  const std::unique_ptr<Quad[]> z_store(new Quad[quads]), f_store(new Quad[quads]);
  parallel(bands, threads, [&](int64_t k) {
    const int y0 = static_cast<int>(k) * kBand, y1 = std::min(H, y0 + kBand);
    double* z = reinterpret_cast<double*>(z_store.get()) + static_cast<int64_t>(y0) * stride;
    int64_t* f = reinterpret_cast<int64_t*>(f_store.get()) + static_cast<int64_t>(y0) * stride;
    std::memset(z, 0, sizeof(double) * stride * (y1 - y0));
    std::memset(f, 0xff, sizeof(int64_t) * stride * (y1 - y0));
    kernels().mesh_band(set.get(), order.get(), start[k], start[k + 1], y0, y1, stride, 1.0 / near, z, f);
    for (int y = y0; y < y1; ++y)
      for (int x = 0; x < W; ++x) {
        const int64_t p = static_cast<int64_t>(y) * W + x, q = static_cast<int64_t>(y - y0) * stride + x, t = f[q];
        face[p] = t;
        float* w = bary + 3 * p;
        if (t < 0) {
          w[0] = w[1] = w[2] = depth[p] = 0;
          continue;
        }
        const MeshFace& g = set[t];
        double e[3];
        for (int i = 0; i < 3; ++i) e[i] = g.a[i] * (x + 0.5) + (g.b[i] * (y + 0.5) + g.c[i]);
        const double r = 1 / (e[0] + e[1] + e[2]);
        for (int i = 0; i < 3; ++i) w[i] = static_cast<float>(e[i] * r);
        depth[p] = static_cast<float>(1 / z[q]);
      }
  });
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// face: of the forward call. v_bary (H,W,3), v_depth (H,W): either may be null. v_cam (V,3), v_K: fx fy cx cy.
// M = [v0 v1 v2], u = M^-1 d, 1/z = sum u, b = z u; so with h = dL/du: dL/dd = M^-T h =: w and dL/dv_i = -u_i w.
HH_API int hh_mesh_raster_backward(int64_t V, int W, int H, const float* cam, const int64_t* faces, const float* K, const int64_t* face,
                                   const float* v_bary, const float* v_depth, float* v_cam, float* v_K, int threads) try {
  const Camera c = camera(K, W, H);
  Sums vertex(3 * V), intrinsic(4);
  parallel(kChunks, threads, [&](int64_t chunk) {
    double *gv = vertex.part(chunk), *gk = intrinsic.part(chunk);
    Homogeneous g;
    int64_t have = -1;
    const int64_t row1 = H * (chunk + 1) / kChunks;
    for (int64_t y = H * chunk / kChunks; y < row1; ++y)
      for (int64_t x = 0; x < W; ++x) {
        const int64_t p = y * W + x, t = face[p];
        if (t < 0) continue;
        if (t != have && !g.set(cam, faces + 3 * t)) continue;
        have = t;
        const double d[3] = {c.ray_x(x + 0.5), c.ray_y(y + 0.5), 1}, scale = 1 / g.det, z = 1 / (dot(g.sum, d) * scale);
        double u[3], h[3], mean = 0;
        for (int i = 0; i < 3; ++i) u[i] = dot(g.n[i], d) * scale;
        if (v_bary)
          for (int i = 0; i < 3; ++i) mean += v_bary[3 * p + i] * u[i] * z;
        for (int i = 0; i < 3; ++i) {
          h[i] = v_bary ? z * (v_bary[3 * p + i] - mean) : 0;
          if (v_depth) h[i] -= z * z * v_depth[p];
        }
        double w[3];
        for (int k = 0; k < 3; ++k) w[k] = (h[0] * g.n[0][k] + h[1] * g.n[1][k] + h[2] * g.n[2][k]) * scale;
        for (int i = 0; i < 3; ++i)
          for (int k = 0; k < 3; ++k) gv[3 * faces[3 * t + i] + k] -= u[i] * w[k];
        gk[0] -= w[0] * d[0] / c.fx, gk[1] -= w[1] * d[1] / c.fy;
        gk[2] -= w[0] / c.fx, gk[3] -= w[1] / c.fy;
      }
  });
  vertex.write(v_cam), intrinsic.write(v_K);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// out (n,A) = sum of bary (n,3) times values (V,A) at the corners of face (n), of unit length when `unit`; 0 where face is -1.
HH_API void hh_mesh_interpolate(int64_t n, int A, int unit, const float* values, const int64_t* faces, const int64_t* face, const float* bary,
                                float* out, int threads) {
  parallel_ranges(n, 8192, threads, [&](int64_t b, int64_t e) {
    for (int64_t p = b; p < e; ++p) {
      float* o = out + p * A;
      if (face[p] < 0) {
        for (int k = 0; k < A; ++k) o[k] = 0;
        continue;
      }
      const int64_t* f = faces + 3 * face[p];
      const float *w = bary + 3 * p, *x0 = values + f[0] * A, *x1 = values + f[1] * A, *x2 = values + f[2] * A;
      float square = 0;
      for (int k = 0; k < A; ++k) o[k] = w[0] * x0[k] + w[1] * x1[k] + w[2] * x2[k], square += o[k] * o[k];
      if (!unit) continue;
      const float scale = 1 / std::max(std::sqrt(square), kShortest);
      for (int k = 0; k < A; ++k) o[k] *= scale;
    }
  });
}

// v_values (V,A) and v_bary (n,3): either may be null. out: of the forward call, for `unit`.
HH_API int hh_mesh_interpolate_backward(int64_t n, int64_t V, int A, int unit, const float* values, const int64_t* faces, const int64_t* face,
                                        const float* bary, const float* out, const float* v_out, float* v_values, float* v_bary, int threads) try {
  Sums sums(v_values ? V * A : 0);
  std::vector<float> store(static_cast<size_t>(A) * kChunks);
  parallel(kChunks, threads, [&](int64_t chunk) {
    double* g = sums.part(chunk);
    float* v = store.data() + A * chunk;
    for (int64_t p = n * chunk / kChunks; p < n * (chunk + 1) / kChunks; ++p) {
      if (face[p] < 0) {
        if (v_bary) v_bary[3 * p] = v_bary[3 * p + 1] = v_bary[3 * p + 2] = 0;
        continue;
      }
      const int64_t* f = faces + 3 * face[p];
      const float *w = bary + 3 * p, *x[3] = {values + f[0] * A, values + f[1] * A, values + f[2] * A};
      for (int k = 0; k < A; ++k) v[k] = v_out[p * A + k];
      if (unit) {  // d(r/|r|) = (dr - o (o.dr)) / |r|
        float square = 0, along = 0;
        for (int k = 0; k < A; ++k) {
          const float r = w[0] * x[0][k] + w[1] * x[1][k] + w[2] * x[2][k];
          square += r * r, along += out[p * A + k] * v[k];
        }
        const float length = std::sqrt(square), scale = 1 / std::max(length, kShortest);
        if (!(length > kShortest)) along = 0;
        for (int k = 0; k < A; ++k) v[k] = (v[k] - out[p * A + k] * along) * scale;
      }
      for (int i = 0; i < 3; ++i) {
        if (v_bary) {
          float s = 0;
          for (int k = 0; k < A; ++k) s += v[k] * x[i][k];
          v_bary[3 * p + i] = s;
        }
        if (v_values)
          for (int k = 0; k < A; ++k) g[f[i] * A + k] += w[i] * v[k];
      }
    }
  });
  if (v_values) sums.write(v_values);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
