// Vectors of HH_LANES floats through GCC/Clang vector extensions. Included by isa.cpp only.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define HH_METHOD inline __attribute__((always_inline))
#define HH_INLINE static HH_METHOD

namespace hh {
namespace {

typedef float vf __attribute__((vector_size(HH_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(HH_LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(HH_LANES * 4)));
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t v4i __attribute__((vector_size(16)));
typedef float v4u __attribute__((vector_size(16), aligned(4)));

HH_INLINE v4 load4(const float* p) { return (v4)(*(const v4u*)p); }
HH_INLINE void store4(float* p, v4 v) { *(v4u*)p = (v4u)v; }
HH_INLINE vf all(float x) { return vf{} + x; }
HH_INLINE float minf(float a, float b) { return a < b ? a : b; }
HH_INLINE float maxf(float a, float b) { return a > b ? a : b; }
HH_INLINE float absf(float a) { return __builtin_fabsf(a); }
HH_INLINE int mini(int a, int b) { return a < b ? a : b; }
HH_INLINE int maxi(int a, int b) { return a > b ? a : b; }
// NaN goes to lo, so the result may always index an array.
HH_INLINE float clampf(float x, float lo, float hi) { return x > lo ? (x < hi ? x : hi) : lo; }

// One bit per lane of a mask whose lanes are 0 or -1.
HH_INLINE unsigned bits(vi m) {
#if HH_LANES == 8 && defined(__AVX__)
  return (unsigned)_mm256_movemask_ps((__m256)m);
#elif HH_LANES == 4 && defined(__SSE2__)
  return (unsigned)_mm_movemask_ps((__m128)m);
#elif HH_LANES == 4 && defined(__aarch64__)
  return vaddvq_u32((uint32x4_t)(m & vi{1, 2, 4, 8}));
#else
  unsigned r = 0;
  for (int i = 0; i < HH_LANES; ++i) r |= (unsigned)(m[i] & 1) << i;
  return r;
#endif
}
HH_INLINE bool any(vi m) { return bits(m) != 0; }

HH_INLINE vf minv(vf a, vf b) { return a < b ? a : b; }
HH_INLINE vf maxv(vf a, vf b) { return a > b ? a : b; }
HH_INLINE vf sqrtv(vf v) {
#if HH_LANES == 8 && defined(__AVX__)
  return (vf)_mm256_sqrt_ps((__m256)v);
#elif HH_LANES == 4 && defined(__SSE2__)
  return (vf)_mm_sqrt_ps((__m128)v);
#elif HH_LANES == 4 && defined(__aarch64__)
  return (vf)vsqrtq_f32((float32x4_t)v);
#else
  for (int i = 0; i < HH_LANES; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

HH_INLINE float sum(vf v) {
#if HH_LANES == 8 && defined(__AVX__)
  __m128 a = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
#elif HH_LANES == 4 && defined(__SSE2__)
  __m128 a = (__m128)v;
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
#else
  float r = 0;
  for (int i = 0; i < HH_LANES; ++i) r += v[i];
  return r;
#endif
}

// out[i] = sum(v[i]) for eight vectors at once: a tree over all of them takes a quarter of the work of eight sums.
HH_INLINE void sum8(const vf* v, float* out) {
#if HH_LANES == 8 && defined(__AVX__)
  const __m256* m = (const __m256*)v;
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(m[0], m[1]), _mm256_hadd_ps(m[2], m[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(m[4], m[5]), _mm256_hadd_ps(m[6], m[7]));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
#elif HH_LANES == 4 && defined(__SSE2__)
  for (int i = 0; i < 8; i += 4) {
    __m128 a = (__m128)v[i], b = (__m128)v[i + 1], c = (__m128)v[i + 2], d = (__m128)v[i + 3];
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(out + i, _mm_add_ps(_mm_add_ps(a, b), _mm_add_ps(c, d)));
  }
#else
  for (int i = 0; i < 8; ++i) out[i] = sum(v[i]);
#endif
}

// exp(-s) for s >= 0: 2^n times a degree-6 polynomial on [-1/2,1/2], relative error about 1e-7.
template <class V, class I>
HH_INLINE V exp_neg_(V s) {
  V y = s * -1.44269504088896341f;
  y = y < -126.f ? V{} - 126.f : y;
  I n = __builtin_convertvector(y - 0.5f, I);  // y <= 0, so truncation of y - 1/2 rounds to nearest
  V f = y - __builtin_convertvector(n, V);
  V p = f * 1.53580129e-4f + 1.33947253e-3f;
  p = p * f + 9.61845740e-3f;
  p = p * f + 5.55033234e-2f;
  p = p * f + 2.40226462e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
  return p * (V)((n + 127) << 23);
}
HH_INLINE vf exp_neg(vf s) { return exp_neg_<vf, vi>(s); }

HH_INLINE vi nearest(vf v) {
#if HH_LANES == 8 && defined(__AVX__)
  return (vi)_mm256_cvtps_epi32((__m256)v);
#elif HH_LANES == 4 && defined(__SSE2__)
  return (vi)_mm_cvtps_epi32((__m128)v);
#elif HH_LANES == 4 && defined(__aarch64__)
  return (vi)vcvtnq_s32_f32((float32x4_t)v);
#else
  vi n;
  for (int i = 0; i < HH_LANES; ++i) n[i] = (int32_t)__builtin_rintf(v[i] > -1e9f ? (v[i] < 1e9f ? v[i] : 1e9f) : -1e9f);
  return n;
#endif
}

// 2^y for |y| < 126 by a degree-5 polynomial, relative error about 2e-7. Beyond that the result is any bit pattern: mask it away.
HH_INLINE vf exp2_near(vf y) {
  const vi n = nearest(y);
  const vf f = y - __builtin_convertvector(n, vf);
  vf p = f * 1.327647196e-3f + 9.675541503e-3f;
  p = p * f + 5.550713275e-2f;
  p = p * f + 2.402211972e-1f;
  p = p * f + 6.931469671e-1f;
  p = p * f + 1.000000072f;
  return (vf)((vu)p + ((vu)n << 23));
}

HH_INLINE v4 sigmoid4(v4 x) {
  v4 a = x < 0.f ? x : -x;  // -|x|
  v4 e = exp_neg_<v4, v4i>(-a), r = 1.f / (1.f + e);
  return x < 0.f ? e * r : r;
}
HH_INLINE float sigmoid1(float x) {
  float e = __builtin_expf(-absf(x)), r = 1.f / (1.f + e);
  return x < 0.f ? e * r : r;
}

}  // namespace
}  // namespace hh
