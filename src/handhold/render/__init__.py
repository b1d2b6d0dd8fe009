"""Renderers: differentiable, the plain-torch path is the specification."""

from .splatting import Splatted, splat

__all__ = ["Splatted", "splat"]
