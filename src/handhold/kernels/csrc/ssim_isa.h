// SSIM with an 11-tap Gaussian window and zero padding (Wang et al., 2004). Loops are plain: the compiler vectorises them.
#pragma once

namespace hh {
namespace {

// One 11-tap pass over rows y0..y1 of an (H,W) plane. axis 1: along x, with `row` (W+10 floats) as padded scratch. axis 0: along y.
void blur11(const float* in, int W, int H, int y0, int y1, const float* taps, float* row, float* out, int axis) {
  for (int y = y0; y < y1; ++y) {
    float* __restrict o = out + (int64_t)y * W;
    if (axis == 1) {
      const float* p = in + (int64_t)y * W;
      for (int k = 0; k < 5; ++k) row[k] = row[W + 5 + k] = 0;
      for (int x = 0; x < W; ++x) row[x + 5] = p[x];
      const float* __restrict r = row;
      for (int x = 0; x < W; ++x) {
        float s = taps[5] * r[x + 5];
        for (int k = 0; k < 5; ++k) s += taps[k] * (r[x + k] + r[x + 10 - k]);
        o[x] = s;
      }
      continue;
    }
    const float *p[11], *zero = row;  // rows outside the image read zeros
    for (int x = 0; x < W; ++x) row[x] = 0;
    for (int k = 0; k < 11; ++k) p[k] = y + k - 5 >= 0 && y + k - 5 < H ? in + (int64_t)(y + k - 5) * W : zero;
    for (int x = 0; x < W; ++x) {
      float s = taps[5] * p[5][x];
      for (int k = 0; k < 5; ++k) s += taps[k] * (p[k][x] + p[10 - k][x]);
      o[x] = s;
    }
  }
}

// moments: blurred x, y, x^2, y^2, x y. Writes scale * dS/d(blurred x, x^2, x y) and the sum of S.
void ssim_map(const float* const* moments, int64_t b, int64_t e, float scale, float* __restrict d_m1, float* __restrict d_e11,
              float* __restrict d_e12, double* sum) {
  const float *__restrict m1 = moments[0], *__restrict m2 = moments[1], *__restrict e11 = moments[2], *__restrict e22 = moments[3],
              *__restrict e12 = moments[4];
  const float c1 = 1e-4f, c2 = 9e-4f;
  double total = 0;
  for (int64_t i0 = b; i0 < e; i0 += 256) {  // short float sums, added up in double
    float part = 0;
    const int64_t i1 = i0 + 256 < e ? i0 + 256 : e;
    for (int64_t i = i0; i < i1; ++i) {
      const float p = m1[i], q = m2[i], A = 2 * p * q + c1, B = 2 * (e12[i] - p * q) + c2, C = p * p + q * q + c1;
      const float D = e11[i] - p * p + e22[i] - q * q + c2, r = 1.f / (C * D), v = A * B * r;
      part += v;
      d_e12[i] = 2 * A * r * scale;
      d_e11[i] = -v * (C * r) * scale;
      d_m1[i] = (2 * q * (B - A) * r - 2 * p * v * (D - C) * r) * scale;
    }
    total += part;
  }
  *sum = total;
}

}  // namespace
}  // namespace hh
