"""List all schemes by name, and read from JSON the schemes whose formats are among theirs.

Options of passes and commands accept the names; files of artifacts accept the formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, SerializeAsAny, ValidationError, WithJsonSchema

from intaglio.pipeline.errors import did_you_mean
from intaglio.pipeline.files import damaged_places, printable
from intaglio.pipeline.formats.fp8 import fp8_schemes
from intaglio.pipeline.formats.inputs import Float, RoundedInput
from intaglio.pipeline.formats.nvfp4 import nvfp4_schemes
from intaglio.pipeline.formats.schemes import FLOAT, LayerScheme, int_schemes
from intaglio.pipeline.formats.weights import RoundedWeight

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


def _weight(written: object) -> object:
    """Return the weight format that JSON describes by its `kind`. Raises ValueError if there is no such format."""
    return _format(written, "weight")


def _input(written: object) -> object:
    """Return the input format that JSON describes by its `kind`. Raises ValueError if there is no such format."""
    return _format(written, "input")


def _format(written: object, part: Literal["weight", "input"]) -> object:
    if isinstance(written, Float | RoundedWeight | RoundedInput):
        return written
    if not isinstance(written, dict):
        raise ValueError(f"no {part} format: {printable(written)!r}")
    known = [getattr(scheme, part) for scheme in known_schemes().values()]
    formats = {form.kind: type(form) for form in known}
    if (kind := written.get("kind")) not in formats:
        raise ValueError(f"no {part} format of kind {printable(kind)!r}: {', '.join(formats)}")
    try:
        return formats[kind].model_validate(written, strict=True)
    except ValidationError as e:
        raise ValueError(f"{kind}: {damaged_places(e)}") from e


def _scheme(written: object) -> object:
    """Return what JSON says of a scheme, with its weight and its input as formats. Raises ValueError as they do."""
    if not isinstance(written, dict):
        return written
    parts: tuple[Literal["weight", "input"], ...] = ("weight", "input")
    return {**written, **{part: _format(written[part], part) for part in parts if part in written}}


WeightFormat: TypeAlias = Annotated[Float | RoundedWeight, BeforeValidator(_weight), SerializeAsAny()]
"""Weight format that is read from JSON by its `kind`."""
InputFormat: TypeAlias = Annotated[Float | RoundedInput, BeforeValidator(_input), SerializeAsAny()]
"""Input format that is read from JSON by its `kind`."""
StoredScheme: TypeAlias = Annotated[LayerScheme, BeforeValidator(_scheme)]
"""Scheme that is read from JSON by the `kind` of its formats."""
