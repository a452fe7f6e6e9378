"""Measurements of a deployed graph: its agreement with the simulation, its quality, its speed, its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

from intaglio.pipeline.files import (
    MIB,
    OPTIONAL,
    load_tensors,
    read_bytes,
    read_json_object,
    read_text,
    read_typed,
    write_typed,
)

if TYPE_CHECKING:
    import torch

MOST_PAGE, MOST_PICTURE = 64 * MIB, 64 * MIB
"""Bytes of report.html and of samples.png that are read."""


@dataclass(frozen=True)
class LayerParity:
    """Agreement of one layer, deployed and simulated, on the same input.

    `rel_l2` is the relative L2 error of its output. `codes_differing` of its `codes` input codes differ, by at most
    `code_distance_max`; all three are zero where its input is not rounded.
    """

    rel_l2: float
    codes: int
    codes_differing: int
    code_distance_max: int


@dataclass(frozen=True)
class Departure:
    """Relative L2 errors of one layer inside the whole graph.

    `input_rel_l2` is the error of the layer's input against a simulation that continues with the graph's own outputs of
    all layers before it. `own_rel_l2` is the error of the layer's output against the simulated layer on the same input.
    """

    input_rel_l2: float
    own_rel_l2: float


@dataclass(frozen=True, kw_only=True)
class DepartureFigures:
    """Relative L2 errors inside the whole graph; None if `verify` did not look into it."""

    departure_output_rel_l2: Annotated[float | None, OPTIONAL] = None
    """Error of the graph's output, if all layers before it are taken as correct."""
    departure_own_rel_l2_max: Annotated[float | None, OPTIONAL] = None
    """Largest `own_rel_l2` of a layer's `Departure`."""
    departure_input_rel_l2_max: Annotated[float | None, OPTIONAL] = None
    """Largest `input_rel_l2` of a layer's `Departure`."""

    @classmethod
    def of(cls, departures: Mapping[str, Departure], output_rel_l2: float) -> Self:
        """Return the figures of these layers, and of the graph's output."""
        return cls(
            departure_output_rel_l2=output_rel_l2,
            departure_own_rel_l2_max=max((each.own_rel_l2 for each in departures.values()), default=0.0),
            departure_input_rel_l2_max=max((each.input_rel_l2 for each in departures.values()), default=0.0),
        )


@dataclass(frozen=True, kw_only=True)
class SampleFigures:
    """Distances of samples to full precision, in dB, as a cosine and as the largest error; and the peak of every PSNR.

    Each distance is a mean over the samples, except those that end in `_min` or `_max`, which are those of the worst
    sample: a trajectory that departs from its reference makes one sample much worse than others. `psnr_peak` is a
    difference of values, not in dB, and `fidelity_gap_error_db` a standard error.
    SQNR is relative to the mean square of each full-precision sample.
    """

    samples_drawn: Annotated[int | None, OPTIONAL] = None
    """Number of samples from which these figures are; None where it was not counted."""
    psnr_peak: float
    """Range of the full-precision samples of calibration: the largest value minus the smallest."""
    psnr_db: float
    """PSNR of the deployed samples."""
    psnr_db_min: float
    """Lowest PSNR of a deployed sample."""
    psnr_simulated_db: float
    """PSNR of the simulated samples."""
    sqnr_db: float
    """SQNR of the deployed samples."""
    sqnr_db_min: float
    """Lowest SQNR of a deployed sample."""
    sqnr_simulated_db: float
    """SQNR of the simulated samples."""
    cosine: Annotated[float | None, OPTIONAL] = None
    """Cosine similarity of the deployed samples; None where it was not computed."""
    cosine_min: Annotated[float | None, OPTIONAL] = None
    """Lowest cosine similarity of a deployed sample."""
    error_max: Annotated[float | None, OPTIONAL] = None
    """Largest absolute error of a single value in all deployed samples, in the unit of the samples."""
    fidelity_gap_db: float
    """PSNR of the simulated samples minus that of the deployed ones."""
    fidelity_gap_error_db: float
    """Standard error of the gap over the samples; zero where there is one sample."""


