"""List all schemes by name.

Options of passes and commands accept these names; saved plans accept the formats of these schemes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, WithJsonSchema

from intaglio.pipeline.errors import did_you_mean
from intaglio.pipeline.formats.fp8 import fp8_schemes
from intaglio.pipeline.formats.nvfp4 import nvfp4_schemes
from intaglio.pipeline.formats.schemes import FLOAT, LayerScheme, int_schemes

Family: TypeAlias = Callable[[int], Iterator[LayerScheme]]
"""Function that yields schemes for a group size in input features."""


def scheme_families() -> tuple[Family, ...]:
    """List the families of schemes, one for each weight format."""
    return (int_schemes, fp8_schemes, nvfp4_schemes)


def known_schemes(group: int = 64) -> Mapping[str, LayerScheme]:
    """Return all schemes by name, float first; grouped weights have `group` input features in each group."""
    return _by_name(scheme_families(), group)


@cache
def _by_name(families: tuple[Family, ...], group: int) -> Mapping[str, LayerScheme]:
    schemes = (FLOAT, *(scheme for family in families for scheme in family(group)))
    return MappingProxyType({scheme.name: scheme for scheme in schemes})


USUAL_SCHEMES = ("float", "w8a8_token", "w8a8_step", "w4a16")
"""Names of the schemes that `sensitivity` measures if the recipe names none. A new scheme is not among them."""


def scheme_names() -> tuple[str, ...]:
    """List the names of all schemes, the usual ones first."""
    return tuple(dict.fromkeys((*USUAL_SCHEMES, *known_schemes())))


def _known_name(name: str) -> str:
    if name not in known_schemes():
        raise ValueError(f"no scheme {name!r}{did_you_mean(name, scheme_names())}")
    return name


SchemeName: TypeAlias = Annotated[
    str, AfterValidator(_known_name), WithJsonSchema({"type": "string", "enum": list(scheme_names())})
]
"""Name of a known scheme."""
