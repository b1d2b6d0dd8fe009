// C ABI of the soft rasteriser's occupancy: projection, tile lists, threads, gradients. The arithmetic is in soft_isa.h.
#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "pool.h"

using namespace hh;

namespace {

constexpr int kTile = 8;
constexpr int64_t kMostPairs = int64_t{1} << 27;  // of tile and face: 28 bytes each in backward

struct State {
  SoftArgs args{};
  std::vector<double> screen;  // (V,2) pixels
  std::vector<int64_t> start, last;
  std::vector<int32_t> order;
  std::vector<float> transparency;
};

int tile_of(double x, int tiles) { return x > 0 ? (x < tiles * kTile ? static_cast<int>(x) / kTile : tiles) : 0; }

struct Box {
  int x0, y0, x1, y1;
};

// Tiles that the triangle's reach may touch: none for one that reaches nearer than `near`.
Box box_of(const State& st, const float* cam, const int64_t* f, float near, int tiles_x, int tiles_y) {
  double lo[2] = {INFINITY, INFINITY}, hi[2] = {-INFINITY, -INFINITY};
  for (int i = 0; i < 3; ++i) {
    if (!(cam[3 * f[i] + 2] >= near)) return {0, 0, 0, 0};
    for (int k = 0; k < 2; ++k) lo[k] = std::min(lo[k], st.screen[2 * f[i] + k]), hi[k] = std::max(hi[k], st.screen[2 * f[i] + k]);
  }
  const double r = st.args.reach;
  if (!(hi[0] + r > 0 && hi[1] + r > 0)) return {0, 0, 0, 0};
  return {tile_of(lo[0] - r, tiles_x), tile_of(lo[1] - r, tiles_y), std::min(tiles_x, tile_of(hi[0] + r, tiles_x) + 1),
          std::min(tiles_y, tile_of(hi[1] + r, tiles_y) + 1)};
}

}  // namespace

HH_API void hh_soft_free(void* state) { delete static_cast<State*>(state); }

// cam (V,3), faces (T,3), K 3x3; out (H,W). Triangles with a corner nearer than `near` are left out.
HH_API void* hh_soft_forward(int64_t V, int64_t T, int W, int H, const float* cam, const int64_t* faces, const float* K, float near, float sigma,
                             float reach, float* out, int threads) try {
  auto st = std::make_unique<State>();
  SoftArgs& s = st->args;
  const int tiles_x = (W + kTile - 1) / kTile, tiles_y = (H + kTile - 1) / kTile, tiles = tiles_x * tiles_y;
  s.W = W, s.H = H, s.tiles_x = tiles_x, s.reach = reach, s.inv_sigma2 = 1 / (sigma * sigma);
  st->screen.resize(2 * V);
  for (int64_t i = 0; i < V; ++i)
    for (int k = 0; k < 2; ++k) st->screen[2 * i + k] = K[4 * k] * static_cast<double>(cam[3 * i + k]) / cam[3 * i + 2] + K[3 * k + 2];
  std::vector<Box> box(T);
  st->start.assign(tiles + 1, 0);
  for (int64_t i = 0; i < T; ++i) {
    const Box b = box[i] = box_of(*st, cam, faces + 3 * i, near, tiles_x, tiles_y);
    for (int y = b.y0; y < b.y1; ++y)
      for (int x = b.x0; x < b.x1; ++x) st->start[y * tiles_x + x + 1]++;
  }
  for (int t = 0; t < tiles; ++t) st->start[t + 1] += st->start[t];
  if (st->start[tiles] > kMostPairs) return nullptr;
  st->order.resize(st->start[tiles]);
  std::vector<int64_t> at(st->start.begin(), st->start.end() - 1);
  for (int64_t i = 0; i < T; ++i)
    for (int y = box[i].y0; y < box[i].y1; ++y)
      for (int x = box[i].x0; x < box[i].x1; ++x) st->order[at[y * tiles_x + x]++] = static_cast<int32_t>(i);
  st->last.resize(tiles), st->transparency.resize(static_cast<size_t>(tiles) * kTile * kTile);
  s.screen = st->screen.data(), s.start = st->start.data(), s.order = st->order.data();
  s.last = st->last.data(), s.transparency = st->transparency.data();
  SoftArgs a = s;
  a.faces = faces, a.out = out;
  parallel(tiles, threads, [&](int64_t t) { kernels().soft_tile(a, static_cast<int>(t)); });
  return st.release();
} catch (const std::bad_alloc&) {
  return nullptr;
}

// The arrays must be those of the forward call. v_cam (V,3), v_K: fx fy cx cy.
HH_API int hh_soft_backward(void* state, int64_t V, const float* cam, const int64_t* faces, const float* K, const float* v_out, float* v_cam,
                            float* v_K, int threads) try {
  const State& st = *static_cast<const State*>(state);
  SoftArgs a = st.args;
  const std::unique_ptr<float[]> slots(new float[6 * st.order.size() + 1]);
  a.faces = faces, a.v_out = v_out, a.slots = slots.get();
  const int tiles = static_cast<int>(st.last.size());
  parallel(tiles, threads, [&](int64_t t) { kernels().soft_tile_backward(a, static_cast<int>(t)); });
  std::vector<double> g(2 * V);
  for (int t = 0; t < tiles; ++t)  // in order, so that threads do not matter
    for (int64_t k = st.start[t]; k < st.last[t]; ++k)
      for (int i = 0; i < 3; ++i) {
        double* v = &g[2 * faces[3 * static_cast<int64_t>(st.order[k]) + i]];
        v[0] += slots[6 * k + 2 * i], v[1] += slots[6 * k + 2 * i + 1];
      }
  double vk[4] = {0, 0, 0, 0};
  for (int64_t i = 0; i < V; ++i) {
    v_cam[3 * i] = v_cam[3 * i + 1] = v_cam[3 * i + 2] = 0;
    if (g[2 * i] == 0 && g[2 * i + 1] == 0) continue;
    const double z = cam[3 * i + 2];
    double v_z = 0;
    for (int k = 0; k < 2; ++k) {
      const double r = cam[3 * i + k] / z, v = g[2 * i + k] * K[4 * k];
      v_cam[3 * i + k] = static_cast<float>(v / z);
      v_z -= v * r / z;
      vk[k] += g[2 * i + k] * r, vk[2 + k] += g[2 * i + k];
    }
    v_cam[3 * i + 2] = static_cast<float>(v_z);
  }
  for (int k = 0; k < 4; ++k) v_K[k] = static_cast<float>(vk[k]);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
