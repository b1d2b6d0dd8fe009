// SSIM with an 11-tap Gaussian window and zero padding (Wang et al., 2004). `ssim_map` is plain loops that the compiler vectorises.
#pragma once

namespace hh {
namespace {

typedef float vfu __attribute__((vector_size(HH_LANES * 4), aligned(4)));
HH_INLINE vf loadu(const float* p) { return (vf)(*(const vfu*)p); }

// o[x] = sum over k of taps[k] p[k][x], taps symmetric. By hand: compilers do not vectorise over eleven pointers well.
HH_INLINE void taps11(const float* const* p, int W, const float* taps, float* o) {
  const vf t0 = all(taps[0]), t1 = all(taps[1]), t2 = all(taps[2]), t3 = all(taps[3]), t4 = all(taps[4]), t5 = all(taps[5]);
  int x = 0;
  for (; x + HH_LANES <= W; x += HH_LANES) {
    vf a = t5 * loadu(p[5] + x) + t4 * (loadu(p[4] + x) + loadu(p[6] + x));
    vf b = t3 * (loadu(p[3] + x) + loadu(p[7] + x)) + t2 * (loadu(p[2] + x) + loadu(p[8] + x));
    a += t1 * (loadu(p[1] + x) + loadu(p[9] + x));
    b += t0 * (loadu(p[0] + x) + loadu(p[10] + x));
    *(vfu*)(o + x) = (vfu)(a + b);
  }
  for (; x < W; ++x) {
    float s = taps[5] * p[5][x];
    for (int k = 0; k < 5; ++k) s += taps[k] * (p[k][x] + p[10 - k][x]);
    o[x] = s;
  }
}

// One 11-tap pass over rows y0..y1 of an (H,W) plane. axis 1: along x, with `row` (W+10 floats) as padded scratch. axis 0: along y.
void blur11(const float* in, int W, int H, int y0, int y1, const float* taps, float* row, float* out, int axis) {
  const float* p[11];
  for (int x = 0; x < W + 10; ++x) row[x] = 0;  // zeros beside the row, and in place of rows outside the image
  for (int y = y0; y < y1; ++y) {
    if (axis == 1) __builtin_memcpy(row + 5, in + (int64_t)y * W, W * sizeof(float));
    for (int k = 0; k < 11; ++k) {
      const bool inside = y + k - 5 >= 0 && y + k - 5 < H;
      p[k] = axis == 1 ? row + k : inside ? in + (int64_t)(y + k - 5) * W : row;
    }
    taps11(p, W, taps, out + (int64_t)y * W);
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
