// Fourier features of points in space with their Jacobian. One lane is one point.
#pragma once

namespace hh {
namespace {

// The value as it is: keeps -fassociative-math from folding the parts of a split constant back together.
HH_INLINE vf keep(vf v) {
#if defined(__SSE2__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  __asm__("" : "+m"(v));
#endif
  return v;
}

// sin and cos of x f, or of pi x f; absolute error about 1e-7 for any finite x. f is a power of 2.
HH_INLINE void sincos(vf x, float f, bool pi, vf* sin, vf* cos) {
  const vf t = x * f, limit = all(4096.f), a = t < 0.f ? -t : t;
  if (any(a > limit)) {  // too far for the split constant
    for (int i = 0; i < HH_LANES; ++i) {
      const double angle = (double)t[i] * (pi ? 3.14159265358979323846 : 1.0);
      (*sin)[i] = (float)__builtin_sin(angle), (*cos)[i] = (float)__builtin_cos(angle);
    }
    return;
  }
  const vf y = t * (pi ? 2.f : 0.636619772367581343f);
  const vi n = __builtin_convertvector(y + (y < 0.f ? vf{} - 0.5f : vf{} + 0.5f), vi);
  const vf q = __builtin_convertvector(n, vf);
  vf r;
  if (pi) r = keep(t - q * 0.5f) * 3.14159265358979f;
  else r = keep(keep(t - q * 1.5703125f) - q * 4.837512969970703125e-4f) - q * 7.54978995489188216e-8f;
  const vf z = r * r;
  const vf s = r + r * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
  const vf c = 1.f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  const vi odd = (n & 1) != 0, s_minus = (n & 2) != 0, c_minus = ((n + 1) & 2) != 0;
  const vf p = odd ? c : s, o = odd ? s : c;
  *sin = s_minus ? -p : p;
  *cos = c_minus ? -o : o;
}

void fourier_forward(const FourierArgs& a, int64_t b, int64_t e) {
  const int64_t D = 3 * (a.identity + 2 * a.bands);
  for (int64_t n = b; n < e; n += HH_LANES) {
    const int64_t lanes = e - n < HH_LANES ? e - n : HH_LANES;
    vf x[3], v[6];
    load_points(a.x, n, e, x);
    float *val = a.val + n * D, *jac = a.jac ? a.jac + 3 * n * D : nullptr;
    if (jac)
      for (int64_t i = 0; i < 3 * D * lanes; ++i) jac[i] = 0;
    if (a.identity) {
      store_rows<3>(val, D, lanes, x);
      if (jac)
        for (int i = 0; i < lanes; ++i)
          for (int k = 0; k < 3; ++k) jac[3 * i * D + 4 * k] = 1;
      val += 3, jac = jac ? jac + 9 : nullptr;
    }
    float f = 1;
    for (int band = 0; band < a.bands; ++band, f *= 2) {
      const float w = a.weights[band], slope = w * f * (a.pi ? 3.14159265358979f : 1.f);
      for (int k = 0; k < 3; ++k) {
        if (w == 0) v[k] = v[k + 3] = vf{};
        else sincos(x[k], f, a.pi, v + k, v + k + 3);
      }
      if (jac) {
        for (int k = 0; k < 3 && w != 0; ++k)
          for (int i = 0; i < lanes; ++i) {
            jac[3 * i * D + 4 * k] = v[k + 3][i] * slope;
            jac[3 * i * D + 4 * k + 9] = -v[k][i] * slope;
          }
        jac += 18;
      }
      for (int c = 0; c < 6; ++c) v[c] *= w;
      store_rows<6>(val, D, lanes, v);
      val += 6;
    }
  }
}

void fourier_v_x(const FourierArgs& a, int64_t b, int64_t e) {
  const int64_t D = 3 * (a.identity + 2 * a.bands);
  for (int64_t n = b; n < e; n += HH_LANES) {
    const int64_t lanes = e - n < HH_LANES ? e - n : HH_LANES;
    vf x[3], out[3] = {}, v[6] = {};
    load_points(a.x, n, e, x);
    const float *v_val = a.v_val ? a.v_val + n * D : nullptr, *v_jac = a.v_jac ? a.v_jac + 3 * n * D : nullptr;
    if (a.identity) {
      if (v_val) load_rows<3>(v_val, D, lanes, out), v_val += 3;
      if (v_jac) v_jac += 9;
    }
    float f = 1;
    for (int band = 0; band < a.bands; ++band, f *= 2) {
      const float w = a.weights[band], slope = f * (a.pi ? 3.14159265358979f : 1.f);
      if (v_val && w != 0) load_rows<6>(v_val, D, lanes, v);
      for (int k = 0; k < 3 && w != 0; ++k) {
        vf s, c, js = {}, jc = {};
        sincos(x[k], f, a.pi, &s, &c);
        if (v_jac)
          for (int i = 0; i < lanes; ++i) js[i] = v_jac[3 * i * D + 4 * k], jc[i] = v_jac[3 * i * D + 4 * k + 9];
        out[k] += (v[k] * c - v[k + 3] * s - (js * s + jc * c) * slope) * (w * slope);
      }
      if (v_val) v_val += 6;
      if (v_jac) v_jac += 18;
    }
    store_rows<3>(a.v_x + 3 * n, 3, lanes, out);
  }
}

}  // namespace
}  // namespace hh
