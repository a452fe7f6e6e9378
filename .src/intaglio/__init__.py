"""Deployment compiler for diffusion models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from intaglio.exporters.deploy.denoiser import load
    from intaglio.exporters.deploy.pipeline import load_pipeline

__version__ = "0.1.0"
__all__ = ["load", "load_pipeline"]


def __getattr__(name: str) -> object:
    """`load` and `load_pipeline`, which bring torch with them, when they are asked for."""
    if name == "load":
        from intaglio.exporters.deploy.denoiser import load

        return load
    if name == "load_pipeline":
        from intaglio.exporters.deploy.pipeline import load_pipeline

        return load_pipeline
    raise AttributeError(name)
