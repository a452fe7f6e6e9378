"""The plan: one scheme for every quantizable layer.

Shapes: N out features, K in features (of a convolution: input channels times kernel).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from intaglio.pipeline.errors import ContractError, RecipeError, TargetError
from intaglio.pipeline.files import OPTIONAL, printable, read_typed, write_typed
from intaglio.pipeline.formats.known import InputFormat, WeightFormat
from intaglio.pipeline.formats.layer import Layer, illegal
from intaglio.pipeline.formats.schemes import FLOAT, LayerScheme, OutputFormat, RoundedWeight

if TYPE_CHECKING:
    from intaglio.pipeline.formats.target import Target
    from intaglio.pipeline.numerics.basis import LayerBalance
    from intaglio.pipeline.numerics.low_rank import Branch


NAMED = 12
"""Layers that one log line names for a reason; plan.json names all."""


def in_float_lines(reasons: Mapping[str, str]) -> list[str]:
    """Return one line for each reason to stay in float, with the layers that have it. `reasons`: layer -> reason.

    >>> in_float_lines({"a": "it is never called", "b": "it is never called"})
    ['2 layers stay in float, it is never called: a, b']
    """
    lines = []
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name, why in reasons.items() if why == reason]
        stay = "layer stays" if len(names) == 1 else "layers stay"
        lines.append(f"{len(names)} {stay} in float, {reason}: {_named(names)}")
    return lines


def _named(layers: Sequence[str]) -> str:
    """Return the first NAMED of these layers, and how many more there are."""
    more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
    return ", ".join(layers[:NAMED]) + more


@dataclass(frozen=True)
class QuantPlan:
    """One scheme for every quantizable layer, by its name in the model. No layer has a default scheme.

    `balances` holds a basis for each layer whose input is scaled or rotated, and which is rounded in this basis. Layers
    in float have none. `branches` holds the low-rank part of the weight that stays in float, for layers that have such
    a part. `reasons` says why a layer can only stay in float.
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
        rounded = {n.name: n for n in self.layers if isinstance(self.schemes[n.name].weight, RoundedWeight)}
        channels = {name: layer.channels for name, layer in rounded.items()}
        if wrong := sorted(n for n, b in self.balances.items() if len(b.balance.scale_C) != channels.get(n)):
            raise ContractError(f"a balance is for a quantized layer, with a scale for each input channel: {wrong}")
        if wrong := sorted(n for n, b in self.balances.items() if rounded[n].shape[1] % b.balance.block):
            raise ContractError(f"a balance rotates no channels of different groups of a convolution: {wrong}")
        weights = {name: (layer.n, layer.k) for name, layer in rounded.items() if layer.groups == 1}
        shapes = {n: (len(b.up_NR), b.down_RK.shape[1]) for n, b in self.branches.items()}
        if wrong := sorted(n for n, shape in shapes.items() if shape != weights.get(n)):
            raise ContractError(f"a branch is for a quantized layer without groups, of its weight's shape: {wrong}")
        if wrong := sorted(n for n in self.reasons if self.schemes.get(n) != FLOAT):
            raise ContractError(f"a reason to stay in float is for a layer in float: {wrong}")

    def check(self, target: Target) -> None:
        """Raise a TargetError with a line for each reason why the target cannot execute layers, and their names."""
        refused: dict[str, list[str]] = {}
        for layer in self.layers:
            if problem := illegal(layer, self.schemes[layer.name], target):
                refused.setdefault(problem.removeprefix(f"{layer.name}: "), []).append(layer.name)
        if refused:
            raise TargetError(*(f"{_named(names)}: {reason}" for reason, names in refused.items()))

    def replace(self, changes: Mapping[str, LayerScheme]) -> QuantPlan:
        """Return a plan with other schemes for these layers; a layer in float has neither balance nor branch."""
        schemes = {**self.schemes, **changes}
        balances = {n: b for n, b in self.balances.items() if schemes[n] != FLOAT}
        branches = {n: b for n, b in self.branches.items() if schemes[n] != FLOAT}
        reasons = {n: reason for n, reason in self.reasons.items() if schemes[n] == FLOAT}
        return QuantPlan(self.layers, schemes, balances, branches, reasons)

    def left_in_float(self, reasons: Mapping[str, str]) -> QuantPlan:
        """Return a plan with these layers in float, for these reasons. Names of other layers are ignored."""
        known = {n: reason for n, reason in reasons.items() if n in self.schemes}
        changed = self.replace(dict.fromkeys(known, FLOAT))
        return QuantPlan(changed.layers, changed.schemes, changed.balances, changed.branches, {**self.reasons, **known})

    def balanced(
        self, balances: Mapping[str, LayerBalance], branches: Mapping[str, Branch] = MappingProxyType({})
    ) -> QuantPlan:
        """Return a plan with these balances and branches added to its own."""
        merged = {**self.balances, **balances}, {**self.branches, **branches}
        return QuantPlan(self.layers, self.schemes, *merged, self.reasons)

    @property
    def quantized(self) -> int:
        """Number of layers that do not stay in float."""
        return sum(scheme != FLOAT for scheme in self.schemes.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all quantizable layers, with their branches."""
        return sum(map(self.layer_bytes, self.layers))

    def layer_bytes(self, layer: Layer) -> int:
        """Return the bytes of one layer in its scheme, with its branch."""
        branch = self.branches.get(layer.name)
        return layer.size_bytes(self.schemes[layer.name]) + (0 if branch is None else branch.size_bytes)

    @property
    def weight_bits_mean(self) -> float:
        """Mean bits of a weight over all parameters. A layer in float counts 16, as does a plan without layers."""
        total = sum(layer.n * layer.k for layer in self.layers)
        bits = sum(layer.n * layer.k * self.schemes[layer.name].weight_bits for layer in self.layers)
        return bits / total if total else float(FLOAT.weight_bits)

    def save(self, root: Path) -> None:
        """Write plan.json, balance.safetensors where a layer is balanced, branch.safetensors where one has a branch."""
        if self.balances:
            from intaglio.pipeline.numerics.basis import save_balances

            save_balances(self.balances, root / "balance.safetensors")
        if self.branches:
            from intaglio.pipeline.numerics.low_rank import save_branches

            save_branches(self.branches, root / "branch.safetensors")
        write_typed(root / "plan.json", _Content(tuple(map(self._row, self.layers))), _Content)

    def _row(self, layer: Layer) -> _Row:
        scheme = self.schemes[layer.name]
        balance, branch = self.balances.get(layer.name), self.branches.get(layer.name)
        return _Row(
            **dict(layer),
            scheme=scheme.name,
            **dict(scheme),
            size_bytes=self.layer_bytes(layer),
            rotated=None if balance is None else balance.balance.block,
            branch=None if branch is None else branch.rank,
            reason=self.reasons.get(layer.name),
        )

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
    """One layer in plan.json: the layer, its scheme by name and by formats, and its bytes with its branch.

    `rotated` is the block size of its balance, `branch` the rank of its branch.
    """

    model_config = ConfigDict(extra="ignore")

    scheme: str
    weight: WeightFormat
    input: InputFormat
    output: OutputFormat
    all_bytes: int = Field(alias="size_bytes")
    rotated: Annotated[int | None, OPTIONAL] = None
    branch: Annotated[int | None, OPTIONAL] = None
    reason: Annotated[str | None, OPTIONAL] = None

    @model_validator(mode="after")
    def _named_as_it_is(self) -> Self:
        name = LayerScheme(weight=self.weight, input=self.input, output=self.output).name
        if name != self.scheme:
            raise ValueError(f"its formats are {name}, not {self.scheme}")
        return self


@dataclass(frozen=True)
class _Content:
    """The content of plan.json."""

    layers: tuple[_Row, ...]
