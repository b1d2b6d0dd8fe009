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

// A 3D Gaussian in the image. The exponent of alpha at a pixel is A dx^2 + B dx dy + C dy^2 + lop, in base 2.
struct alignas(64) Splat {
  float x, y, A, B, C, lop;    // centre in pixels, conic times -log2(e)/2, log2 of the opacity
  float col[3], depth;         // colour, camera z
  float slope, w2, m, top;     // the ellipse's edge at a height t from its centre: slope t +- sqrt(w2 - m t^2); its rightmost point is at t = top
  int32_t id;                  // body channel, or -1
  float op;
};

// A 2D Gaussian (disk) in the image: the ray through pixel (x+dx, y+dy) meets the disk's plane at u = (a1 dx + a2 dy) / cz,
// v = (b1 dx + b2 dy) / cz standard deviations, with cz = d + e dx + f dy, at camera z = zd / cz.
struct alignas(64) Disk {
  float x, y, a1, a2, b1, b2, d, e, f, zd, lop;
  float col[3], depth;
  float box[4];                // pixels that can be reached: x0 y0 x1 y1
  int32_t id;
  float op;
};

struct Project {
  int n, W, H, sh_degree, K;   // sh_degree -1: colours are (n,3) as they are; else (n,K,3) coefficients
  int n_ids, tiles_x, tiles_y;
  float fx, fy, cx, cy, view[12], campos[3];
  const float *means, *quats, *scales, *opacities, *colors;
  const int64_t* ids;          // (n) or null
  void* splats;                // (n) Splat or Disk
  float* depth;                // (n) camera z, the sorting key
  uint8_t* clamped;
  int32_t* box;                // (n,4) tile range x0 y0 x1 y1; empty when culled
};

struct Raster {
  int W, H, tiles_x, n_ids, n_features;
  const void* splats;          // (n) Splat or Disk
  const float* features;       // (n,n_features) or null
  const int64_t* tile_start;   // (tiles+1)
  const int32_t* order;        // splat of each intersection, by tile and depth
  float* final_T;              // (tiles,256) block layout
  uint64_t* reach;             // (intersections) blocks of the tile that the splat was drawn on
  int32_t* stop;               // (tiles,256) place in the tile's list at which a pixel stopped; the list's length where it did not
  float *out, *alpha;          // (H,W,4+n_features+n_ids) (H,W)
  int32_t* median;             // (H,W) splat at which the transmittance falls to 1/2, or -1
  // backward
  const float *v_out, *v_alpha;
  const int32_t* box;
  const int64_t* offset;       // (n+1) first slot of each splat
  uint8_t* used;               // (intersections) 1 where the slot has been written
  float* slots;                // (intersections, kSlot + n_features)
};

struct ProjectGrad {
  const float* slots;
  const uint8_t* used;
  const int64_t* offset;
  int n_features;
  float *means, *quats, *scales, *opacities, *colors, *features;
  double* camera;              // 16 sums of this range: view (3,4), fx, fy, cx, cy
};

struct SplatKernels {
  int splat_bytes, slot;       // size of a Splat or Disk; floats in a slot before the features
  void (*project)(const Project&, int64_t b, int64_t e);
  void (*raster)(const Raster&, int tile);
  void (*raster_backward)(const Raster&, int tile);
  void (*project_backward)(const Project&, const ProjectGrad&, int64_t b, int64_t e);
};

struct MeshFace {
  double a[3], b[3], c[3];     // edge functions a x + b y + c over pixel positions, positive inside
  double threshold[3];         // what they must exceed: the fill rule for pixels on an edge
  double z[3];                 // 1/z = z[0] x + z[1] y + z[2]
  int32_t x0, y0, x1, y1;      // pixels it may cover; empty when it is not drawn
};

struct SoftArgs {
  int W, H, tiles_x;
  float reach, inv_sigma2;     // pixels beyond which a triangle has no grip; 1/sigma^2
  const double* screen;        // (V,2) pixels
  const int64_t* faces;
  const int64_t* start;        // (tiles+1)
  const int32_t* order;        // face of each pair of tile and face
  int64_t* last;               // (tiles) end of the pairs that were needed
  float* transparency;         // (tiles,64)
  float* out;                  // (H,W)
  const float* v_out;          // backward
  float* slots;                // (pairs,6)
};

// Eight children of a tree over triangles, in coordinates where the mesh fills [-1,1]^3. child >= 0: a node; else ~triangle.
struct alignas(32) BvhNode {
  float lo[3][8], hi[3][8];
  int32_t child[8];
  int32_t count;
};

// The same children seen from afar: sum of area normals about the centre of area, first moments (xx yy zz xy xz yz).
struct alignas(32) BvhDipole {
  float centre[3][8], radius2[8], normal[3][8], moment[6][8];
};

struct BvhView {
  const BvhNode* nodes;
  const BvhDipole* dipoles;
  const double* triangles;     // (n,9) in tree order, scaled
  const int64_t* face;         // (n) the caller's index
  double centre[3], scale;
};

struct Kernels {
  const char* name;
  void (*grid_sample)(const GridView&, const float* x, int64_t b, int64_t e, float* val, float* grad);
  void (*grid_scatter)(const GridView&, const float* x, const int32_t* list, int64_t n, const float* v_val, const float* v_grad, int slab0, int slab1,
                       float* v_data, uint8_t* rows);
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
  SplatKernels splat, disk;
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
  void (*mesh_band)(const MeshFace* faces, const int32_t* order, int64_t b, int64_t e, int y0, int y1, int stride, double inv_near,
                    double* inv_z, int64_t* face);
  void (*soft_tile)(const SoftArgs&, int tile);
  void (*soft_tile_backward)(const SoftArgs&, int tile);
  void (*bvh_closest)(const BvhView&, const double* points, int64_t b, int64_t e, int64_t* face, double* bary, double* d2);
  void (*bvh_winding)(const BvhView&, const double* points, int64_t b, int64_t e, float beta2, double* out);
  void (*bvh_rays)(const BvhView&, const double* o, const double* d, int64_t b, int64_t e, int64_t* face, double* bary, double* t);
};

const Kernels& kernels();  // the best set this processor runs (HANDHOLD_ISA=base forces the baseline)

}  // namespace hh

#define HH_API extern "C" __attribute__((visibility("default")))
