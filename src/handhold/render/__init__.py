"""Renderers, one plain differentiable function each; the plain-torch path is the specification."""

from .raster import Rasterized, rasterize, soft_silhouette
from .splatting import Splatted, splat
from .volume import Rendered, render_rays

__all__ = ["Rasterized", "Rendered", "Splatted", "rasterize", "render_rays", "soft_silhouette", "splat"]
