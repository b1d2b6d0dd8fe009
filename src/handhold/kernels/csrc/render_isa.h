// NeuS compositing on the grid (Wang et al., NeurIPS 2021, eq. 13: alpha from the logistic of consecutive distances), fused with
// the trilinear lookup.
#pragma once

namespace hh {
namespace {

constexpr int kMaxSamples = 256;
constexpr float kNeusEps = 1e-6f;

constexpr int kPad = kMaxSamples + HH_LANES;

HH_INLINE vf sigmoid(vf x) {
  const vf a = x < 0.f ? x : -x, e = exp_neg(-a), r = 1.f / (1.f + e);
  return x < 0.f ? e * r : r;
}

// One ray, each quantity an array over samples or intervals; interval i lies between samples i and i+1. Arrays are filled to a
// multiple of HH_LANES; intervals from S-1 on have alpha 0.
struct Ray {
  float t[kPad], val[4][kPad], s[kPad], raw[kPad], alpha[kPad], T[kPad], mid[kPad], color[3][kPad];
};

// to[c][i] = v[i][c], i < 4
HH_INLINE void put4(float (*to)[kPad], int at, const v4* v) {
#if defined(__SSE2__)
  __m128 a = (__m128)v[0], b = (__m128)v[1], c = (__m128)v[2], d = (__m128)v[3];
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to[0] + at, a), _mm_storeu_ps(to[1] + at, b), _mm_storeu_ps(to[2] + at, c), _mm_storeu_ps(to[3] + at, d);
#else
  for (int i = 0; i < 4; ++i)
    for (int c = 0; c < 4; ++c) to[c][at + i] = v[i][c];
#endif
}

// Fills r; with `look` the values come from the grid and are left in a.seen, else they are read there.
HH_INLINE void trace(const RenderArgs& a, int64_t n, bool look, Ray& r) {
  const float inv = 1.f / a.grid.h, ib = 1.f / a.beta, *o = a.o + 3 * n, *d = a.d + 3 * n, *t = a.t + n * a.S;
  const int S = a.S;
  float* seen = a.seen + 4 * n * S;
  for (int i = 0; i < S + HH_LANES; ++i) r.t[i] = t[i < S ? i : S - 1];
  if (look) {
    for (int i = 0; i < S; i += HH_LANES) {
      const vf ti = load(r.t + i), x[3] = {o[0] + ti * d[0], o[1] + ti * d[1], o[2] + ti * d[2]};
      Cells c;
      v4 v[HH_LANES];
      find_cells(a.grid, x, inv, c);
      for (int k = 0; k < HH_LANES; ++k) v[k] = lerp_cell(a.grid, c, k, false).value;
      for (int k = 0; k < HH_LANES; k += 4) put4(r.val, i + k, v + k);
    }
    for (int c = 0; c < 4; ++c) __builtin_memcpy(seen + c * S, r.val[c], S * sizeof(float));
  } else {
    for (int c = 0; c < 4; ++c) {
      __builtin_memcpy(r.val[c], seen + c * S, S * sizeof(float));
      for (int i = S; i < S + HH_LANES; ++i) r.val[c][i] = r.val[c][S - 1];
    }
  }
  for (int i = 0; i < S; i += HH_LANES) store(r.s + i, sigmoid(load(r.val[0] + i) * ib));
  for (int i = 0; i < S - 1; i += HH_LANES) {
    const vf s = load(r.s + i), raw = (s - load(r.s + i + 1) + kNeusEps) / (s + kNeusEps);
    store(r.raw + i, raw);
    store(r.alpha + i, raw > 0.f ? (raw < 1.f ? raw : vf{} + 1.f) : vf{});
    store(r.mid + i, (load(r.t + i) + load(r.t + i + 1)) * 0.5f);
    for (int k = 0; k < 3; ++k) store(r.color[k] + i, sigmoid((load(r.val[k + 1] + i) + load(r.val[k + 1] + i + 1)) * 0.5f));
  }
  float T = 1;
  for (int i = 0; i < S - 1; ++i) r.T[i] = T, T *= 1 - r.alpha[i];
  for (int i = S - 1; i < S - 1 + HH_LANES; ++i) r.alpha[i] = r.T[i] = r.raw[i] = 0;
}

HH_INLINE void prefetch_ray(const RenderArgs& a, int64_t n) {
  const float inv = 1.f / a.grid.h, *o = a.o + 3 * n, *d = a.d + 3 * n, *t = a.t + n * a.S;
  for (int i = 0; i + HH_LANES <= a.S; i += HH_LANES) {
    const vf ti = load(t + i), x[3] = {o[0] + ti * d[0], o[1] + ti * d[1], o[2] + ti * d[2]};
    Cells c;
    find_cells(a.grid, x, inv, c);
    prefetch_cells<0>(a.grid.data, a.grid.R, c);
  }
}

void render_forward(const RenderArgs& a, int64_t b, int64_t e) {
  Ray r;
  __builtin_memset(&r, 0, sizeof r);  // lanes past the last sample hold numbers, if meaningless ones
  for (int64_t n = b; n < e; ++n) {
    if (n + 1 < e) prefetch_ray(a, n + 1);
    trace(a, n, true, r);
    vf acc = {}, depth = {}, rgb[3] = {};
    for (int i = 0; i < a.S - 1; i += HH_LANES) {
      const vf w = load(r.alpha + i) * load(r.T + i);
      acc += w, depth += w * load(r.mid + i);
      for (int k = 0; k < 3; ++k) rgb[k] += w * load(r.color[k] + i);
    }
    for (int k = 0; k < 3; ++k) a.rgb[3 * n + k] = sum(rgb[k]);
    a.acc[n] = sum(acc);
    a.depth[n] = sum(depth);
  }
}

void render_backward(const RenderArgs& a, int64_t b, int64_t e) {
  Ray r;
  __builtin_memset(&r, 0, sizeof r);
  float v_w[kPad], v_alpha[kPad], v_x[3 * kMaxSamples];
  float below[kPad + 1], v_color[3][kPad + 1];  // of interval i at i + 1: what it gives to sample i + 1
  float v_val[4][kPad];
  const float ib = 1.f / a.beta;
  const int S = a.S;
  for (int64_t n = b; n < e; ++n) {
    trace(a, n, false, r);
    const float *v_rgb = a.v_rgb + 3 * n, *o = a.o + 3 * n, *d = a.d + 3 * n;
    float *out = a.v_val + n * S * 4, *x = a.x + n * S * 3;
    for (int i = 0; i < S - 1; i += HH_LANES) {
      vf g = a.v_acc[n] + a.v_depth[n] * load(r.mid + i);
      for (int k = 0; k < 3; ++k) g += load(r.color[k] + i) * v_rgb[k];
      store(v_w + i, g);
    }
    for (int i = S - 1; i < S - 1 + HH_LANES; ++i) v_alpha[i] = 0;
    float later = 0;  // dL/dT of the next interval; the recursion needs no division by 1 - alpha
    for (int i = S - 2; i >= 0; --i) {
      v_alpha[i] = r.T[i] * (v_w[i] - later);
      later += r.alpha[i] * (v_w[i] - later);
    }
    below[0] = v_color[0][0] = v_color[1][0] = v_color[2][0] = 0;
    vf v_beta = {};
    for (int i = 0; i < S; i += HH_LANES) {
      const vf s = load(r.s + i), raw = load(r.raw + i), is = 1.f / (s + kNeusEps);
      const vf g = ((raw >= 0.f) & (raw <= 1.f)) ? load(v_alpha + i) * is : vf{};
      store(below + i + 1, -g);
      const vf v = (g * is * load(r.s + i + 1) + load(below + i)) * s * (1.f - s) * ib;
      store(v_val[0] + i, v);
      v_beta -= v * load(r.val[0] + i);
      const vf half = load(r.alpha + i) * load(r.T + i) * 0.5f;
      for (int k = 0; k < 3; ++k) {
        const vf c = load(r.color[k] + i), v_c = c * (1.f - c) * half * v_rgb[k];
        store(v_color[k] + i + 1, v_c);
        store(v_val[k + 1] + i, v_c + load(v_color[k] + i));
      }
    }
    for (int i = 0; i < S; ++i) {
      store4(out + 4 * i, v4{v_val[0][i], v_val[1][i], v_val[2][i], v_val[3][i]});
      for (int k = 0; k < 3; ++k) x[3 * i + k] = o[k] + r.t[i] * d[k];
    }
    if (a.v_beta) a.v_beta[n] = sum(v_beta) * ib;
    if (!a.v_o) continue;
    grid_v_x(a.grid, x, 0, S, out, nullptr, v_x);
    float go[3] = {0, 0, 0}, gd[3] = {0, 0, 0};
    for (int i = 0; i < S; ++i)
      for (int k = 0; k < 3; ++k) go[k] += v_x[3 * i + k], gd[k] += r.t[i] * v_x[3 * i + k];
    for (int k = 0; k < 3; ++k) a.v_o[3 * n + k] = go[k], a.v_d[3 * n + k] = gd[k];
  }
}

}  // namespace
}  // namespace hh
