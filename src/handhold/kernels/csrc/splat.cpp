// C ABI of the splatting rasteriser: memory, depth order, tile lists, threads. The arithmetic is in splat_*_isa.h.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "isa.h"
#include "pool.h"
#include "splat_bin.h"

using namespace hh;

namespace {

constexpr int64_t kProjectGrain = 512;

// What forward leaves for backward. The parameter arrays stay the caller's and are passed again.
struct State {
  const SplatKernels* kernel = nullptr;
  Project project{};
  int n_features = 0;
  Buffer<char> splats;
  Buffer<uint8_t> clamped, used;
  Buffer<float> depth, final_T, slots;
  Buffer<int32_t> stop;
  Buffer<uint64_t> reach;
  Bins bins;

  int64_t bytes() const {
    return splats.bytes() + clamped.bytes() + used.bytes() + depth.bytes() + final_T.bytes() + slots.bytes() + stop.bytes() + reach.bytes() + bins.bytes();
  }
};

// One freed state is kept: an optimiser renders the same sizes again, and fresh pages cost as much as the projection.
constexpr int64_t kKeepBytes = int64_t(256) << 20;
std::mutex keeping;  // only ever tried: a child forked while another thread held it would wait for ever
State* kept = nullptr;

State* take_state() {
  {
    std::unique_lock<std::mutex> lock(keeping, std::try_to_lock);
    if (State* s = lock ? kept : nullptr) return kept = nullptr, s;
  }
  return new State;
}

void give_state(State* s) {
  if (s && s->bytes() <= kKeepBytes) {
    std::unique_lock<std::mutex> lock(keeping, std::try_to_lock);
    if (lock && !kept) {
      kept = s;
      return;
    }
  }
  delete s;
}

struct Give {
  void operator()(State* s) const { give_state(s); }
};

Raster raster(State& st) {
  Raster r{};
  const Project& p = st.project;
  r.W = p.W, r.H = p.H, r.tiles_x = p.tiles_x, r.n_ids = p.n_ids, r.n_features = st.n_features;
  r.splats = st.splats.data(), r.tile_start = st.bins.tile_start.data(), r.order = st.bins.order.data();
  r.final_T = st.final_T.data(), r.stop = st.stop.data(), r.reach = st.reach.data(), r.box = st.bins.box.data(), r.offset = st.bins.offset.data();
  return r;
}

}  // namespace

HH_API void hh_splat_free(void* state) { give_state(static_cast<State*>(state)); }

// kind: 0 for 3D Gaussians, 1 for 2D ones. features (n,n_features) or null. view: 4x4 row-major camera-from-world; intrinsics: 3x3.
// out (H,W,4+n_features+n_ids): rgb, depth, features and body weights, premultiplied, on black; alpha (H,W); median (H,W).
// Returns what backward needs, to be freed by hh_splat_free; null when memory runs out, or, with *intersections over the limit, when
// the Gaussians cover more than kMaxIntersections tiles.
HH_API void* hh_splat_forward(int kind, int n, int W, int H, int n_features, int n_ids, int sh_degree, int K, const float* means, const float* quats,
                              const float* scales, const float* opacities, const float* colors, const float* features, const int64_t* ids,
                              const float* view, const float* intrinsics, float* out, float* alpha, int32_t* median, int64_t* intersections,
                              int threads) try {
  *intersections = 0;
  std::unique_ptr<State, Give> st(take_state());
  const SplatKernels& kernel = kind ? kernels().disk : kernels().splat;
  st->kernel = &kernel, st->n_features = n_features;
  Project& p = st->project;
  p.n = n, p.W = W, p.H = H, p.n_ids = n_ids, p.sh_degree = sh_degree, p.K = K;
  p.tiles_x = (W + kTile - 1) / kTile, p.tiles_y = (H + kTile - 1) / kTile;
  p.fx = intrinsics[0], p.cx = intrinsics[2], p.fy = intrinsics[4], p.cy = intrinsics[5];
  std::memcpy(p.view, view, sizeof p.view);
  for (int j = 0; j < 3; ++j) p.campos[j] = -(view[j] * view[3] + view[4 + j] * view[7] + view[8 + j] * view[11]);
  p.means = means, p.quats = quats, p.scales = scales, p.opacities = opacities, p.colors = colors, p.ids = ids;
  const size_t count = n;
  st->splats.resize(count * kernel.splat_bytes), st->clamped.resize(count), st->depth.resize(count), st->bins.box.resize(4 * count);
  p.splats = st->splats.data(), p.clamped = st->clamped.data(), p.depth = st->depth.data(), p.box = st->bins.box.data();
  parallel_ranges(n, kProjectGrain, threads, [&](int64_t b, int64_t e) { kernel.project(p, b, e); });
  const int tiles = p.tiles_x * p.tiles_y;
  *intersections = st->bins.count(n);
  if (*intersections > kMaxIntersections) return nullptr;
  st->bins.fill(n, p.tiles_x, tiles, p.depth, threads);
  st->final_T.resize(static_cast<size_t>(tiles) * 256), st->stop.resize(static_cast<size_t>(tiles) * 256);
  st->reach.resize(static_cast<size_t>(*intersections));
  Raster r = raster(*st);
  r.out = out, r.alpha = alpha, r.median = median, r.features = features;
  parallel(tiles, threads, [&](int64_t i) { kernel.raster(r, st->bins.heavy_first[i]); });
  return st.release();
} catch (const std::bad_alloc&) {
  return nullptr;
}

// The arrays must be those of the forward call. v_alpha may be null; v_camera: 16 floats, the view's first three rows, fx, fy, cx, cy.
HH_API int hh_splat_backward(void* state, const float* means, const float* quats, const float* scales, const float* opacities, const float* colors,
                             const float* features, const float* v_out, const float* v_alpha, float* v_means, float* v_quats, float* v_scales,
                             float* v_opacities, float* v_colors, float* v_features, float* v_camera, int threads) try {
  State& st = *static_cast<State*>(state);
  Project p = st.project;
  p.means = means, p.quats = quats, p.scales = scales, p.opacities = opacities, p.colors = colors;
  const size_t total = st.bins.order.size();
  st.slots.resize(total * (st.kernel->slot + st.n_features)), st.used.resize(total);
  if (total) std::memset(st.used.data(), 0, total);
  Raster r = raster(st);
  r.v_out = v_out, r.v_alpha = v_alpha, r.features = features, r.slots = st.slots.data(), r.used = st.used.data();
  parallel(p.tiles_x * p.tiles_y, threads, [&](int64_t i) { st.kernel->raster_backward(r, st.bins.heavy_first[i]); });
  const int64_t ranges = (p.n + kProjectGrain - 1) / kProjectGrain;
  std::vector<double> camera(16 * ranges);
  parallel_ranges(p.n, kProjectGrain, threads, [&](int64_t b, int64_t e) {
    const ProjectGrad g = {r.slots, r.used, r.offset, st.n_features, v_means, v_quats, v_scales, v_opacities, v_colors, v_features,
                           &camera[16 * (b / kProjectGrain)]};
    st.kernel->project_backward(p, g, b, e);
  });
  for (int i = 0; i < 16; ++i) {
    double sum = 0;
    for (int64_t c = 0; c < ranges; ++c) sum += camera[16 * c + i];
    v_camera[i] = static_cast<float>(sum);
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
