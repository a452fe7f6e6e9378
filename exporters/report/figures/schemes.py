"""Schemes as the page shows them: colours, codes and phrases, and tables of the layers that have each scheme."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.formats.layer import SCHEME_NAMES, illegal, structural_schemes
from intaglio.pipeline.formats.schemes import FLOAT, IntInput, IntOutput, IntWeight, LayerScheme, PerToken
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
    """Return the CSS class of a scheme: one colour for each pair of bits, and two for W8A8, by its input's scale."""
    match scheme.weight, scheme.input:
        case IntWeight(bits=8), IntInput(bits=8, granularity=granularity):
            return f"s-w8a8_{'token' if isinstance(granularity, PerToken) else 'step'}"
        case IntWeight(bits=4), _:
            return f"s-w4a{scheme.input_bits}"
        case IntWeight() | IntInput(), _:
            return "s-other"
        case _:
            return "s-float"


def scheme_code(scheme: LayerScheme) -> str:
    """Return the code of a scheme, at most two characters: `8t`, `4S`, `4`, or `f` for float.

    The digit is the weight's bits; the letter says whether the input has one scale per token (t) or per step (s), and
    is a capital for a 4-bit input.
    """
    match scheme.weight, scheme.input:
        case IntWeight(bits=bits), IntInput(bits=input_bits, granularity=granularity):
            unit = "t" if isinstance(granularity, PerToken) else "s"
            return f"{bits}{unit if input_bits == 8 else unit.upper()}"
        case IntWeight(bits=bits), _:
            return str(bits)
        case _:
            return "f"


def scheme_meaning(scheme: LayerScheme) -> str:
    """Return one phrase that says how a layer with this scheme computes."""
    match scheme.weight, scheme.input:
        case IntWeight(bits=bits), IntInput(bits=input_bits, granularity=granularity):
            unit = "token" if isinstance(granularity, PerToken) else "denoising step"
            shifted = " around the middle of its range" if scheme.input.shifted else ""
            output = ", 8-bit output" if isinstance(scheme.output, IntOutput) else ""
            return f"{bits}-bit weight, {input_bits}-bit input with one scale per {unit}{shifted}{output}"
        case IntWeight(bits=bits), _:
            return f"{bits}-bit weight, float input"
        case _:
            return "not quantized"


def scheme_rows(plan: QuantPlan) -> tuple[SchemeRow, ...]:
    """Return a row for each scheme that the plan uses, in the order of `SCHEME_NAMES`."""
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
        others = [scheme for scheme in structural_schemes(layer, names=SCHEME_NAMES) if scheme != FLOAT]
        legal = any(illegal(layer, scheme, target) is None for scheme in others)
        reason = plan.reasons.get(
            layer.name, "so planned" if legal else f"{target.name} has no other form for its shape"
        )
        found.setdefault(reason, []).append(layer.name)
    return tuple((reason, tuple(names)) for reason, names in found.items())


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return each name once, in the order of `SCHEME_NAMES`, other names behind them."""
    known = {name: place for place, name in enumerate(SCHEME_NAMES)}
    return tuple(sorted(set(names), key=lambda name: (known.get(name, len(known)), name)))
