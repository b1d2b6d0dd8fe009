// C ABI of the grid ops: threads, memory and the order of sums. The arithmetic is in grid_isa.h, grid_update_isa.h and render_isa.h.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "pool.h"

using namespace hh;

namespace {

const float kOrigin[3] = {0, 0, 0};

GridView view(const float* data, int R, const float* lo, float h) { return {data, R, {lo[0], lo[1], lo[2]}, h}; }

// Deals grid planes to threads in contiguous slabs of about equal sample counts. Each thread first lists
// its own samples, a block at a time: to look at every one in the kernel and skip the others' costs what a second thread saves.
void scatter(const GridView& g, const float* x, int64_t n, const float* v_val, const float* v_grad, float* v_data, uint8_t* rows,
             int threads) {
  constexpr int64_t kBlock = 2048;
  const int parts = std::max(1, std::min(threads, g.R));
  if (parts == 1) return kernels().grid_scatter(g, x, nullptr, n, v_val, v_grad, 0, g.R, v_data, rows);
  const int64_t grain = std::max<int64_t>(4096, (n + 63) / 64), ranges = (n + grain - 1) / grain;
  std::unique_ptr<uint16_t[]> plane(new uint16_t[n]);
  std::vector<int32_t> count(ranges * g.R, 0);
  const float inv = 1.f / g.h, top = static_cast<float>(g.R - 2);
  parallel_ranges(n, grain, threads, [&](int64_t b, int64_t e) {
    int32_t* of = &count[b / grain * g.R];
    for (int64_t s = b; s < e; ++s) {
      const float p = (x[3 * s] - g.lo[0]) * inv;
      of[plane[s] = static_cast<uint16_t>(p > 0 ? (p < top ? p : top) : 0)]++;  // NaN goes to 0
    }
  });
  std::vector<int> cut(parts + 1, g.R);
  cut[0] = 0;
  int64_t seen = 0;
  for (int i = 0, k = 1; i < g.R && k < parts; ++i) {
    for (int64_t r = 0; r < ranges; ++r) seen += count[r * g.R + i];
    while (k < parts && seen * parts >= n * k) cut[k++] = i + 1;
  }
  parallel(parts, threads, [&](int64_t k) {
    // A sample adds to its plane and the next; one plane more on either side, as the kernel may round the other way.
    const int first = cut[k] - 2, width = cut[k + 1] + 1 - first;
    int32_t list[kBlock];
    for (int64_t b = 0; b < n; b += kBlock) {
      int m = 0;
      for (int64_t s = b; s < std::min(n, b + kBlock); ++s) {
        list[m] = static_cast<int32_t>(s - b);
        m += static_cast<unsigned>(plane[s] - first) < static_cast<unsigned>(width);
      }
      kernels().grid_scatter(g, x + 3 * b, list, m, v_val + 4 * b, v_grad ? v_grad + 3 * b : nullptr, cut[k], cut[k + 1], v_data, rows);
    }
  });
}

}  // namespace

HH_API void hh_grid_sample(int64_t n, const float* x, const float* data, int R, const float* lo, float h, float* val, float* grad, int threads) {
  const GridView g = view(data, R, lo, h);
  parallel_ranges(n, 2048, threads, [&](int64_t b, int64_t e) { kernels().grid_sample(g, x, b, e, val, grad); });
}

