"""Trained adapters, and the integer model that they are merged into.

Shapes: N out features, K in features, G scales per row, T denoising steps, `rank` of the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from intaglio.pipeline.files import OPTIONAL, damage_of, load_tensors, open_safetensors, read_typed, write_typed
from intaglio.pipeline.formats.known import StoredScheme
from intaglio.pipeline.formats.layer_tables import NO_TABLES, LayerTables
from intaglio.pipeline.formats.schemes import LayerScheme, RoundedWeight

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.numerics.basis import Balance
    from intaglio.pipeline.numerics.low_rank import Branch


@dataclass(frozen=True)
class LayerAdapter:
    """The parameters that distillation learnt for one layer: a (rank, K) and b (N, rank), or neither; scale (N, G).

    A weight of two levels has scales (N, 1) and `group_NG`, floats (N, G). Rounding these gives the integers of groups.
    `tables` are those that were learnt, at the calibrated steps. `codes` (N, K) int8 are the codes near
    which training started; None if it started from the model's own weight (`start: round` with `base: float`).
    """

    scale_NG: torch.Tensor
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    group_NG: torch.Tensor | None = None
    tables: LayerTables = NO_TABLES
    codes: torch.Tensor | None = None


ADAPTER_PARTS = ("scale_NG", "a", "b", "group_NG", "codes")
"""Tensors of a `LayerAdapter`, except its tables."""


@dataclass(frozen=True)
class DrawnError:
    """Mean squared error of drawn samples to those of full precision, after some updates; 0 updates are the start."""

    update: int
    mse: float


@dataclass(frozen=True)
class Adapter:
    """The result of distillation for every layer with an integer weight, and the loss of every update.

    `distance` is for weights that started from given codes: the largest distance of a starting weight from its code, in
    units of the scale. `drawn` has the error of drawn samples at the start and at each check; `layers` is the state
    with the least of these errors. `peak` is the range of the full-precision samples: the peak of every PSNR.
    """

    layers: Mapping[str, LayerAdapter]
    loss: tuple[float, ...] = ()
    distance: float = 0.0
    drawn: tuple[DrawnError, ...] = ()
    peak: float = 0.0

    @property
    def kept(self) -> DrawnError:
        """The least error of drawn samples, the first of equal ones. Raises ValueError if none were drawn."""
        return min(self.drawn, key=lambda error: error.mse)

    @property
    def gain_db(self) -> float:
        """Gain in PSNR of drawn samples from the start of the training to the kept state; 0 without drawn samples.

        It is also 0 where the start had no finite error, or no error at all.
        """
        if not self.drawn or not 0 < self.kept.mse <= self.drawn[0].mse < math.inf:
            return 0.0
        from intaglio.pipeline.numerics.quality import decibels

        return decibels(self.drawn[0].mse / self.kept.mse)

    def psnr_db(self, error: DrawnError) -> float:
        """Return the PSNR of drawn samples in dB; infinite without an error, minus infinite for an infinite one."""
        import torch

        from intaglio.pipeline.numerics.quality import psnr_db

        return float(psnr_db(torch.tensor(error.mse, dtype=torch.float64), self.peak))

    def save(self, root: Path) -> None:
        """Write adapter.safetensors and adapter.json."""
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        for name, layer in self.layers.items():
            parts = {part: getattr(layer, part) for part in ADAPTER_PARTS} | vars(layer.tables)
            tensors |= {f"{name}:{part}": value.contiguous() for part, value in parts.items() if value is not None}
        save_file(tensors, root / "adapter.safetensors")
        content = _AdapterContent(tuple(self.layers), self.loss, self.distance, self.drawn, self.peak)
        write_typed(root / "adapter.json", content, _AdapterContent, indent=None)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        content, file = read_typed(root / "adapter.json", _AdapterContent), root / "adapter.safetensors"
        tensors = load_tensors(file)
        with damage_of(file):
            layers = {n: _layer_adapter(n, tensors) for n in content.layers}
        return cls(layers, content.loss, content.distance, content.drawn, content.peak)


def _layer_adapter(name: str, tensors: Mapping[str, torch.Tensor]) -> LayerAdapter:
    """Read one layer of adapter.safetensors."""
    optional = {part: tensors.get(f"{name}:{part}") for part in ADAPTER_PARTS if part != "scale_NG"}
    tables = LayerTables(**{part.name: tensors.get(f"{name}:{part.name}") for part in fields(LayerTables)})
    return LayerAdapter(tensors[f"{name}:scale_NG"], **optional, tables=tables)


@dataclass(frozen=True)
class _AdapterContent:
    """The content of adapter.json: the names of its layers, whose tensors are in adapter.safetensors."""

    layers: tuple[str, ...]
    loss: tuple[float, ...]
    distance: float
    drawn: Annotated[tuple[DrawnError, ...], OPTIONAL] = ()
    peak: float = 0.0


TABLE_PARTS = {
    "amax_T": "amax",
    "shift_T": "shift",
    "output_amax_T": "output-amax",
    "factor_T": "factor",
    "output_share_N": "output-share",
}
"""Name of each table of a layer in quantized.safetensors."""


@dataclass(frozen=True)
class QuantizedLayerData:
    """One layer as integers: codes (N, K) int8, scales (N, G) float32, and the tables that its scheme needs.

    A weight of two levels has scales (N, 1) and group integers (N, G) int8, from 1 to 8. A weight in NVFP4 has one
    scale (1, 1) and, as `group_NG`, block scales (N, G) in torch.float8_e4m3fn. Codes, tables of the input and the
    branch beside them are in the basis of `balance`.
    """

    scheme: LayerScheme
    codes: torch.Tensor
    scale_NG: torch.Tensor
    group_NG: torch.Tensor | None = None
    tables: LayerTables = NO_TABLES
    balance: Balance | None = None
    branch: Branch | None = None


@dataclass(frozen=True)
class Quantized:
    """The compiled model's integers, by layer name; layers that stay in float are not among them.

    `timesteps` are those of the tables' steps. Files hold codes as their format packs them. Codes that were loaded stay
    in the file until they are used, so that a layer's codes are in memory only while an operation reads them.
    """

    timesteps: tuple[float, ...]
    layers: Mapping[str, QuantizedLayerData]

    @property
    def stepped(self) -> bool:
        """True where some layer needs to know its denoising step."""
        return any(layer.tables.stepped for layer in self.layers.values())

    def only(self, names: Container[str]) -> Quantized:
        """Return the integers of these layers alone."""
        return Quantized(self.timesteps, {name: data for name, data in self.layers.items() if name in names})

    def save(self, root: Path) -> None:
        """Write quantized.safetensors and quantized.json."""
        self.write(root, self.timesteps, self.layers.items())

    @classmethod
    def write(cls, root: Path, timesteps: tuple[float, ...], layers: Iterable[tuple[str, QuantizedLayerData]]) -> None:
        """Write the files of `save` from layers that come one after the other; one of them is in memory at a time."""
        from intaglio.pipeline.stored_tensors import save_tensors

        facts: dict[str, _LayerFacts] = {}

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, layer in layers:
                rotated = None if layer.balance is None else layer.balance.block
                facts[name] = _LayerFacts(tuple(layer.codes.shape), layer.scheme, rotated)
                yield from _tensors_of(name, layer)

        save_tensors(root / "quantized.safetensors", tensors())
        write_typed(root / "quantized.json", _Content(timesteps, facts), _Content)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote. Codes stay in the file until they are used."""
        from intaglio.pipeline.numerics.low_rank import branches_of

        content, file = read_typed(root / "quantized.json", _Content), root / "quantized.safetensors"
        with open_safetensors(file) as opened, damage_of(file):
            names = [name for name in opened.keys() if not name.endswith(":codes")]  # noqa: SIM118 - it is no mapping
            tensors = {name: opened.get_tensor(name) for name in names}
            for name in content.layers:
                opened.get_slice(f"{name}:codes")  # raises if there are none
        with damage_of(file):
            branches = branches_of(tensors)
            layers = {n: _layer(n, facts, file, tensors, branches.get(n)) for n, facts in content.layers.items()}
        return cls(content.timesteps, layers)


