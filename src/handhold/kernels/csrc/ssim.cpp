// C ABI of SSIM: value and gradient with respect to the first image. The arithmetic is in ssim_isa.h.
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "pool.h"

using namespace hh;

// x, y: (C,H,W). mean: the mean SSIM. v_x: its gradient. Returns 1 when memory runs out.
HH_API int hh_ssim(const float* x, const float* y, int C, int H, int W, double* mean, float* v_x, int threads) try {
  float taps[11], total = 0;
  for (int i = 0; i < 11; ++i) total += taps[i] = std::exp(-(i - 5) * (i - 5) / 4.5f);
  for (float& t : taps) t /= total;
  constexpr int kBand = 16;  // rows per chunk
  const int64_t n = static_cast<int64_t>(H) * W;
  const int bands = (H + kBand - 1) / kBand;
  const float scale = static_cast<float>(1.0 / (static_cast<double>(n) * C));
  const std::unique_ptr<float[]> buffer(new float[10 * n]);  // five moments, and five intermediate planes
  float *blurred[5], *half[5];
  for (int i = 0; i < 5; ++i) blurred[i] = &buffer[i * n], half[i] = &buffer[(5 + i) * n];
  std::vector<double> sums(bands);
  // All scratch is made here: nothing may throw inside `parallel`.
  const int64_t pitch = W + 10;
  std::vector<float> row_store(bands * pitch);
  const auto rows = [&](int64_t band, int& y0, int& y1) { y0 = static_cast<int>(band) * kBand, y1 = y0 + kBand < H ? y0 + kBand : H; };
  double sum = 0;
  for (int c = 0; c < C; ++c) {
    const float *px = x + c * n, *py = y + c * n;
    float* vx = v_x + c * n;
    parallel(bands, threads, [&](int64_t band) {
      float* row = &row_store[band * pitch];
      int y0, y1;
      rows(band, y0, y1);
      for (int m = 0; m < 5; ++m) {
        const float *a = m == 1 || m == 3 ? py : px, *b = m == 2 ? px : py;
        if (m > 1) {
          const int64_t first = static_cast<int64_t>(y0) * W;
          float* product = blurred[0] + first;  // written only in the next pass
          for (int64_t i = 0; i < static_cast<int64_t>(y1 - y0) * W; ++i) product[i] = a[first + i] * b[first + i];
          kernels().blur11(product, W, H, 0, y1 - y0, taps, row, half[m] + first, 1);
        } else {
          kernels().blur11(a, W, H, y0, y1, taps, row, half[m], 1);
        }
      }
    });
    parallel(bands, threads, [&](int64_t band) {
      float* row = &row_store[band * pitch];
      int y0, y1;
      rows(band, y0, y1);
      for (int m = 0; m < 5; ++m) kernels().blur11(half[m], W, H, y0, y1, taps, row, blurred[m], 0);
    });
    parallel(bands, threads, [&](int64_t band) {
      float* row = &row_store[band * pitch];
      int y0, y1;
      rows(band, y0, y1);
      // a band reads and overwrites only its own rows
      kernels().ssim_map(blurred, static_cast<int64_t>(y0) * W, static_cast<int64_t>(y1) * W, scale, half[0], half[1], half[2], &sums[band]);
      for (int m = 0; m < 3; ++m) kernels().blur11(half[m], W, H, y0, y1, taps, row, blurred[m], 1);
    });
    parallel(bands, threads, [&](int64_t band) {
      float* row = &row_store[band * pitch];
      int y0, y1;
      rows(band, y0, y1);
      for (int m = 0; m < 3; ++m) kernels().blur11(blurred[m], W, H, y0, y1, taps, row, half[m], 0);
      for (int64_t i = static_cast<int64_t>(y0) * W; i < static_cast<int64_t>(y1) * W; ++i) vx[i] = half[0][i] + 2 * px[i] * half[1][i] + py[i] * half[2][i];
    });
    for (double s : sums) sum += s;
  }
  *mean = sum / (static_cast<double>(n) * C);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
