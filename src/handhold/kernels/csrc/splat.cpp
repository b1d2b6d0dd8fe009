// C ABI of the splatting rasteriser: memory, depth order, tile lists, threads. The arithmetic is in splat_*_isa.h.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "pool.h"

using namespace hh;

namespace {

constexpr int kTile = 16, kSlot = 10;
constexpr int64_t kProjectGrain = 512;

// What forward leaves for backward. The parameter arrays stay the caller's and are passed again.
struct State {
  Project project{};
  std::vector<Splat> splats;
  std::vector<uint8_t> clamped;
  std::vector<int32_t> box, order, last, heavy_first;
  std::vector<int64_t> offset, tile_start;
  std::vector<float> final_T;
};

// Radix sort of the visible splats by depth, then a counting sort into tiles: each tile's list comes out in depth order.
void bin(State& st, int n, int tiles_x, int tiles) {
  std::vector<uint32_t> key, key2;
  std::vector<int32_t> index, index2;
  key.reserve(n), index.reserve(n);
  st.offset.resize(n + 1);
  st.tile_start.assign(tiles + 1, 0);
  int64_t total = 0;
  uint32_t lo = ~0u, hi = 0;
  for (int i = 0; i < n; ++i) {
    st.offset[i] = total;
    const int32_t* b = &st.box[4 * static_cast<size_t>(i)];
    if (b[2] <= b[0] || b[3] <= b[1]) continue;
    total += static_cast<int64_t>(b[2] - b[0]) * (b[3] - b[1]);
    uint32_t k;  // positive floats order like their bits
    std::memcpy(&k, &st.splats[i].depth, 4);
    lo = std::min(lo, k), hi = std::max(hi, k);
    key.push_back(k), index.push_back(i);
    for (int y = b[1]; y < b[3]; ++y)
      for (int x = b[0]; x < b[2]; ++x) st.tile_start[y * tiles_x + x + 1]++;
  }
  st.offset[n] = total;
  const size_t m = key.size();
  key2.resize(m), index2.resize(m);
  for (uint32_t& k : key) k -= lo;
  for (int shift = 0; m && shift < 32 && ((hi - lo) >> shift); shift += 11) {
    uint32_t first[2049] = {0};
    for (size_t i = 0; i < m; ++i) first[((key[i] >> shift) & 2047) + 1]++;
    for (int i = 0; i < 2048; ++i) first[i + 1] += first[i];
    for (size_t i = 0; i < m; ++i) {
      const uint32_t p = first[(key[i] >> shift) & 2047]++;
      key2[p] = key[i], index2[p] = index[i];
    }
    key.swap(key2), index.swap(index2);
  }
  for (int t = 0; t < tiles; ++t) st.tile_start[t + 1] += st.tile_start[t];
  st.order.resize(total);
  std::vector<int64_t> at(st.tile_start.begin(), st.tile_start.end() - 1);
  for (int32_t i : index) {
    const int32_t* b = &st.box[4 * static_cast<size_t>(i)];
    for (int y = b[1]; y < b[3]; ++y)
      for (int x = b[0]; x < b[2]; ++x) st.order[at[y * tiles_x + x]++] = i;
  }
  st.heavy_first.resize(tiles);  // long tiles first, so that the threads finish together
  for (int t = 0; t < tiles; ++t) st.heavy_first[t] = t;
  std::stable_sort(st.heavy_first.begin(), st.heavy_first.end(), [&](int a, int b) {
    return st.tile_start[a + 1] - st.tile_start[a] > st.tile_start[b + 1] - st.tile_start[b];
  });
}

Raster raster(State& st) {
  Raster r{};
  const Project& p = st.project;
  r.W = p.W, r.H = p.H, r.tiles_x = p.tiles_x, r.n_ids = p.n_ids;
  r.splats = st.splats.data(), r.tile_start = st.tile_start.data(), r.order = st.order.data();
  r.final_T = st.final_T.data(), r.last = st.last.data(), r.box = st.box.data(), r.offset = st.offset.data();
  return r;
}

}  // namespace

