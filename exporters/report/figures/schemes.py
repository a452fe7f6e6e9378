"""Describe schemes as the page shows them: colours, codes, phrases, and tables of the layers with each scheme."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.formats.known import scheme_names
from intaglio.pipeline.formats.layer import admitted_schemes, unfit
from intaglio.pipeline.formats.schemes import FLOAT, Float, IntInput, LayerScheme, RoundedInput, RoundedWeight
from intaglio.pipeline.formats.target import Target


@dataclass(frozen=True)
class SchemeRow:
    """One scheme, with the layers that have it: their number, share of all weights, and bytes.

    `css` is the class of its colour, `code` its text in a cell, `meaning` its phrase in the legend.
    """

    name: str
    css: str
    code: str
    meaning: str
    layers: int
    weight_share: float
    size_bytes: int


def scheme_css(scheme: LayerScheme) -> str:
    """Return the CSS class of a scheme.

    Each pair of bits has one colour, W8A8 two, by its input's scale, and each format of floating-point numbers one.
    """
    match scheme.weight, scheme.input:
        case Float(), Float():
            return "s-float"
        case RoundedWeight() as weight, _ if weight.grid.floats is not None:
            return f"s-{weight.kind}"
        case RoundedWeight(bits=8), IntInput(bits=8) as form:
            return f"s-w8a8_{form.granularity.label}"
        case RoundedWeight(bits=4), Float() | RoundedInput():
            return f"s-w4a{scheme.input_bits}"
        case ((Float() | RoundedWeight()), (Float() | RoundedInput())):
            return "s-other"
        case other:
            assert_never(other)


def scheme_code(scheme: LayerScheme) -> str:
    """Return the code of a scheme, at most two characters: `8t`, `4S`, `4`, or `f` for float.

    The digit is the weight's bits, or the first letter of a format of floats; the letter says whether the input has one
    scale per token (t), per step (s) or for all calls (a), and is a capital for a 4-bit input.
    """
    if isinstance(scheme.weight, Float):
        return "f"
    weight = str(scheme.weight_bits) if scheme.weight.grid.floats is None else scheme.weight.kind[0].upper()
    match scheme.input:
        case Float():
            return weight
        case RoundedInput(bits=bits, granularity=granularity):
            unit = "a" if scheme.static else granularity.label[0]
            return f"{weight}{unit if bits == 8 else unit.upper()}"
        case other:
            assert_never(other)


def scheme_meaning(scheme: LayerScheme) -> str:
    """Return one phrase that says how a layer with this scheme computes."""
    if isinstance(scheme.weight, Float):
        return "not quantized"
    floats = scheme.weight.grid.floats is not None
    weight = scheme.weight.kind.upper() if floats else f"{scheme.weight_bits}-bit"
    match scheme.input:
        case Float():
            return f"{weight} weight, float input"
        case RoundedInput() as form:
            unit = "for all calls" if scheme.static else "per token" if scheme.by_token else "per denoising step"
            shifted = " around the middle of its range" if scheme.shifted else ""
            output = "" if isinstance(scheme.output, Float) else f", {scheme.output.bits}-bit output"
            entering = form.kind.upper() if floats else f"{form.bits}-bit"
            return f"{weight} weight, {entering} input with one scale {unit}{shifted}{output}"
        case other:
            assert_never(other)


def scheme_rows(plan: QuantPlan) -> tuple[SchemeRow, ...]:
    """Return a row for each scheme that the plan uses, in the order of `scheme_names`."""
    parameters = sum(layer.n * layer.k for layer in plan.layers)
    rows = []
    for name in in_order(scheme.name for scheme in plan.schemes.values()):
        layers = [layer for layer in plan.layers if plan.schemes[layer.name].name == name]
        one = plan.schemes[layers[0].name]
        rows.append(
            SchemeRow(
                name,
                scheme_css(one),
                scheme_code(one),
                scheme_meaning(one),
                len(layers),
                sum(layer.n * layer.k for layer in layers) / parameters,
                sum(map(plan.layer_bytes, layers)),
            )
        )
    return tuple(rows)


def float_rows(plan: QuantPlan, target: Target) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return each reason to stay in float, with the names of the layers that stay in float for it."""
    found: dict[str, list[str]] = {}
    for layer in plan.layers:
        if plan.schemes[layer.name] != FLOAT:
            continue
        others = [scheme for scheme in admitted_schemes(layer) if scheme != FLOAT]
        legal = any(unfit(layer, scheme, target) is None for scheme in others)
        reason = plan.reasons.get(
            layer.name,
            "the plan leaves it in float" if legal else f"{target.name} executes only float for a layer of this shape",
        )
        found.setdefault(reason, []).append(layer.name)
    return tuple((reason, tuple(names)) for reason, names in found.items())


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return each name once, in the order of `scheme_names`, other names after them."""
    known = {name: place for place, name in enumerate(scheme_names())}
    return tuple(sorted(set(names), key=lambda name: (known.get(name, len(known)), name)))
