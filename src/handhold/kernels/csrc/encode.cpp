// C ABI of the field encodings: threads and the order of sums. The arithmetic is in the encode_*isa.h files.
#include <algorithm>

#include "isa.h"
#include "pool.h"

using namespace hh;

namespace {

constexpr int64_t kGrain = 2048;

// levels: (L,3) first row, cells per axis, hash mask (0: dense). box: lo, 1 / extent. flags: 1 smoothstep, 2 sum over levels.
EncodeArgs encode_args(int64_t n, const float* x, const float* table, int F, int L, const int64_t* levels, const float* weights, const float* box, int flags) {
  EncodeArgs a{};
  a.n = n, a.x = x, a.table = table, a.F = F, a.L = std::min(L, kMaxLevels), a.smooth = flags & 1, a.sum = flags & 2;
  a.D = a.sum ? F : a.L * F;
  for (int k = 0; k < 3; ++k) a.lo[k] = box[k], a.inv[k] = box[3 + k];
  for (int l = 0; l < a.L; ++l) {
    a.levels[l] = {levels[3 * l], static_cast<int32_t>(levels[3 * l + 1]), static_cast<uint32_t>(levels[3 * l + 2]), weights[l]};
  }
  return a;
}

// flags: 1 align_corners, 2 sum over planes.
TriplaneArgs triplane_args(int64_t n, const float* x, const float* planes, int R, int C, const float* box, int flags) {
  TriplaneArgs a{};
  a.n = n, a.x = x, a.planes = planes, a.R = R, a.C = C, a.align_corners = flags & 1, a.sum = flags & 2;
  for (int k = 0; k < 3; ++k) a.lo[k] = box[k], a.inv[k] = box[3 + k];
  return a;
}

}  // namespace

HH_API void hh_encode_forward(int64_t n, const float* x, const float* table, int F, int L, const int64_t* levels, const float* weights, const float* box,
                              int flags, float* val, float* jac, int threads) {
  EncodeArgs a = encode_args(n, x, table, F, L, levels, weights, box, flags);
  a.val = val, a.jac = jac;
  parallel_ranges(n, kGrain, threads, [&](int64_t b, int64_t e) { kernels().encode_forward(a, b, e); });
}

// Adds to v_table, writes v_x; v_val, v_jac, v_table and v_x may be null.
HH_API void hh_encode_backward(int64_t n, const float* x, const float* table, int F, int L, const int64_t* levels, const float* weights, const float* box,
                               int flags, const float* v_val, const float* v_jac, float* v_table, float* v_x, int threads) {
  EncodeArgs a = encode_args(n, x, table, F, L, levels, weights, box, flags);
  a.v_val = v_val, a.v_jac = v_jac, a.v_table = v_table, a.v_x = v_x;
  if (v_table) {  // levels share no rows, and within a level the points go in order: the same bits for any dealing
    const int parts = std::max(1, std::min(threads, a.L));
    parallel(parts, threads, [&](int64_t k) { kernels().encode_v_table(a, static_cast<int>(k * a.L / parts), static_cast<int>((k + 1) * a.L / parts)); });
  }
  if (v_x) parallel_ranges(n, kGrain, threads, [&](int64_t b, int64_t e) { kernels().encode_v_x(a, b, e); });
}

// flags: 1 frequencies times pi, 2 the position first.
HH_API void hh_fourier_forward(int64_t n, const float* x, int bands, const float* weights, int flags, float* val, float* jac, int threads) {
  FourierArgs a{};
  a.x = x, a.bands = bands, a.weights = weights, a.pi = flags & 1, a.identity = flags & 2, a.val = val, a.jac = jac;
  parallel_ranges(n, kGrain, threads, [&](int64_t b, int64_t e) { kernels().fourier_forward(a, b, e); });
}

HH_API void hh_fourier_backward(int64_t n, const float* x, int bands, const float* weights, int flags, const float* v_val, const float* v_jac, float* v_x,
                                int threads) {
  FourierArgs a{};
  a.x = x, a.bands = bands, a.weights = weights, a.pi = flags & 1, a.identity = flags & 2, a.v_val = v_val, a.v_jac = v_jac, a.v_x = v_x;
  parallel_ranges(n, kGrain, threads, [&](int64_t b, int64_t e) { kernels().fourier_v_x(a, b, e); });
}

HH_API void hh_triplane_forward(int64_t n, const float* x, const float* planes, int R, int C, const float* box, int flags, float* val, float* jac,
                                int threads) {
  TriplaneArgs a = triplane_args(n, x, planes, R, C, box, flags);
  a.val = val, a.jac = jac;
  parallel_ranges(n, kGrain, threads, [&](int64_t b, int64_t e) { kernels().triplane_forward(a, b, e); });
}

// As hh_encode_backward.
HH_API void hh_triplane_backward(int64_t n, const float* x, const float* planes, int R, int C, const float* box, int flags, const float* v_val,
                                 const float* v_jac, float* v_planes, float* v_x, int threads) {
  TriplaneArgs a = triplane_args(n, x, planes, R, C, box, flags);
  a.v_val = v_val, a.v_jac = v_jac, a.v_planes = v_planes, a.v_x = v_x;
  if (v_planes) {
    const int bands = threads <= 1 ? 1 : std::min(R, (threads * 2 + 2) / 3);  // several per thread even out the load
    parallel(3 * bands, threads, [&](int64_t k) {
      const int64_t band = k % bands;
      kernels().triplane_v_planes(a, static_cast<int>(k / bands), static_cast<int>(band * R / bands), static_cast<int>((band + 1) * R / bands));
    });
  }
  if (v_x) parallel_ranges(n, kGrain, threads, [&](int64_t b, int64_t e) { kernels().triplane_v_x(a, b, e); });
}