@dataclass(frozen=True)
class _LayerFacts:
    """One layer in quantized.json: `shape` is that of its codes, `rotated` the block size of its balance."""

    shape: tuple[int, ...]
    scheme: StoredScheme
    rotated: Annotated[int | None, OPTIONAL] = None


@dataclass(frozen=True)
class _Content:
    """The content of quantized.json."""

    timesteps: tuple[float, ...]
    layers: Mapping[str, _LayerFacts]


def _tensors_of(name: str, layer: QuantizedLayerData) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of one layer as quantized.safetensors has them, with their names."""
    from intaglio.pipeline.numerics.low_rank import branch_tensors

    yield f"{name}:codes", _rounded(layer.scheme).pack(layer.codes)
    yield f"{name}:scale", layer.scale_NG
    if layer.group_NG is not None:
        yield f"{name}:group", layer.group_NG
    for table, part in TABLE_PARTS.items():
        if (values := getattr(layer.tables, table)) is not None:
            yield f"{name}:{part}", values
    if layer.balance is not None:
        yield f"{name}:balance", layer.balance.scale_C
    if layer.branch is not None:
        yield from branch_tensors({name: layer.branch}).items()


def _layer(
    name: str, facts: _LayerFacts, file: Path, tensors: Mapping[str, torch.Tensor], branch: Branch | None
) -> QuantizedLayerData:
    import torch

    from intaglio.pipeline.numerics.basis import Balance
    from intaglio.pipeline.stored_tensors import StoredTensor, read_tensor

    form = _rounded(facts.scheme)

    def codes() -> torch.Tensor:
        with damage_of(file):
            return form.unpack(read_tensor(file, f"{name}:codes"), facts.shape)

    return QuantizedLayerData(
        facts.scheme,
        StoredTensor(facts.shape, torch.int8, codes),
        tensors[f"{name}:scale"],
        tensors.get(f"{name}:group"),
        LayerTables(**{table: tensors.get(f"{name}:{part}") for table, part in TABLE_PARTS.items()}),
        None if facts.rotated is None else Balance(tensors[f"{name}:balance"], facts.rotated),
        branch,
    )


def _rounded(scheme: LayerScheme) -> RoundedWeight:
    """Return the weight format of a layer that has codes. Raises ValueError for a weight in float."""
    if not isinstance(scheme.weight, RoundedWeight):
        raise ValueError(f"a weight in float has no codes: {scheme.name}")
    return scheme.weight