// Adds to v_data (R,R,R,4) and marks rows (R,R); writes v_x (n,3) when it is not null. v_grad may be null.
// Returns 1 when memory runs out, as all that return an int here.
HH_API int hh_grid_backward(int64_t n, const float* x, const float* data, int R, const float* lo, float h, const float* v_val, const float* v_grad,
                             float* v_data, uint8_t* rows, float* v_x, int threads) try {
  const GridView g = view(data, R, lo, h);
  if (v_data) scatter(g, x, n, v_val, v_grad, v_data, rows, threads);
  if (v_x) parallel_ranges(n, 2048, threads, [&](int64_t b, int64_t e) { kernels().grid_v_x(g, x, b, e, v_val, v_grad, v_x); });
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// field (R,R,R): channel 0 of the grid.
HH_API void hh_grid_march(int64_t n, const float* o, const float* d, const float* field, int R, const float* lo, float h, float min_step, float band,
                          float* t0, float* t1, float* phi_min, int threads) {
  const GridView g = view(nullptr, R, lo, h);
  parallel_ranges(n, 512, threads, [&](int64_t b, int64_t e) { kernels().grid_march(g, field, o, d, b, e, min_step, band, t0, t1, phi_min); });
}

// Adds the weighted gradient to v_data channel 0; loss receives the two unweighted means. tmp: 5 R^3 floats.
HH_API int hh_grid_reg(const float* data, int R, const float* lo, float h, float w_eik, float w_lap, float band, float* v_data, float* tmp, double* loss,
                       int threads) try {
  const GridView g = view(data, R, lo, h);
  std::vector<double> sums(3 * R);
  std::vector<float> rows(static_cast<size_t>(R) * R);
  float *flux = tmp, *f = tmp + 4 * static_cast<int64_t>(R) * R * R;
  parallel(R, threads, [&](int64_t i) { kernels().grid_extract(g, static_cast<int>(i), f); });
  parallel(R, threads, [&](int64_t i) { kernels().grid_reg_flux(R, static_cast<int>(i), f, h, w_eik, w_lap, band, flux, &sums[3 * i]); });
  double total[3] = {0, 0, 0};
  for (int i = 0; i < 3 * R; ++i) total[i % 3] += sums[i];
  const double inv = 1.0 / std::max(1.0, total[2]);
  parallel(R, threads, [&](int64_t i) { kernels().grid_reg_gather(R, static_cast<int>(i), static_cast<float>(inv), flux, &rows[R * i], v_data); });
  loss[0] = total[0] * inv;
  loss[1] = total[1] * inv;
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// tmp: 2 R^3 floats.
HH_API void hh_grid_blur(float* v_data, int R, float* tmp, int iterations, int threads) {
  float *a = tmp, *b = tmp + static_cast<int64_t>(R) * R * R;
  for (int it = 0; it < iterations; ++it) {
    parallel(R, threads, [&](int64_t i) { kernels().grid_blur_plane(R, static_cast<int>(i), it == 0 ? v_data : nullptr, a, b); });
    parallel(R, threads, [&](int64_t i) { kernels().grid_blur_across(R, static_cast<int>(i), a, b, it == iterations - 1 ? v_data : nullptr); });
    std::swap(a, b);
  }
}

HH_API void hh_grid_extract(const float* data, int R, float* field, int threads) {
  const GridView g = view(data, R, kOrigin, 1);
  parallel(R, threads, [&](int64_t i) { kernels().grid_extract(g, static_cast<int>(i), field); });
}

// Regularisers, blur and Adam at once; see GridUpdate. tmp: 2 R^3 floats; loss: the two unweighted means.
HH_API int hh_grid_update(float* data, int R, float h, float w_eik, float w_lap, float band, int blur, float* v_data, uint8_t* rows, float* m, float* v,
                           int32_t* ever, float* field, int refresh, float lr_sdf, float lr_color, float b1, float b2, int step, float rel_eps,
                           float* tmp, double* rms, double* loss, int threads) try {
  const int64_t plane = static_cast<int64_t>(R) * R, size = plane * R;
  GridUpdate u{};
  u.R = R, u.blur = blur, u.h = h, u.w_eik = w_eik, u.w_lap = w_lap, u.band = band;
  u.lr_sdf = lr_sdf, u.lr_color = lr_color, u.b1 = b1, u.b2 = b2;
  u.c1 = static_cast<float>(1.0 / (1.0 - std::pow(static_cast<double>(b1), step)));
  u.c2 = static_cast<float>(1.0 / (1.0 - std::pow(static_cast<double>(b2), step)));
  u.data = data, u.v_data = v_data, u.m = m, u.v = v, u.f = field, u.a = tmp, u.rms = rms, u.refresh = refresh, u.rows = rows;
  u.ever = reinterpret_cast<Span*>(ever);
  std::vector<Span> spans(4 * plane);
  u.band_span = spans.data(), u.v_span = u.band_span + plane, u.a_span = u.v_span + plane;
  std::vector<double> sums(3 * R);
  u.sums = sums.data();
  // Slabs do part of their neighbours' work again, so there are no more than the threads need; a voxel's sum is the same in any.
  const int slabs = threads <= 1 ? 1 : std::max(1, std::min(2 * threads, R / 8));
  std::vector<float> work(14 * plane * slabs);
  std::vector<Span> work_span(static_cast<size_t>(4) * R * slabs);
  parallel(R, threads, [&](int64_t i) { kernels().grid_scan(u, static_cast<int>(i)); });
  double total[3] = {0, 0, 0};
  for (int i = 0; i < R; ++i) total[2] += sums[3 * i + 2];
  const double inv = 1.0 / std::max(1.0, total[2]);
  u.scale = static_cast<float>(inv);
  parallel(slabs, threads, [&](int64_t k) {
    kernels().grid_slab(u, static_cast<int>(k * R / slabs), static_cast<int>((k + 1) * R / slabs), &work[14 * plane * k], &work_span[4 * R * k]);
  });
  for (int i = 0; i < R; ++i) total[0] += sums[3 * i], total[1] += sums[3 * i + 1];
  float *from = u.a, *to = tmp + size;
  Span *from_span = u.a_span, *to_span = from_span + plane;
  for (int it = 1; it < blur; ++it) {
    parallel(slabs, threads, [&](int64_t k) {
      for (int64_t i = k * R / slabs; i < (k + 1) * R / slabs; ++i)
        kernels().grid_blur_next(u, static_cast<int>(i), from, from_span, to, to_span, &work[14 * plane * k], &work_span[4 * R * k]);
    });
    std::swap(from, to), std::swap(from_span, to_span);
  }
  double sum = 0, count = 0;
  for (int i = 0; i < R; ++i) sum += rms[2 * i], count += rms[2 * i + 1];
  u.eps = rel_eps * static_cast<float>(std::sqrt(std::max(0.0, sum) / std::max(1.0, count) * u.c2)) + 1e-20f;
  parallel(slabs, threads, [&](int64_t k) {
    for (int64_t i = k * R / slabs; i < (k + 1) * R / slabs; ++i) kernels().grid_step(u, static_cast<int>(i), from, from_span, &work[14 * plane * k]);
  });
  loss[0] = total[0] * inv;
  loss[1] = total[1] * inv;
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

HH_API void hh_render_forward(int64_t n, int S, const float* o, const float* d, const float* t, const float* data, int R, const float* lo, float h, float beta,
                              float* rgb, float* acc, float* depth, float* seen, int threads) {
  RenderArgs a{};
  a.grid = view(data, R, lo, h), a.S = S, a.beta = beta, a.o = o, a.d = d, a.t = t, a.rgb = rgb, a.acc = acc, a.depth = depth, a.seen = seen;
  parallel_ranges(n, 64, threads, [&](int64_t b, int64_t e) { kernels().render_forward(a, b, e); });
}

// Adds to v_data; v_o, v_d (n,3) and v_beta (n) may be null; seen: as the forward left it. scratch: 7 n S floats.
HH_API int hh_render_backward(int64_t n, int S, const float* o, const float* d, const float* t, const float* data, int R, const float* lo, float h,
                               float beta, float* seen, const float* v_rgb, const float* v_acc, const float* v_depth, float* v_data, uint8_t* rows,
                               float* v_o, float* v_d, float* v_beta, float* scratch, int threads) try {
  RenderArgs a{};
  a.grid = view(data, R, lo, h), a.S = S, a.beta = beta, a.o = o, a.d = d, a.t = t, a.seen = seen, a.v_rgb = v_rgb, a.v_acc = v_acc, a.v_depth = v_depth;
  a.v_val = scratch, a.x = scratch + 4 * n * S, a.v_o = v_o, a.v_d = v_d, a.v_beta = v_beta;
  parallel_ranges(n, 64, threads, [&](int64_t b, int64_t e) { kernels().render_backward(a, b, e); });
  scatter(a.grid, a.x, n * S, a.v_val, nullptr, v_data, rows, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
