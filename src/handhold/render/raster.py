"""Pictures of triangle meshes. The depth test itself is geometry (`geometry.raster`), so that shapes may ask it too."""

from __future__ import annotations

from ..geometry.raster import depth_image

__all__ = ["depth_image"]
