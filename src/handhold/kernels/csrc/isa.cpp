// Compiled once per instruction set, into its own namespace.
#include "isa.h"

#define HH_CAT_(a, b) a##b
#define HH_CAT(a, b) HH_CAT_(a, b)
#define HH_STR_(a) #a
#define HH_STR(a) HH_STR_(a)

#include "simd.h"
#include "grid_isa.h"
#include "grid_update_isa.h"
#include "render_isa.h"
#include "encode_isa.h"
#include "encode_fourier_isa.h"
#include "encode_triplane_isa.h"
#include "splat_shade_isa.h"
#include "splat_ewa_isa.h"
#include "splat_disk_isa.h"
#include "splat_raster_isa.h"
#include "ssim_isa.h"
#include "raster_isa.h"
#include "soft_isa.h"
#include "bvh_isa.h"

namespace hh {
extern const Kernels HH_CAT(kernels_, HH_ISA);
const Kernels HH_CAT(kernels_, HH_ISA) = {
    HH_STR(HH_ISA), grid_sample, grid_scatter, grid_v_x, grid_march, grid_extract, grid_reg_flux, grid_reg_gather, grid_blur_plane, grid_blur_across,
    grid_scan, grid_slab, grid_blur_next, grid_step, render_forward, render_backward, kSplatKernels, kDiskKernels,
    encode_forward, encode_v_table, encode_v_x, fourier_forward, fourier_v_x, triplane_forward, triplane_v_planes, triplane_v_x,
    blur11, ssim_map, mesh_band, soft_tile, soft_tile_backward, bvh_closest, bvh_winding, bvh_rays};
}  // namespace hh
