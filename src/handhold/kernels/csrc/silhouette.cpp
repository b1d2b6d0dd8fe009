// C ABI of outline blending: contour edges, their crossings between pixel centres, coverage and its gradient. Outlines are
// short next to surfaces, so one thread does it.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "raster.h"

using namespace hh;
using namespace hh::mesh;

namespace {

constexpr double kTie = 1e-6;  // pixels

struct Crossing {
  int32_t a, b;      // the edge, lower index first
  int32_t line;      // row (axis 0) or column (axis 1)
  int32_t inside, outside;  // pixels
  int32_t axis;
  double alpha;      // from the centre of `inside` (0) to that of `outside` (1)
};

struct State {
  int W, H, n_ids;
  std::vector<Crossing> crossings;
  std::vector<float> change[2];  // (H,W,n_ids) along each axis
};

struct HalfEdge {
  int32_t b, opposite, body;
};

struct Edge {
  int32_t a, b, body;
  double side;
};

void point(const float* cam, int64_t i, double* v) {
  for (int k = 0; k < 3; ++k) v[k] = cam[3 * i + k];
}

// Half edges in buckets of their lower vertex; the few of one bucket are sorted by the other vertex and body.
std::vector<Edge> contour_edges(int64_t V, int64_t T, const float* cam, const int64_t* faces, const int64_t* body, double near) {
  std::vector<int64_t> start(V + 1);
  std::vector<HalfEdge> half(3 * T);
  auto each = [&](auto&& f) {
    for (int64_t t = 0; t < T; ++t)
      for (int i = 0; i < 3; ++i) {
        const int64_t p = faces[3 * t + (i + 1) % 3], q = faces[3 * t + (i + 2) % 3];
        f(std::min(p, q), std::max(p, q), faces[3 * t + i], body[t]);
      }
  };
  each([&](int64_t a, int64_t, int64_t, int64_t) { start[a + 1]++; });
  for (int64_t v = 0; v < V; ++v) start[v + 1] += start[v];
  std::vector<int64_t> at(start.begin(), start.end() - 1);
  each([&](int64_t a, int64_t b, int64_t o, int64_t id) {
    half[at[a]++] = {static_cast<int32_t>(b), static_cast<int32_t>(o), static_cast<int32_t>(id)};
  });
  std::vector<Edge> out;
  for (int64_t a = 0; a < V; ++a) {
    HalfEdge *h = half.data() + start[a], *end = half.data() + start[a + 1];
    std::sort(h, end, [](const HalfEdge& x, const HalfEdge& y) { return x.b != y.b ? x.b < y.b : x.body < y.body; });
    while (h < end) {
      HalfEdge* next = h;
      while (next < end && next->b == h->b && next->body == h->body) ++next;
      double va[3], vb[3], n[3], e[3], side = 0;
      point(cam, a, va), point(cam, h->b, vb);
      bool contour = va[2] > near || vb[2] > near;
      if (contour) {
        for (int k = 0; k < 3; ++k) e[k] = vb[k] - va[k];
        cross(va, e, n);
        for (const HalfEdge* g = h; g < next && contour; ++g) {
          double o[3], r[3];
          point(cam, g->opposite, o);
          for (int k = 0; k < 3; ++k) r[k] = o[k] - va[k];
          const double volume = dot(n, o);
          if (!(std::fabs(volume) > 1e-14 * abs1(va) * abs1(e) * abs1(r))) continue;
          const double s = volume > 0 ? 1 : -1;
          contour = side == 0 || side == s;
          side = s;
        }
      }
      if (contour && side != 0) out.push_back({static_cast<int32_t>(a), h->b, h->body, side});
      h = next;
    }
  }
  return out;
}

int first_pixel(double x, int n) {
  x = std::ceil(x - 0.5);
  return x > 0 ? (x < n ? static_cast<int>(x) : n) : 0;
}

// Where the edge's line meets the centre line of a row or column, in pixels, and the slope that backward needs.
struct Meeting {
  double x, ray, other;  // pixel; ray coordinate along the axis and across it
};
Meeting meet(const double* n, const Camera& c, int axis, int line) {
  const int across = 1 - axis;
  Meeting m;
  m.other = axis == 0 ? c.ray_y(line + 0.5) : c.ray_x(line + 0.5);
  m.ray = -(n[across] * m.other + n[2]) / n[axis];
  m.x = axis == 0 ? m.ray * c.fx + c.cx : m.ray * c.fy + c.cy;
  return m;
}

void find_crossings(State& st, const std::vector<Edge>& edges, const float* cam, const Camera& c, double near, const int64_t* label, const float* depth) {
  const int W = st.W, H = st.H;
  const int64_t pixels = static_cast<int64_t>(W) * H;
  std::vector<int32_t> best[2];  // crossing of the pair that begins at each pixel
  for (auto& b : best) b.assign(pixels, -1);
  for (const Edge& g : edges) {
    double va[3], vb[3], e[3], n[3];
    point(cam, g.a, va), point(cam, g.b, vb);
    for (int k = 0; k < 3; ++k) e[k] = vb[k] - va[k];
    cross(va, e, n);
    const int axis = std::fabs(n[0]) / c.fx >= std::fabs(n[1]) / c.fy ? 0 : 1, across = 1 - axis;
    const int lines = axis == 0 ? H : W, length = axis == 0 ? W : H;
    if (length < 2) continue;
    // rows or columns between the ends, the one behind `near` moved up to it
    double t0 = 0, t1 = 1;
    if (va[2] < near) t0 = (near - va[2]) / e[2];
    if (vb[2] < near) t1 = (near - va[2]) / e[2];
    const double f = axis == 0 ? c.fy : c.fx, centre = axis == 0 ? c.cy : c.cx;
    const double y0 = f * (va[across] + t0 * e[across]) / (va[2] + t0 * e[2]) + centre, y1 = f * (va[across] + t1 * e[across]) / (va[2] + t1 * e[2]) + centre;
    const int l0 = first_pixel(std::min(y0, y1) - 1e-3, lines), l1 = first_pixel(std::max(y0, y1) + 1e-3, lines);
    for (int line = l0; line < l1; ++line) {
      const Meeting m = meet(n, c, axis, line);
      const double fa = va[across] - m.other * va[2], fb = vb[across] - m.other * vb[2];
      if ((fa >= 0) == (fb >= 0)) continue;
      if (!(va[2] + fa / (fa - fb) * e[2] > near)) continue;
      if (!(m.x > 0 && m.x < length)) continue;
      const double first = std::floor(m.x - 0.5), u = m.x - 0.5 - first;
      const bool inside_first = g.side * n[axis] < 0;
      // Within rounding of a pixel centre, that pixel may count as inside or outside: the other pair may be told apart.
      const int starts[2] = {static_cast<int>(first), static_cast<int>(first) + (u > 1 - kTie) - (u < kTie)};
      int64_t low = -1, p = 0, q = 0;
      for (int start : starts) {
        if (start < 0 || start > length - 2) continue;
        const int64_t one = axis == 0 ? static_cast<int64_t>(line) * W + start : static_cast<int64_t>(start) * W + line, two = one + (axis == 0 ? 1 : W);
        p = inside_first ? one : two, q = inside_first ? two : one;
        if (label[p] != g.body || label[q] == g.body || (label[q] >= 0 && !(depth[p] < depth[q]))) continue;
        low = one;
        break;
      }
      if (low < 0) continue;
      const double centre_p = (axis == 0 ? p % W : p / W) + 0.5, alpha = p < q ? m.x - centre_p : centre_p - m.x;
      int32_t& k = best[axis][low];
      const Crossing x = {g.a, g.b, line, static_cast<int32_t>(p), static_cast<int32_t>(q), axis, alpha};
      if (k < 0) {
        k = static_cast<int32_t>(st.crossings.size());
        st.crossings.push_back(x);
      } else if (alpha > st.crossings[k].alpha) {
        st.crossings[k] = x;
      }
    }
  }
}

}  // namespace

