"""Import a denoiser quantized elsewhere: take its integers and scales exactly, or refuse the layer.

Shapes: N out features, K in features, G scales per row, T denoising steps: one entry, as
imported scales are the same at all steps.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, PrivateAttr, ValidationInfo, model_validator

from intaglio.pipeline.artifacts.keys import MODEL, PLAN, QUANTIZED, TRAJECTORY
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.contract.artifact import AnyKey, Outputs
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import MIB, open_stream, printable
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.layer_tables import NO_TABLES, LayerTables
from intaglio.pipeline.formats.schemes import (
    FLOAT,
    W8A8_STEP,
    W8A16,
    IntInput,
    IntWeight,
    LayerScheme,
    TwoLevel,
    w4a16,
    w8ga16,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from intaglio.pipeline.artifacts.quantized import QuantizedLayerData
    from intaglio.pipeline.artifacts.trajectory import Trajectory
    from intaglio.pipeline.numerics.basis import Balance

GROUPS = (128, 64, 32)
"""Group sizes into which a block can be split; the largest that fits is taken."""
LISTED_PROBLEMS = 24
"""Largest number of problems of one import that its error lists."""
NAMED_LAYERS = 24
"""Largest number of layers that a line of the log names."""
SPARSE = 256 * MIB
"""Size in bytes up to which a file may be sparse: real weights are never eight times smaller on disk."""
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
FLOATS = ("float16", "bfloat16", "float32", "float64")
"""Types of tensors whose values need no scale, block or table."""


class ImportPass(Pass):
    """Pass that imports files. Their digests are part of its key, and nothing in them is executed."""

    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, TRAJECTORY})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({PLAN, QUANTIZED})
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers")

    path: str
    sha256: str = Field("", description="expected sha256 of the files; empty: any")
    _place: Path = PrivateAttr()

    @classmethod
    def files(cls, place: Path) -> list[Path]:
        """Return the files to read at the place that `path` names. Raises RecipeError if one cannot be read."""
        raise NotImplementedError

    @model_validator(mode="before")
    @classmethod
    def _digested(cls, written: object, info: ValidationInfo) -> object:
        if not isinstance(written, dict) or not isinstance(written.get("path"), str):
            return written
        try:
            found = _digest(cls.files(_base(info.context) / written["path"]))
        except (OSError, RecipeError) as error:
            raise ValueError(str(error)) from error
        if (wanted := written.get("sha256") or found) != found:
            raise ValueError(f"{written['path']}: its sha256 is {found}, not {wanted}")
        return {**written, "sha256": found}

    def model_post_init(self, context: Mapping[str, Path] | None) -> None:
        """Keep the path, resolved from the folder of the recipe."""
        self._place = _base(context) / self.path

    def _outputs(
        self,
        origin: str,
        layers: tuple[Layer, ...],
        found: TakenLayers,
        problems: Iterable[str],
        trajectory: Trajectory,
        ctx: Context,
    ) -> Outputs:
        """Return what `outputs_of` returns; `problems` are those of the file at `path`.

        Raises RecipeError with the problems, or if no layer of the file is quantized.
        """
        said = [
            f"{printable(self.path)}: {problem}" for problem in (*problems, *_range_problems(found.taken, trajectory))
        ]
        if not said and not found.taken:
            reasons = "; ".join(f"{some(names)}: {reason}" for reason, names in found.in_float.items())
            said.append(
                f"{printable(self.path)}: none of its {len(layers)} layers is quantized ({reasons}): give the file that"
                f" the quantizer wrote, or leave out the step {self.name}"
            )
        return outputs_of(origin, layers, found, said, trajectory, ctx)


def _base(context: Mapping[str, Path] | None) -> Path:
    return (context or {}).get("base", Path())


def _digest(files: Iterable[Path]) -> str:
    """Return the sha256 of one file, or that of the names and sha256s of several."""
    found = {}
    for file in files:
        with open_stream(file) as opened:
            held, size = getattr(os.fstat(opened.fileno()), "st_blocks", 0) * 512, os.fstat(opened.fileno()).st_size
            if size > SPARSE and 0 < held < size // 8:  # 0 where a file system does not say
                raise RecipeError(f"{printable(file)}: is a sparse file: {held} of its {size} bytes are written")
            found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    if len(found) == 1:
        return next(iter(found.values()))
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in found.items()).encode()).hexdigest()


class NotCarried(Exception):
    """A layer has no exact form here; the message says why."""


class StaysFloat(Exception):
    """A layer stays in float, which is no fault; the message says why."""


@dataclass(frozen=True)
class TakenLayers:
    """Integers of the layers by name, and the names of other layers by the reason why they stay in float or fail."""

    taken: dict[str, QuantizedLayerData]
    in_float: dict[str, list[str]]
    refused: dict[str, list[str]]


@dataclass(frozen=True)
class ImportedInput:
    """The rounding of a layer's input to integers, with the tables that it needs."""

    form: IntInput
    tables: LayerTables = NO_TABLES


