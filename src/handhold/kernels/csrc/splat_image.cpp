// What lies around the splatting rasteriser: are the inputs finite, and images over a background. One pass each, on our own threads:
// as a dozen array operations of torch's this cost more than a quarter of a render, and did not shrink with a second thread.
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "isa.h"
#include "pool.h"

using namespace hh;

namespace {

constexpr int64_t kGrain = 8192;
constexpr float kLeastAlpha = 1e-10f;  // depth is divided by no less

}  // namespace

// 1 when no value of the `count` arrays of sizes[i] floats is NaN or infinite; 0 when one is, or when there is no memory to tell.
HH_API int hh_all_finite(int count, const float* const* arrays, const int64_t* sizes, int threads) try {
  std::vector<int64_t> first(count + 1, 0);  // first chunk of each array
  for (int i = 0; i < count; ++i) first[i + 1] = first[i] + (sizes[i] + kGrain - 1) / kGrain;
  std::vector<uint8_t> bad(first[count], 0);
  parallel(first[count], threads, [&](int64_t c) {
    int i = 0;
    while (c >= first[i + 1]) ++i;
    const int64_t b = (c - first[i]) * kGrain, e = b + kGrain < sizes[i] ? b + kGrain : sizes[i];
    uint32_t any = 0;
    for (int64_t j = b; j < e; ++j) {
      uint32_t bits;
      std::memcpy(&bits, arrays[i] + j, 4);
      any |= (bits & 0x7f800000u) == 0x7f800000u;
    }
    bad[c] = any != 0;
  });
  for (uint8_t b : bad)
    if (b) return 0;
  return 1;
} catch (const std::bad_alloc&) {
  return 0;
}

// Of `cameras` images of n pixels, out (cameras,n,C) and alpha (cameras,n) as the rasteriser leaves them; backgrounds (cameras,3) or
// null: color (cameras,n,3) over the background, opacity = alpha, depth = out[3] / alpha, rest (cameras,n,C-4).
HH_API void hh_splat_image(int64_t cameras, int64_t n, int C, const float* out, const float* alpha, const float* backgrounds, float* color,
                           float* opacity, float* depth, float* rest, int threads) {
  parallel_ranges(cameras * n, kGrain, threads, [&](int64_t b, int64_t e) {
    for (int64_t p = b; p < e; ++p) {
      const float *o = out + p * C, a = alpha[p];
      const float* back = backgrounds ? backgrounds + 3 * (p / n) : nullptr;
      for (int k = 0; k < 3; ++k) color[3 * p + k] = back ? o[k] + (1 - a) * back[k] : o[k];
      opacity[p] = a, depth[p] = o[3] / (a > kLeastAlpha ? a : kLeastAlpha);
      for (int k = 4; k < C; ++k) rest[p * (C - 4) + k - 4] = o[k];
    }
  });
}

// Gradients v_out and v_alpha from those of the four images, each of which may be null; v_backgrounds (cameras,3) may be null.
// Returns 1 when memory runs out.
HH_API int hh_splat_image_backward(int64_t cameras, int64_t n, int C, const float* out, const float* alpha, const float* backgrounds,
                                    const float* v_color, const float* v_opacity, const float* v_depth, const float* v_rest, float* v_out,
                                    float* v_alpha, float* v_backgrounds, int threads) try {
  const int64_t ranges = (n + kGrain - 1) / kGrain;
  std::vector<double> sums(v_backgrounds ? 3 * cameras * ranges : 0);
  parallel(cameras * ranges, threads, [&](int64_t c) {
    const int64_t camera = c / ranges, b = camera * n + c % ranges * kGrain, last = (camera + 1) * n, e = b + kGrain < last ? b + kGrain : last;
    const float zero[3] = {0, 0, 0}, *back = backgrounds ? backgrounds + 3 * camera : zero;
    double sum[3] = {0, 0, 0};
    for (int64_t p = b; p < e; ++p) {
      const float *v = v_color ? v_color + 3 * p : zero, a = alpha[p], inv = 1 / (a > kLeastAlpha ? a : kLeastAlpha);
      float *to = v_out + p * C, va = v_opacity ? v_opacity[p] : 0, vz = 0;
      for (int k = 0; k < 3; ++k) to[k] = v[k], va -= v[k] * back[k];
      if (v_depth) {
        vz = v_depth[p] * inv;
        if (a >= kLeastAlpha) va -= vz * (out[p * C + 3] * inv);
      }
      to[3] = vz, v_alpha[p] = va;
      for (int k = 4; k < C; ++k) to[k] = v_rest ? v_rest[p * (C - 4) + k - 4] : 0;
      if (v_backgrounds)
        for (int k = 0; k < 3; ++k) sum[k] += (1 - a) * v[k];
    }
    if (v_backgrounds)
      for (int k = 0; k < 3; ++k) sums[3 * c + k] = sum[k];
  });
  if (!v_backgrounds) return 0;
  for (int64_t camera = 0; camera < cameras; ++camera)
    for (int k = 0; k < 3; ++k) {
      double sum = 0;
      for (int64_t r = 0; r < ranges; ++r) sum += sums[3 * (camera * ranges + r) + k];
      v_backgrounds[3 * camera + k] = static_cast<float>(sum);
    }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