HH_API void hh_silhouette_free(void* state) { delete static_cast<State*>(state); }

// cam (V,3), faces (T,3), body (T) in 0..n_ids-1, K 3x3; label (H,W) in -1..n_ids-1, depth (H,W); out (H,W,n_ids).
HH_API void* hh_silhouette_forward(int64_t V, int64_t T, int W, int H, int n_ids, const float* cam, const int64_t* faces, const int64_t* body,
                                   const float* K, float near, const int64_t* label, const float* depth, float* out) try {
  auto st = std::make_unique<State>();
  st->W = W, st->H = H, st->n_ids = n_ids;
  const Camera c = {K[0], K[4], K[2], K[5], 0};
  find_crossings(*st, contour_edges(V, T, cam, faces, body, near), cam, c, near, label, depth);
  const int64_t pixels = static_cast<int64_t>(W) * H;
  for (auto& change : st->change) change.assign(pixels * n_ids, 0.f);
  for (const Crossing& x : st->crossings) {
    const int64_t at = x.alpha < 0.5 ? x.inside : x.outside;
    const float amount = static_cast<float>(std::min(0.5, std::fabs(x.alpha - 0.5)));
    float* change = st->change[x.axis].data() + at * n_ids;
    change[label[x.inside]] += amount;
    if (label[x.outside] >= 0) change[label[x.outside]] += amount;
  }
  for (int64_t p = 0; p < pixels; ++p)
    for (int k = 0; k < n_ids; ++k) {
      const int64_t i = p * n_ids + k;
      const float keep = (1 - st->change[0][i]) * (1 - st->change[1][i]);
      out[i] = label[p] == k ? keep : 1 - keep;
    }
  return st.release();
} catch (const std::bad_alloc&) {
  return nullptr;
}

