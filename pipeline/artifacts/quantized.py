"""Trained adapters, and the integer model they are merged into.

Shapes: N out features, K in features, G scales a row, T denoising steps, rank of the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

from intaglio.pipeline.files import damage_of, load_tensors, read_typed
from intaglio.pipeline.formats.schemes import IntWeight, LayerScheme

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.numerics.basis import Balance
    from intaglio.pipeline.numerics.low_rank import Branch


@dataclass(frozen=True)
class LayerAdapter:
    """What distillation learnt for one layer: a (rank, K) and b (N, rank), or neither; weight scale (N, G).

    A weight of two levels has scales (N, 1), and (N, G) floats that the integers of its groups are rounded from.
    `amax_T` and `shift_T` are learnt input ranges at each calibrated step, `factor_T` what a token's magnitude is
    multiplied by. `codes` (N, K) int8 are those that the weight started from, where it was not the model's own.
    """

    scale_NG: torch.Tensor
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    group_NG: torch.Tensor | None = None
    amax_T: torch.Tensor | None = None
    shift_T: torch.Tensor | None = None
    factor_T: torch.Tensor | None = None
    codes: torch.Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """What distillation learnt, for every layer with an integer weight, and the loss on the way.

    `distance`: how far from their codes, in scales, weights are that did not start as the model's own.
    """

    layers: Mapping[str, LayerAdapter]
    loss: tuple[float, ...] = ()
    distance: float = 0.0

    def save(self, root: Path) -> None:
        """Write adapter.safetensors and adapter.json."""
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        for name, layer in self.layers.items():
            parts = ((part.name, getattr(layer, part.name)) for part in fields(layer))
            tensors |= {f"{name}:{part}": value.contiguous() for part, value in parts if value is not None}
        save_file(tensors, root / "adapter.safetensors")
        content = {"layers": list(self.layers), "loss": self.loss, "distance": self.distance}
        (root / "adapter.json").write_text(json.dumps(content) + "\n")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        content, file = read_typed(root / "adapter.json", _AdapterContent), root / "adapter.safetensors"
        tensors = load_tensors(file)
        optional = [part.name for part in fields(LayerAdapter) if part.name != "scale_NG"]
        with damage_of(file):
            layers = {
                n: LayerAdapter(tensors[f"{n}:scale_NG"], *(tensors.get(f"{n}:{part}") for part in optional))
                for n in content.layers
            }
        return cls(layers, content.loss, content.distance)


@dataclass(frozen=True)
class _AdapterContent:
    """Content of adapter.json."""

    layers: tuple[str, ...]
    loss: tuple[float, ...]
    distance: float


@dataclass(frozen=True)
class QuantizedLayerData:
    """One layer as integers: codes (N, K) int8, scale (N, G) float32, and amax (T,) if its input has a scale a step.

    A weight of two levels has scales (N, 1) and group integers (N, G) int8, each at most 15. `output_amax_T` is the
    largest output without bias at each step (T,), where the output is rounded. Where the input is shifted by step,
    `shift_T` is the middle of its range and `amax_T` half the width. `factor_T` (T,) is what the magnitude of a token
    is multiplied by, where its range is clipped. Codes, input ranges and the branch beside them are in the basis of
    `balance`.
    """

    scheme: LayerScheme
    codes: torch.Tensor
    scale_NG: torch.Tensor
    amax_T: torch.Tensor | None
    group_NG: torch.Tensor | None = None
    output_amax_T: torch.Tensor | None = None
    shift_T: torch.Tensor | None = None
    balance: Balance | None = None
    factor_T: torch.Tensor | None = None
    branch: Branch | None = None

    @property
    def stepped(self) -> bool:
        """Whether it needs to know its denoising step."""
        return self.amax_T is not None or self.factor_T is not None


@dataclass(frozen=True)
class Quantized:
    """The compiled model's integers, by layer name; layers that stay in float are not among them.

    `timesteps` are those of the tables' steps. 4-bit codes are packed two a byte on disk.
    """

    timesteps: tuple[float, ...]
    layers: Mapping[str, QuantizedLayerData]

    @property
    def stepped(self) -> bool:
        """Whether some layer needs to know its denoising step."""
        return any(layer.stepped for layer in self.layers.values())

    def only(self, names: Container[str]) -> Quantized:
        """These layers of it."""
        return Quantized(self.timesteps, {name: data for name, data in self.layers.items() if name in names})

    def save(self, root: Path) -> None:
        """Write quantized.safetensors and quantized.json."""
        import torch
        from safetensors.torch import save_file

        from intaglio.pipeline.numerics.low_rank import branch_tensors
        from intaglio.pipeline.numerics.packing import pack_int4

        tensors = {}
        for name, layer in self.layers.items():
            four = isinstance(layer.scheme.weight, IntWeight) and layer.scheme.weight.bits == 4
            tensors[f"{name}:codes"] = (
                torch.from_numpy(pack_int4(layer.codes.numpy())) if four else layer.codes.contiguous()
            )
            tensors[f"{name}:scale"] = layer.scale_NG.contiguous()
            if layer.group_NG is not None:
                tensors[f"{name}:group"] = layer.group_NG.contiguous()
            if layer.amax_T is not None:
                tensors[f"{name}:amax"] = layer.amax_T.contiguous()
            if layer.shift_T is not None:
                tensors[f"{name}:shift"] = layer.shift_T.contiguous()
            if layer.output_amax_T is not None:
                tensors[f"{name}:output-amax"] = layer.output_amax_T.contiguous()
            if layer.factor_T is not None:
                tensors[f"{name}:factor"] = layer.factor_T.contiguous()
            if layer.balance is not None:
                tensors[f"{name}:balance"] = layer.balance.scale_C.clone()  # siblings may share one
        tensors |= branch_tensors({n: v.branch for n, v in self.layers.items() if v.branch is not None})
        save_file(tensors, root / "quantized.safetensors")
        content = {
            "timesteps": self.timesteps,
            "layers": {
                n: {"shape": list(v.codes.shape), "scheme": v.scheme.model_dump(mode="json")}
                | ({} if v.balance is None else {"rotated": v.balance.block})
                for n, v in self.layers.items()
            },
        }
        (root / "quantized.json").write_text(json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        from intaglio.pipeline.numerics.low_rank import branches_of

        content, file = read_typed(root / "quantized.json", _Content), root / "quantized.safetensors"
        tensors = load_tensors(file)
        with damage_of(file):
            branches = branches_of(tensors)
            layers = {n: _layer(n, facts, tensors, branches.get(n)) for n, facts in content.layers.items()}
        return cls(content.timesteps, layers)


@dataclass(frozen=True)
class _LayerFacts:
    """One layer in quantized.json."""

    shape: tuple[int, ...]
    scheme: LayerScheme
    rotated: int | None = None


@dataclass(frozen=True)
class _Content:
    """Content of quantized.json."""

    timesteps: tuple[float, ...]
    layers: Mapping[str, _LayerFacts]


def _layer(
    name: str, facts: _LayerFacts, tensors: Mapping[str, torch.Tensor], branch: Branch | None
) -> QuantizedLayerData:
    import torch

    from intaglio.pipeline.numerics.basis import Balance
    from intaglio.pipeline.numerics.packing import unpack_int4

    codes = tensors[f"{name}:codes"]
    if isinstance(facts.scheme.weight, IntWeight) and facts.scheme.weight.bits == 4:
        codes = torch.from_numpy(unpack_int4(codes.numpy(), facts.shape))
    return QuantizedLayerData(
        facts.scheme,
        codes,
        tensors[f"{name}:scale"],
        tensors.get(f"{name}:amax"),
        tensors.get(f"{name}:group"),
        tensors.get(f"{name}:output-amax"),
        tensors.get(f"{name}:shift"),
        None if facts.rotated is None else Balance(tensors[f"{name}:balance"], facts.rotated),
        tensors.get(f"{name}:factor"),
        branch,
    )
