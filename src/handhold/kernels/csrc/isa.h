// What each instruction set provides: plain functions over ranges of raw arrays. Threads and memory live with the callers.
// isa.cpp is compiled once per instruction set; it must not use inline library templates, which the linker would merge
// across the two builds and so leak AVX2 code into the baseline.
#pragma once
#include <cstdint>

namespace hh {

// (R,R,R,4) float32: channel 0 signed distance, 1-3 raw colour. Voxel (i,j,k) lies at lo + h (i,j,k).
struct GridView {
  const float* data;
  int R;
  float lo[3], h;
};

constexpr int kMaxGrid = 1024;  // voxels per axis

// Columns [lo,hi) of a row; empty when hi <= lo.
struct Span {
  int32_t lo, hi;
};

// One step of regularisers, blur and Adam; see SdfGrid.update.
struct GridUpdate {
  int R, blur;
  float h, w_eik, w_lap, band, scale;             // scale: 1 / number of voxels in the band
  float lr_sdf, lr_color, b1, b2, c1, c2, eps;
  float *data, *v_data;                           // (R,R,R,4)
  float *m, *v;                                   // (4,R,R,R) moments
  float *f, *a;                                   // (R,R,R) channel 0 of data; its gradient on its way through the blur
  bool refresh;                                   // f is to be read anew
  uint8_t* rows;                                  // (R,R) not 0 where v_data may not be
  Span *band_span, *v_span, *a_span;              // (R,R) rows: in the band, with a sample's gradient, of a
  Span* ever;                                     // (R,R) rows: all v_span so far
  double *sums, *rms;                             // (R,3) eikonal, Laplacian, count; (R,2) second moment and its count
};

// NeuS compositing of one ray batch: samples at t (n,S) along o + t d.
struct RenderArgs {
  GridView grid;
  int S;
  float beta;
  const float *o, *d, *t;                   // (n,3) (n,3) (n,S)
  float *rgb, *acc, *depth;                 // forward: (n,3) (n) (n)
  float* seen;                              // (n,4,S) value at the samples, written by the forward and read by the backward
  const float *v_rgb, *v_acc, *v_depth;     // backward inputs
  float *x, *v_val;                         // backward outputs per sample: position (n*S,3) and dL/dval (n*S,4)
  float *v_o, *v_d;                         // backward, optional (n,3)
  float *v_beta;                            // backward, optional (n): one term per ray
};

constexpr int kMaxLevels = 32;

struct EncodeLevel {
  int64_t offset;  // first row of the level in the table
  int32_t res;     // cells per axis; (res + 1)^3 corners
  uint32_t mask;   // rows - 1 of a hashed level, 0 for a dense one
  float weight;
};

// Multiresolution grid on a box: u = (x - lo) * inv in [0,1]. D = F L concatenated, or F summed.
struct EncodeArgs {
  int64_t n;
  int F, L, D;
  bool smooth, sum;
  float lo[3], inv[3];
  EncodeLevel levels[kMaxLevels];
  const float *x, *table;            // (n,3) (rows,F)
  float *val, *jac;                  // (n,D) (n,D,3)
  const float *v_val, *v_jac;        // either may be null
  float *v_table, *v_x;
};

struct TriplaneArgs {
  int64_t n;
  int R, C;
  bool align_corners, sum;
  float lo[3], inv[3];
  const float *x, *planes;           // (n,3) (3,R,R,C)
  float *val, *jac;                  // (n,D) (n,D,3), D = C or 3C
  const float *v_val, *v_jac;        // either may be null
  float *v_planes, *v_x;
};

struct FourierArgs {
  int bands;
  bool pi, identity;
  const float *x, *weights;          // (n,3) (bands)
  float *val, *jac;                  // (n,D) (n,D,3), D = 3 (identity + 2 bands)
  const float *v_val, *v_jac;        // either may be null
  float* v_x;
};

struct alignas(64) Splat {
  float x, y, a, b, c, op;     // centre in pixels, conic, opacity
  float smax, ex, ey, depth;   // ln(255 op), half extents in pixels, camera z
  float col[3];
  int32_t id;                  // body channel, or -1
  float pad[2];
};

struct Project {
  int n, W, H, sh_degree, K;   // sh_degree -1: colours are (n,3) as they are; else (n,K,3) coefficients
  int n_ids, tiles_x, tiles_y;
  float fx, fy, cx, cy, view[12], campos[3];
  const float *means, *quats, *scales, *opacities, *colors;
  const int64_t* ids;          // (n) or null
  Splat* splats;
  uint8_t* clamped;
  int32_t* box;                // (n,4) tile range x0 y0 x1 y1; empty when culled
};

struct Raster {
  int W, H, tiles_x, n_ids;
  const Splat* splats;
  const int64_t* tile_start;   // (tiles+1)
  const int32_t* order;        // splat of each intersection, by tile and depth
  float* final_T;              // (tiles,256) block layout
  int32_t* last;               // (tiles,256)
  float *out, *alpha;          // (H,W,4+n_ids) (H,W)
  // backward
  const float *v_out, *v_alpha;
  const int32_t* box;
  const int64_t* offset;       // (n+1) first slot of each splat
  float* slots;                // (intersections,10)
};

struct ProjectGrad {
  const float* slots;
  const int64_t* offset;
  float *means, *quats, *scales, *opacities, *colors;
  double* view;                // 12 sums of this range
};

struct Kernels {
  const char* name;
  void (*grid_sample)(const GridView&, const float* x, int64_t b, int64_t e, float* val, float* grad);
  void (*grid_scatter)(const GridView&, const float* x, int64_t n, const float* v_val, const float* v_grad, int slab0, int slab1, float* v_data,
                       uint8_t* rows);
  void (*grid_v_x)(const GridView&, const float* x, int64_t b, int64_t e, const float* v_val, const float* v_grad, float* v_x);
  void (*grid_march)(const GridView&, const float* field, const float* o, const float* d, int64_t b, int64_t e, float min_step, float band, float* t0,
                     float* t1, float* phi_min);
  void (*grid_extract)(const GridView&, int plane, float* f);
  void (*grid_reg_flux)(int R, int plane, const float* f, float h, float w_eik, float w_lap, float band, float* flux, double* sums);
  void (*grid_reg_gather)(int R, int plane, float scale, const float* flux, float* row, float* v_data);
  void (*grid_blur_plane)(int R, int plane, const float* v_data, float* a, float* b);
  void (*grid_blur_across)(int R, int plane, const float* a, float* b, float* v_data);
  void (*grid_scan)(const GridUpdate&, int plane);
  void (*grid_slab)(const GridUpdate&, int plane0, int plane1, float* work, Span* spans);
  void (*grid_blur_next)(const GridUpdate&, int plane, const float* from, const Span* from_span, float* to, Span* to_span, float* work, Span* spans);
  void (*grid_step)(const GridUpdate&, int plane, const float* from, const Span* span, float* row);
  void (*render_forward)(const RenderArgs&, int64_t b, int64_t e);
  void (*render_backward)(const RenderArgs&, int64_t b, int64_t e);
  void (*splat_project)(const Project&, int64_t b, int64_t e);
  void (*splat_raster)(const Raster&, int tile);
  void (*splat_raster_backward)(const Raster&, int tile);
  void (*splat_project_backward)(const Project&, const ProjectGrad&, int64_t b, int64_t e);
  void (*encode_forward)(const EncodeArgs&, int64_t b, int64_t e);
  void (*encode_v_table)(const EncodeArgs&, int l0, int l1);
  void (*encode_v_x)(const EncodeArgs&, int64_t b, int64_t e);
  void (*fourier_forward)(const FourierArgs&, int64_t b, int64_t e);
  void (*fourier_v_x)(const FourierArgs&, int64_t b, int64_t e);
  void (*triplane_forward)(const TriplaneArgs&, int64_t b, int64_t e);
  void (*triplane_v_planes)(const TriplaneArgs&, int plane, int row0, int row1);
  void (*triplane_v_x)(const TriplaneArgs&, int64_t b, int64_t e);
  void (*blur11)(const float* in, int W, int H, int y0, int y1, const float* taps, float* row, float* out, int axis);
  void (*ssim_map)(const float* const* moments, int64_t b, int64_t e, float scale, float* d_m1, float* d_e11, float* d_e12,
                   double* sum);
};

const Kernels& kernels();  // the best set this processor runs (HANDHOLD_ISA=base forces the baseline)

}  // namespace hh

#define HH_API extern "C" __attribute__((visibility("default")))