def take_layers(layers: Iterable[Layer], take: Callable[[Layer], QuantizedLayerData]) -> TakenLayers:
    """Return what `take` gives for each layer, or the reason that it raises: StaysFloat or NotCarried."""
    found = TakenLayers({}, defaultdict(list), defaultdict(list))
    for layer in layers:
        try:
            found.taken[layer.name] = take(layer)
        except StaysFloat as reason:
            found.in_float[str(reason)].append(layer.name)
        except NotCarried as reason:
            found.refused[str(reason)].append(layer.name)
    return found


def outputs_of(
    origin: str,
    layers: tuple[Layer, ...],
    found: TakenLayers,
    problems: Sequence[str],
    trajectory: Trajectory,
    ctx: Context,
) -> Outputs:
    """Return the plan and the integers; layers that were not taken stay in float, and the log says why.

    Raises RecipeError with the first problems, and how many more there are.
    """
    from intaglio.pipeline.artifacts.quantized import Quantized
    from intaglio.pipeline.numerics.basis import LayerBalance

    if problems:
        more = len(problems) - LISTED_PROBLEMS
        raise RecipeError(*problems[:LISTED_PROBLEMS], *([f"and {more} more problems"] if more > 0 else []))
    taken = found.taken
    plan = QuantPlan(layers, {n.name: taken[n.name].scheme if n.name in taken else FLOAT for n in layers})
    balances = {}
    for name, data in taken.items():
        if data.balance is None:
            continue
        if data.tables.amax_T is None:  # no imported range: use an upper bound
            amax_T = trajectory.amax[name] * data.balance.scale_C.abs().max() * data.balance.block
        else:
            amax_T = data.tables.amax_T.expand(len(trajectory.timesteps))
        balances[name] = LayerBalance(data.balance, -amax_T, amax_T.clone())
    plan = plan.balanced(balances, {name: data.branch for name, data in taken.items() if data.branch is not None})
    bits = plan.weight_bits_mean
    ctx.log.info("%d of %d layers from %s, %.2f bits per weight", len(taken), len(layers), origin, bits)
    for reason, names in found.in_float.items():
        ctx.log.info("%d layers stay in float, %s: %s", len(names), reason, some(names, NAMED_LAYERS))
    # one entry, as scales do not depend on the step
    return {PLAN: plan, QUANTIZED: Quantized(trajectory.timesteps[:1], dict(taken))}


def _range_problems(taken: Mapping[str, QuantizedLayerData], trajectory: Trajectory) -> Iterator[str]:
    """Yield a problem for each input that overflows in its basis, or whose static range rounds all of it to zero."""
    from intaglio.pipeline.numerics.rounding import INPUT_HIGH

    for name, data in taken.items():
        largest, balance, amax_T = float(trajectory.amax[name].max()), data.balance, data.tables.amax_T
        form = data.scheme.input
        if balance is not None:
            scale = float(balance.scale_C.abs().max())
            if largest * scale * balance.block > FLOAT32_MAX:
                yield (
                    f"{printable(name)}: its input reaches {largest:.3g}, and its channel scales {scale:.3g}: the"
                    " product is more than float32 holds"
                )
        elif isinstance(form, IntInput) and amax_T is not None:
            step = float(amax_T.min()) / INPUT_HIGH[form.bits]
            if 0 < largest < step / 2:
                yield (
                    f"{printable(name)}: its input reaches {largest:.3g}, and one code stands for {step:.3g}, so all"
                    " of it is rounded to 0: calibrate the model again"
                )


def check_called(layer: Layer, trajectory: Trajectory) -> None:
    """Raise StaysFloat if the recorded calls never reach the layer: then the graph does not compute it."""
    if layer.name not in trajectory.amax:
        raise StaysFloat("it is never called")


def problems_of(
    module: nn.Module, rest: Mapping[str, torch.Tensor], found: TakenLayers, quantized: Iterable[str]
) -> Iterator[str]:
    """Yield the refusals, and where `rest` differs from the model.

    `rest` is what the file holds besides quantized weights. `quantized` are the layers whose weight is not compared.
    """
    yield from (f"{some(names)}: {reason}" for reason, names in found.refused.items())
    weights = {f"{name}.weight" for name in quantized}
    ours = {name: value for name, value in module.state_dict().items() if name not in weights}
    theirs = {name: value for name, value in rest.items() if name not in weights}
    if ours.keys() != theirs.keys():
        missing, surplus = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
        parts = [f"has no {some(missing)}"] * bool(missing) + [f"has {some(surplus)}"] * bool(surplus)
        yield f"belongs to another model: it {' and '.join(parts)}"
    reasons = defaultdict(list)
    for name in ours.keys() & theirs.keys():
        if (reason := _difference(ours[name], theirs[name])) is not None:
            reasons[reason].append(name)
    yield from (f"{some(sorted(names))}: {reason}" for reason, names in reasons.items())


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    """Return how a tensor of the file differs from the model's, None where the file's is a rounding of it."""
    if theirs.shape != ours.shape:
        return f"{tuple(theirs.shape)} where the recipe's model has {tuple(ours.shape)}"
    kind = dtype_name(theirs)
    if kind not in FLOATS if ours.is_floating_point() else theirs.dtype != ours.dtype:
        return f"in {kind} where the recipe's model has {dtype_name(ours)}"
    if ours.to(theirs.dtype).equal(theirs):
        return None
    if theirs.is_floating_point() and not theirs.isfinite().all():
        return "holds NaN or Inf"
    return (
        "different from the recipe's model, from which the graph is made: set model.path to the model that was"
        " quantized"
    )


