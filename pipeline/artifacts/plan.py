"""The decision: one scheme for every quantizable layer.

Shapes: N out features, K in features (of a convolution: input channels times kernel).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from pydantic import ConfigDict, model_validator

from intaglio.pipeline.errors import ContractError, RecipeError, TargetError
from intaglio.pipeline.files import printable, read_typed
from intaglio.pipeline.formats.layer import Layer, illegal
from intaglio.pipeline.formats.schemes import (
    FLOAT,
    InputFormat,
    IntWeight,
    LayerScheme,
    OutputFormat,
    WeightFormat,
)

if TYPE_CHECKING:
    from intaglio.pipeline.formats.target import Target
    from intaglio.pipeline.numerics.basis import LayerBalance
    from intaglio.pipeline.numerics.low_rank import Branch


NAMED = 12
"""Layers that one log line names for a reason; plan.json names all."""


def in_float_lines(reasons: Mapping[str, str]) -> list[str]:
    """One line for each reason to stay in float, with the layers that it holds for, by `reasons` of their names.

    >>> in_float_lines({"a": "it is never called", "b": "it is never called"})
    ['2 layers stay in float, it is never called: a, b']
    """
    lines = []
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name, why in reasons.items() if why == reason]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        stay = "layer stays" if len(names) == 1 else "layers stay"
        lines.append(f"{len(names)} {stay} in float, {reason}: {', '.join(names[:NAMED])}{more}")
    return lines


@dataclass(frozen=True)
class QuantPlan:
    """One scheme for every quantizable layer, by its name in the model. Total: no default, no wildcard.

    `balances` has the layers that are rounded in another basis of their input; it goes with any scheme but float.
    `branches` has those of which a part of the weight stays in float. `reasons` says of layers that can only stay in
    float why that is so.
    """

    layers: tuple[Layer, ...]
    schemes: Mapping[str, LayerScheme]
    balances: Mapping[str, LayerBalance] = field(default_factory=dict)
    branches: Mapping[str, Branch] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named, planned = {layer.name for layer in self.layers}, set(self.schemes)
        if named != planned:
            missing, unknown = sorted(named - planned), sorted(planned - named)
            raise ContractError(f"a plan names every layer once: missing {missing}, unknown {unknown}")
        channels = {n.name: n.shape[1] for n in self.layers if isinstance(self.schemes[n.name].weight, IntWeight)}
        if wrong := sorted(n for n, b in self.balances.items() if len(b.balance.scale_C) != channels.get(n)):
            raise ContractError(f"a balance is for a quantized layer, with a scale for each input channel: {wrong}")
        weights = {n.name: (n.n, n.k) for n in self.layers if n.name in channels}
        shapes = {n: (len(b.up_NR), b.down_RK.shape[1]) for n, b in self.branches.items()}
        if wrong := sorted(n for n, shape in shapes.items() if shape != weights.get(n)):
            raise ContractError(f"a branch is for a quantized layer, of its weight's shape: {wrong}")
        if wrong := sorted(n for n in self.reasons if self.schemes.get(n) != FLOAT):
            raise ContractError(f"a reason to stay in float is for a layer in float: {wrong}")

    def check(self, target: Target) -> None:
        """Raise TargetError that lists every layer whose scheme the target cannot execute."""
        reasons = [r for layer in self.layers if (r := illegal(layer, self.schemes[layer.name], target))]
        if reasons:
            raise TargetError(*reasons)

    def replace(self, changes: Mapping[str, LayerScheme]) -> QuantPlan:
        """A plan with these layers changed; those in float have no balance and no branch any more."""
        schemes = {**self.schemes, **changes}
        balances = {n: b for n, b in self.balances.items() if schemes[n] != FLOAT}
        branches = {n: b for n, b in self.branches.items() if schemes[n] != FLOAT}
        reasons = {n: reason for n, reason in self.reasons.items() if schemes[n] == FLOAT}
        return QuantPlan(self.layers, schemes, balances, branches, reasons)

    def left_in_float(self, reasons: Mapping[str, str]) -> QuantPlan:
        """A plan with these layers of it in float, for these reasons."""
        known = {n: reason for n, reason in reasons.items() if n in self.schemes}
        changed = self.replace(dict.fromkeys(known, FLOAT))
        return QuantPlan(changed.layers, changed.schemes, changed.balances, changed.branches, {**self.reasons, **known})

    def balanced(
        self, balances: Mapping[str, LayerBalance], branches: Mapping[str, Branch] = MappingProxyType({})
    ) -> QuantPlan:
        """A plan with these layers in another basis, and with these branches, beside those that are already."""
        merged = {**self.balances, **balances}, {**self.branches, **branches}
        return QuantPlan(self.layers, self.schemes, *merged, self.reasons)

    @property
    def quantized(self) -> int:
        """Number of layers that do not stay in float."""
        return sum(scheme != FLOAT for scheme in self.schemes.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all quantizable layers."""
        return sum(map(self.layer_bytes, self.layers))

    def layer_bytes(self, layer: Layer) -> int:
        """With its branch."""
        branch = self.branches.get(layer.name)
        return layer.size_bytes(self.schemes[layer.name]) + (0 if branch is None else branch.size_bytes)

    @property
    def weight_bits_mean(self) -> float:
        """Bits a weight, weighted by parameters; 16 for a layer in float, and for a plan without layers."""
        total = sum(layer.n * layer.k for layer in self.layers)
        bits = sum(layer.n * layer.k * self.schemes[layer.name].weight_bits for layer in self.layers)
        return bits / total if total else float(FLOAT.weight_bits)

    def save(self, root: Path) -> None:
        """Write plan.json, balance.safetensors where a layer is balanced, branch.safetensors where one has a branch."""
        rows = [
            {
                **layer.model_dump(mode="json"),
                "scheme": (scheme := self.schemes[layer.name]).name,
                **scheme.model_dump(mode="json"),
                "size_bytes": self.layer_bytes(layer),
                **({"rotated": self.balances[layer.name].balance.block} if layer.name in self.balances else {}),
                **({"branch": self.branches[layer.name].rank} if layer.name in self.branches else {}),
                **({"reason": self.reasons[layer.name]} if layer.name in self.reasons else {}),
            }
            for layer in self.layers
        ]
        if self.balances:
            from intaglio.pipeline.numerics.basis import save_balances

            save_balances(self.balances, root / "balance.safetensors")
        if self.branches:
            from intaglio.pipeline.numerics.low_rank import save_branches

            save_branches(self.branches, root / "branch.safetensors")
        (root / "plan.json").write_text(json.dumps({"layers": rows}, indent=1) + "\n")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        file = root / "plan.json"
        rows = read_typed(file, _Content).layers
        layers = tuple(Layer(**{name: getattr(row, name) for name in Layer.model_fields}) for row in rows)
        schemes = {row.name: LayerScheme(weight=row.weight, input=row.input, output=row.output) for row in rows}
        if len(schemes) < len(rows):
            problem = f"{len(rows)} rows of {len(schemes)} layers: a name is there twice"
            raise RecipeError(f"{printable(file)}: is damaged: layers: {problem}")
        reasons = {row.name: row.reason for row in rows if row.reason is not None}
        balances, branches = root / "balance.safetensors", root / "branch.safetensors"
        if balances.exists() or branches.exists():  # torch is imported only where it is needed
            from intaglio.pipeline.numerics.basis import load_balances
            from intaglio.pipeline.numerics.low_rank import load_branches

        try:
            return cls(
                layers,
                schemes,
                load_balances(balances) if balances.exists() else {},
                load_branches(branches) if branches.exists() else {},
                reasons,
            )
        except ContractError as e:
            raise RecipeError(f"{printable(file)}: is damaged: {e}") from e


class _Row(Layer):
    """One layer in plan.json: what the layer is, and its scheme by name and by formats."""

    model_config = ConfigDict(extra="ignore")

    scheme: str
    weight: WeightFormat
    input: InputFormat
    output: OutputFormat
    reason: str | None = None

    @model_validator(mode="after")
    def _named_as_it_is(self) -> Self:
        name = LayerScheme(weight=self.weight, input=self.input, output=self.output).name
        if name != self.scheme:
            raise ValueError(f"its formats are {name}, not {self.scheme}")
        return self


@dataclass(frozen=True)
class _Content:
    """Content of plan.json."""

    layers: tuple[_Row, ...]