HH_API void hh_splat_free(void* state) { delete static_cast<State*>(state); }

// out (H,W,4+n_ids): rgb, depth and body weights, premultiplied, on black; alpha (H,W). view: 4x4 row-major camera-from-world.
// Returns what backward needs, to be freed by hh_splat_free; null when memory runs out.
HH_API void* hh_splat_forward(int n, int W, int H, int n_ids, int sh_degree, int K, const float* means, const float* quats, const float* scales,
                              const float* opacities, const float* colors, const int64_t* ids, const float* view, const float* intrinsics, float* out,
                              float* alpha, int threads) try {
  auto st = std::make_unique<State>();
  Project& p = st->project;
  p.n = n, p.W = W, p.H = H, p.n_ids = n_ids, p.sh_degree = sh_degree, p.K = K;
  p.tiles_x = (W + kTile - 1) / kTile, p.tiles_y = (H + kTile - 1) / kTile;
  p.fx = intrinsics[0], p.cx = intrinsics[2], p.fy = intrinsics[4], p.cy = intrinsics[5];
  std::memcpy(p.view, view, sizeof p.view);
  for (int j = 0; j < 3; ++j) p.campos[j] = -(view[j] * view[3] + view[4 + j] * view[7] + view[8 + j] * view[11]);
  p.means = means, p.quats = quats, p.scales = scales, p.opacities = opacities, p.colors = colors, p.ids = ids;
  st->splats.resize(n), st->clamped.resize(n), st->box.resize(4 * static_cast<size_t>(n));
  p.splats = st->splats.data(), p.clamped = st->clamped.data(), p.box = st->box.data();
  parallel_ranges(n, kProjectGrain, threads, [&](int64_t b, int64_t e) { kernels().splat_project(p, b, e); });
  const int tiles = p.tiles_x * p.tiles_y;
  bin(*st, n, p.tiles_x, tiles);
  st->final_T.resize(static_cast<size_t>(tiles) * 256), st->last.resize(static_cast<size_t>(tiles) * 256);
  Raster r = raster(*st);
  r.out = out, r.alpha = alpha;
  parallel(tiles, threads, [&](int64_t i) { kernels().splat_raster(r, st->heavy_first[i]); });
  return st.release();
} catch (const std::bad_alloc&) {
  return nullptr;
}

// The arrays must be those of the forward call. v_alpha may be null; v_view: (4,4), its last row is not written.
HH_API int hh_splat_backward(void* state, const float* means, const float* quats, const float* scales, const float* opacities, const float* colors,
                             const float* v_out, const float* v_alpha, float* v_means, float* v_quats, float* v_scales, float* v_opacities,
                             float* v_colors, float* v_view, int threads) try {
  State& st = *static_cast<State*>(state);
  Project p = st.project;
  p.means = means, p.quats = quats, p.scales = scales, p.opacities = opacities, p.colors = colors;
  const std::unique_ptr<float[]> slots(new float[st.order.size() * kSlot + 1]);
  Raster r = raster(st);
  r.v_out = v_out, r.v_alpha = v_alpha, r.slots = slots.get();
  parallel(p.tiles_x * p.tiles_y, threads, [&](int64_t i) { kernels().splat_raster_backward(r, st.heavy_first[i]); });
  const int64_t ranges = (p.n + kProjectGrain - 1) / kProjectGrain;
  std::vector<double> view(12 * ranges);
  parallel_ranges(p.n, kProjectGrain, threads, [&](int64_t b, int64_t e) {
    const ProjectGrad g = {slots.get(), st.offset.data(), v_means, v_quats, v_scales, v_opacities, v_colors, &view[12 * (b / kProjectGrain)]};
    kernels().splat_project_backward(p, g, b, e);
  });
  for (int i = 0; i < 12; ++i) {
    double total = 0;
    for (int64_t c = 0; c < ranges; ++c) total += view[12 * c + i];
    v_view[i] = static_cast<float>(total);
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
