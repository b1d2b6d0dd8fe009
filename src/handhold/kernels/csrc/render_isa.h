// NeuS compositing on the grid (Wang et al., NeurIPS 2021, eq. 13: alpha from the logistic of consecutive distances), fused with
// the trilinear lookup: no per-sample tensor is ever materialised in the forward pass.
#pragma once

namespace hh {
namespace {

constexpr int kMaxSamples = 256;
constexpr float kNeusEps = 1e-6f;

struct Ray {
  float s[kMaxSamples], alpha[kMaxSamples], raw[kMaxSamples], T[kMaxSamples], mid[kMaxSamples];
  v4 val[kMaxSamples], color[kMaxSamples];
};

// Interval i lies between samples i and i+1; channel 0 of `color` is unused.
HH_INLINE void trace(const RenderArgs& a, int64_t n, Ray& r) {
  const float inv = 1.f / a.grid.h, ib = 1.f / a.beta, *o = a.o + 3 * n, *d = a.d + 3 * n, *t = a.t + n * a.S;
  for (int i = 0; i < a.S; ++i) {
    float x[3] = {o[0] + t[i] * d[0], o[1] + t[i] * d[1], o[2] + t[i] * d[2]};
    r.val[i] = value_at(a.grid, x, inv, nullptr);
  }
  for (int i = 0; i < a.S; i += 4) {
    v4 q = {};
    for (int k = 0; k < 4 && i + k < a.S; ++k) q[k] = r.val[i + k][0] * ib;
    q = sigmoid4(q);
    for (int k = 0; k < 4 && i + k < a.S; ++k) r.s[i + k] = q[k];
  }
  float T = 1;
  for (int i = 0; i + 1 < a.S; ++i) {
    r.color[i] = sigmoid4((r.val[i] + r.val[i + 1]) * 0.5f);
    r.raw[i] = (r.s[i] - r.s[i + 1] + kNeusEps) / (r.s[i] + kNeusEps);
    r.alpha[i] = clampf(r.raw[i], 0.f, 1.f);
    r.mid[i] = 0.5f * (t[i] + t[i + 1]);
    r.T[i] = T;
    T *= 1 - r.alpha[i];
  }
}

void render_forward(const RenderArgs& a, int64_t b, int64_t e) {
  Ray r;
  for (int64_t n = b; n < e; ++n) {
    trace(a, n, r);
    v4 rgb = {};
    float acc = 0, depth = 0;
    for (int i = 0; i + 1 < a.S; ++i) {
      float w = r.alpha[i] * r.T[i];
      rgb += r.color[i] * w;
      acc += w;
      depth += w * r.mid[i];
    }
    for (int k = 0; k < 3; ++k) a.rgb[3 * n + k] = rgb[k + 1];
    a.acc[n] = acc;
    a.depth[n] = depth;
  }
}

void render_backward(const RenderArgs& a, int64_t b, int64_t e) {
  Ray r;
  float v_s[kMaxSamples], v_x[3 * kMaxSamples];
  const float ib = 1.f / a.beta;
  for (int64_t n = b; n < e; ++n) {
    trace(a, n, r);
    const v4 v_rgb = {0, a.v_rgb[3 * n], a.v_rgb[3 * n + 1], a.v_rgb[3 * n + 2]};
    const float *o = a.o + 3 * n, *d = a.d + 3 * n, *t = a.t + n * a.S;
    float *v_val = a.v_val + n * a.S * 4, *x = a.x + n * a.S * 3;
    for (int i = 0; i < a.S; ++i) {
      v_s[i] = 0;
      store4(v_val + 4 * i, v4{});
      for (int k = 0; k < 3; ++k) x[3 * i + k] = o[k] + t[i] * d[k];
    }
    float later = 0;  // dL/dT of the next interval; the recursion needs no division by 1 - alpha
    for (int i = a.S - 2; i >= 0; --i) {
      v4 c = r.color[i], q = v_rgb * c;
      float v_w = q[1] + q[2] + q[3] + a.v_acc[n] + a.v_depth[n] * r.mid[i], w = r.alpha[i] * r.T[i];
      float v_alpha = r.T[i] * (v_w - later);
      later = r.alpha[i] * v_w + (1 - r.alpha[i]) * later;
      if (r.raw[i] >= 0 && r.raw[i] <= 1) {
        float is = 1.f / (r.s[i] + kNeusEps);
        v_s[i] += v_alpha * r.s[i + 1] * is * is;
        v_s[i + 1] -= v_alpha * is;
      }
      v4 v_c = v_rgb * c * (1.f - c) * (0.5f * w);
      store4(v_val + 4 * i, load4(v_val + 4 * i) + v_c);
      store4(v_val + 4 * i + 4, load4(v_val + 4 * i + 4) + v_c);
    }
    float v_beta = 0;
    for (int i = 0; i < a.S; ++i) {
      float g = v_s[i] * r.s[i] * (1 - r.s[i]) * ib;
      v_val[4 * i] = g;
      v_beta -= g * r.val[i][0] * ib;
    }
    if (a.v_beta) a.v_beta[n] = v_beta;
    if (!a.v_o) continue;
    grid_v_x(a.grid, x, 0, a.S, v_val, nullptr, v_x);
    float go[3] = {0, 0, 0}, gd[3] = {0, 0, 0};
    for (int i = 0; i < a.S; ++i)
      for (int k = 0; k < 3; ++k) go[k] += v_x[3 * i + k], gd[k] += t[i] * v_x[3 * i + k];
    for (int k = 0; k < 3; ++k) a.v_o[3 * n + k] = go[k], a.v_d[3 * n + k] = gd[k];
  }
}

}  // namespace
}  // namespace hh
