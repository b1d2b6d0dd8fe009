// Compiled once per instruction set, into its own namespace.
#include "isa.h"

#define HH_CAT_(a, b) a##b
#define HH_CAT(a, b) HH_CAT_(a, b)
#define HH_STR_(a) #a
#define HH_STR(a) HH_STR_(a)

#include "simd.h"
#include "grid_isa.h"
#include "render_isa.h"
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
    grid_adam, render_forward, render_backward, kSplatKernels, kDiskKernels,
    blur11, ssim_map, mesh_band, soft_tile, soft_tile_backward,
    bvh_closest, bvh_winding, bvh_rays};
}  // namespace hh