@dataclass(frozen=True, kw_only=True)
class VerificationFigures(SampleFigures, DepartureFigures):
    """All figures of one target that `verify` measures, in the order of verification.json."""

    psnr_predicted_db: Annotated[float | None, OPTIONAL] = None
    """PSNR of the samples that `assign` predicted for its plan; None without a prediction."""
    psnr_predicted_error_db: Annotated[float | None, OPTIONAL] = None
    """Standard error of the difference between predicted and deployed PSNR, which are those of different samples."""
    parity_rel_l2: float
    """Relative L2 error of the deployed denoiser against the simulated one, in one recorded call."""
    parity_other_rel_l2: Annotated[float | None, OPTIONAL] = None
    """Relative L2 error of that call at the model's other size; None if the model has one size."""
    parity_layer_rel_l2_max: float
    """Largest `rel_l2` of a layer's `LayerParity`; zero where no layer is quantized."""
    fp16_bytes: float
    """Bytes of all weights of the full-precision model in float16."""


@dataclass(frozen=True)
class _Measured:
    """The content of verification.json: everything in `Verification` except its samples."""

    figures: VerificationFigures
    layers: Mapping[str, LayerParity]
    departures: Mapping[str, Departure] = field(default_factory=dict)
    warnings: Annotated[tuple[str, ...], OPTIONAL] = ()


@dataclass(frozen=True)
class Verification(_Measured):
    """The measurements of `verify`. `samples`: (B, ...) of full precision, the simulation and the deployed graph.

    `departures` has the layers in the order in which they run; empty if `verify` did not run the whole graph.
    `warnings` are sentences for the user about a graph that computes what it should, such as one of low quality.
    """

    samples: Mapping[str, torch.Tensor] = field(default_factory=dict, kw_only=True)

    def save(self, root: Path) -> None:
        """Write verification.json and samples.safetensors."""
        from safetensors.torch import save_file

        write_typed(root / "verification.json", self, _Measured)
        save_file({k: v.contiguous() for k, v in self.samples.items()}, root / "samples.safetensors")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        measured = read_typed(root / "verification.json", _Measured)
        return cls(**vars(measured), samples=load_tensors(root / "samples.safetensors"))

    @staticmethod
    def load_warnings(root: Path) -> tuple[str, ...]:
        """Read the warnings alone, without the samples."""
        return read_typed(root / "verification.json", _Measured).warnings


@dataclass(frozen=True)
class Latency:
    """Median time of one call with `rows` rows in the target's runtime, of the float32 and of the compiled graph."""

    rows: int
    float32_ms: float
    compiled_ms: float

    def save(self, root: Path) -> None:
        """Write latency.json."""
        write_typed(root / "latency.json", self, Latency, indent=None)

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read latency.json."""
        return read_typed(root / "latency.json", cls)


def dotted(metrics: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every figure of metrics.json with its name, the names of nested objects joined by dots.

    >>> dict(dotted({"psnr_db": 44.1, "engine": {"low_precision_products": 47}}))
    {'psnr_db': 44.1, 'engine.low_precision_products': 47}
    """
    for name, entry in metrics.items():
        if isinstance(entry, dict):
            yield from dotted(entry, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", entry


@dataclass(frozen=True)
class Report:
    """A page for people, figures for programs, and a picture of samples (PNG), None where samples are no images."""

    html: str
    metrics: Mapping[str, object]
    picture: bytes | None = None

    def save(self, root: Path) -> None:
        """Write report.html, metrics.json and, if there is a picture, samples.png."""
        if self.picture is not None:
            (root / "samples.png").write_bytes(self.picture)
        (root / "report.html").write_text(self.html, encoding="utf-8")
        write_typed(root / "metrics.json", dict(self.metrics), dict[str, object])

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read what `save` wrote."""
        picture = root / "samples.png"
        return cls(
            read_text(root / "report.html", most=MOST_PAGE),
            read_json_object(root / "metrics.json"),
            read_bytes(picture, most=MOST_PICTURE) if picture.exists() else None,
        )
