"""Deployment compiler for diffusion models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from intaglio.exporters.runtime import load

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> object:
    """`load`, which brings torch with it, when it is asked for."""
    if name == "load":
        from intaglio.exporters.runtime import load

        return load
    raise AttributeError(name)