def as_float32(what: str, value: torch.Tensor, cause: str = "") -> torch.Tensor:
    """Return a tensor of the file in float32. Raises NotCarried for other types than floats, and for NaN and Inf.

    `cause`: why it may have NaN.
    """
    if (kind := dtype_name(value)) not in FLOATS:
        raise NotCarried(f"{what} in {kind}: only {', '.join(FLOATS)}")
    values = value.float()
    if not values.isfinite().all():
        raise NotCarried(f"{what} with NaN or Inf{cause}")
    return values


def dtype_name(value: torch.Tensor) -> str:
    """Return `float32` for torch.float32."""
    return str(value.dtype).removeprefix("torch.")


def layer_data(
    layer: Layer,
    bits: int,
    codes: torch.Tensor,
    scale_NG: torch.Tensor,
    entering: ImportedInput | None,
    balance: Balance | None = None,
) -> QuantizedLayerData:
    """Make the data of a layer from codes (N, K) int8 and scales, unchanged.

    Raises NotCarried for a form that is not exact here.
    """
    import torch

    from intaglio.pipeline.artifacts.quantized import QuantizedLayerData

    group_NG = None
    match bits, entering:
        case 8, None if scale_NG.shape[1] != 1:
            group = _group(layer, scale_NG)
            scheme, scale_NG = w8ga16(group), _split(scale_NG, layer.k // group)
        case 8, None | ImportedInput(form=IntInput(bits=8)):
            if scale_NG.shape[1] != 1:
                raise NotCarried(
                    "8-bit weights with scales for blocks cannot be multiplied by a rounded input: use one scale for"
                    " each output channel, or leave the input in float"
                )
            scheme = W8A16 if entering is None else LayerScheme(weight=W8A8_STEP.weight, input=entering.form)
        case 4, None:
            group = _group(layer, scale_NG)
            scheme, scale_NG = w4a16(group), _split(scale_NG, layer.k // group)
        case 4, ImportedInput():
            if not (scale_NG == scale_NG[:, :1]).all():
                raise NotCarried(
                    "4-bit weights with a float scale for each block cannot be multiplied by a rounded input: an"
                    " integer product needs one float scale for each row, and integers for the groups. Leave the input"
                    " in float, use one scale for each output channel, or let `distill` round the weights"
                )
            group, scale_NG = _group(layer, scale_NG), scale_NG[:, :1]
            group_NG = torch.ones(layer.n, layer.k // group, dtype=torch.int8)
            scheme = LayerScheme(weight=IntWeight(bits=4, granularity=TwoLevel(size=group)), input=entering.form)
        case _, None:
            raise NotCarried(f"{bits}-bit weights with a float input: only weights of 4 or 8 bits can be imported")
        case _, ImportedInput():
            raise NotCarried(f"{bits}-bit weights with a {entering.form.bits}-bit input")
    tables = NO_TABLES if entering is None else entering.tables
    return QuantizedLayerData(scheme, codes, scale_NG.contiguous(), group_NG, tables, balance)


def _group(layer: Layer, scale_NG: torch.Tensor) -> int:
    """Return the largest group size into which blocks can be split; neighbouring groups then share a scale."""
    block = layer.k // scale_NG.shape[1]
    group = next((size for size in GROUPS if block % size == 0 and size < layer.k), None)
    if group is None:
        raise NotCarried(f"weights in blocks of {block} of {layer.k} in features: groups here have 32, 64 or 128")
    return group


def _split(scale_NG: torch.Tensor, count: int) -> torch.Tensor:
    """Repeat scales so that each row has `count` of them."""
    return scale_NG.repeat_interleave(count // scale_NG.shape[1], dim=1)


def some(names: Iterable[str], most: int = 3) -> str:
    """Return up to `most` of the names, shortened and printable, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(printable(name)[:120] for name in listed[:most]) + more


def shown(value: object) -> str:
    """Return a value of a file in a few words, whatever it is.

    >>> shown((4, 3)), shown("8"), shown(10**5000), shown([[1]])
    ('(4, 3)', "'8'", 'a number of many digits', '[a list]')
    """
    match value:
        case None | bool() | float():
            return str(value)
        case int():
            return str(value) if abs(value) < 10**12 else "a number of many digits"
        case str():
            return printable(repr(value[:60]))
        case tuple() if len(value) <= 4:
            return f"({', '.join(map(_inner, value))})"
        case list() if len(value) <= 4:
            return f"[{', '.join(map(_inner, value))}]"
        case dict() if len(value) <= 4:
            return f"{{{', '.join(f'{_inner(key)}: {_inner(item)}' for key, item in value.items())}}}"
    return f"a {type(value).__name__}"


def _inner(value: object) -> str:
    return f"a {type(value).__name__}" if isinstance(value, tuple | list | dict) else shown(value)