// Adds to v_cam (V,3) and v_K (fx fy cx cy), which come as zeros.
HH_API void hh_silhouette_backward(void* state, const float* cam, const float* K, const int64_t* label, const float* v_out, float* v_cam, float* v_K) {
  const State& st = *static_cast<const State*>(state);
  const Camera c = {K[0], K[4], K[2], K[5], 0};
  double vk[4] = {0, 0, 0, 0};
  for (const Crossing& x : st.crossings) {
    const int64_t at = x.alpha < 0.5 ? x.inside : x.outside;
    double v_amount = 0;
    for (const int64_t k : {label[x.inside], label[x.outside]}) {
      if (k < 0) continue;
      const int64_t i = at * st.n_ids + k;
      const double keep = 1 - st.change[1 - x.axis][i];
      v_amount += label[at] == k ? -v_out[i] * keep : v_out[i] * keep;
    }
    const double v_alpha = x.alpha < 0.5 ? -v_amount : v_amount;
    const double v_x = x.inside < x.outside ? v_alpha : -v_alpha;
    double va[3], vb[3], e[3], n[3];
    point(cam, x.a, va), point(cam, x.b, vb);
    for (int k = 0; k < 3; ++k) e[k] = vb[k] - va[k];
    cross(va, e, n);
    const Meeting m = meet(n, c, x.axis, x.line);
    const int across = 1 - x.axis;
    const double f = x.axis == 0 ? c.fx : c.fy, f_across = x.axis == 0 ? c.fy : c.fx;
    // n.(ray, other, 1) = 0 gives d ray = -(dn.(ray, other, 1) + n_across d other) / n_axis, and n = va x vb
    const double scale = -v_x * f / n[x.axis];
    double vn[3], ga[3], gb[3];
    vn[x.axis] = scale * m.ray, vn[across] = scale * m.other, vn[2] = scale;
    cross(vb, vn, ga), cross(vn, va, gb);
    for (int k = 0; k < 3; ++k)
      v_cam[3 * static_cast<int64_t>(x.a) + k] += static_cast<float>(ga[k]), v_cam[3 * static_cast<int64_t>(x.b) + k] += static_cast<float>(gb[k]);
    const double v_other = scale * n[across];
    vk[x.axis] += v_x * m.ray, vk[2 + x.axis] += v_x;
    vk[across] -= v_other * m.other / f_across, vk[2 + across] -= v_other / f_across;
  }
  for (int k = 0; k < 4; ++k) v_K[k] = static_cast<float>(vk[k]);
}
