"""Compare two compiled folders: figures, layers, samples, recipes and versions."""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from intaglio.exporters.report import figures as figures
from intaglio.exporters.report.grids import SHEET_PIXELS_MAX, CurveFigure, Drawn, SampleFigure, laid_out
from intaglio.exporters.report.page import render
from intaglio.pipeline.artifacts.keys import SENSITIVITY, VERIFICATION
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.verification import MOST_PICTURE, dotted
from intaglio.pipeline.contract.artifact import A, Key
from intaglio.pipeline.contract.yaml_text import MOST_CHARACTERS
from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import DAMAGE, printable, read_bytes, read_json_object, read_text
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.runs.manifest import Manifest, compiled_folders, target_name
from intaglio.pipeline.runs.publish import RECIPE
from intaglio.pipeline.runs.store import Store

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.artifacts.sensitivity import Sensitivity
    from intaglio.pipeline.artifacts.verification import Verification

Better: TypeAlias = Literal["higher", "lower", "neither"]

FIGURES: Mapping[str, tuple[str, Better]] = {
    "layers_quantized": ("layers quantized", "neither"),
    "weight_bits_mean": ("mean weight bits", "neither"),
    "size_bytes": ("model.onnx, bytes", "lower"),
    "engine.bytes": ("engine, bytes", "lower"),
    "size_ratio_fp16": ("times smaller than float16", "higher"),
    "latency_ms": ("latency, ms", "lower"),
    "latency_ratio_fp32": ("speed relative to float32 in the same run", "higher"),
    "samples_drawn": ("samples drawn", "neither"),
    "psnr_db": ("PSNR, dB", "higher"),
    "psnr_db_min": ("PSNR of the worst sample, dB", "higher"),
    "psnr_simulated_db": ("PSNR simulated, dB", "higher"),
    "psnr_predicted_db": ("predicted PSNR, dB", "higher"),
    "sqnr_db": ("SQNR, dB", "higher"),
    "sqnr_db_min": ("SQNR of the worst sample, dB", "higher"),
    "sqnr_simulated_db": ("SQNR simulated, dB", "higher"),
    "cosine": ("cosine similarity", "higher"),
    "cosine_min": ("cosine similarity of the worst sample", "higher"),
    "error_max": ("largest error of a value", "lower"),
    "fidelity_gap_db": ("simulated minus deployed PSNR, dB", "neither"),
    "parity_layer_rel_l2_max": ("worst layer on the same input, relative L2", "lower"),
    "parity_rel_l2": ("whole denoiser on the same input, relative L2", "lower"),
    "engine.low_precision_products": ("low-precision products", "higher"),
    "engine.float_products": ("float products", "neither"),
}
"""Name in metrics.json -> label, and whether a higher or a lower figure is better."""
SAMPLES = 16
MOST_PIXELS = 1 << 23
"""Largest number of pixels of samples.png: each takes up to 30 bytes of memory."""
START = ("MODEL", "TARGET")


@dataclass(frozen=True)
class Change:
    """One quantity in A and in B; None where it was not measured."""

    a: float | None
    b: float | None
    better: Better = "neither"

    @property
    def delta(self) -> float | None:
        """B minus A; None where one of them was not measured."""
        return None if self.a is None or self.b is None else self.b - self.a

    @property
    def verdict(self) -> str:
        """`better` or `worse` for B, or `same`; empty if that is not known, or if neither direction is better."""
        if self.delta is None:
            return ""
        if self.delta == 0:
            return "same"
        if self.better == "neither":
            return ""
        return "better" if (self.delta > 0) == (self.better == "higher") else "worse"


@dataclass(frozen=True)
class Side:
    """The folder of one target, and the artifacts of its run that the store still has."""

    folder: Path
    manifest: Manifest
    store: Store

    @cached_property
    def metrics(self) -> dict[str, object]:
        """Dotted name -> figure; empty where no report was written."""
        file = self.folder / "metrics.json"
        return dict(dotted(read_json_object(file))) if file.exists() else {}

    def figure(self, name: str) -> float | None:
        """Return one figure; None where it was not measured."""
        found = self.metrics.get(name)
        return float(found) if isinstance(found, int | float) and abs(found) < 1e300 else None

    @cached_property
    def plan(self) -> QuantPlan | None:
        """The plan; None where the folder has none."""
        return QuantPlan.load(self.folder) if (self.folder / "plan.json").exists() else None

    @cached_property
    def recipe(self) -> list[str]:
        """Lines of recipe.yaml."""
        return read_text(self.folder / RECIPE, most=MOST_CHARACTERS).splitlines()

    @cached_property
    def verification(self) -> Verification | None:
        """The verification; None where the store does not have it."""
        return self._stored(VERIFICATION)

    @cached_property
    def sensitivity(self) -> Sensitivity | None:
        """The sensitivity; None where the store does not have it."""
        return self._stored(SENSITIVITY)

    def _stored(self, key: Key[A]) -> A | None:
        digest = self.manifest.digests.get(key.name)
        there = digest is not None and self.store.object_folder(digest).is_dir()
        return self.store.load(key, digest) if there and digest is not None else None

    @cached_property
    def samples(self) -> Mapping[str, torch.Tensor]:
        """Samples of the verification, by implementation.

        Without a verification in the store, the two lines of samples.png, each as one sample.
        """
        if self.verification is not None:
            return self.verification.samples
        file = self.folder / "samples.png"
        if not file.exists():
            return {}
        full, deployed = _picture(file).chunk(2, dim=2)
        return {"full_precision": full, "deployed": deployed}


def _picture(file: Path) -> torch.Tensor:
    """Return a PNG file's pixels in [-1, 1], (1, 3, H, W). Raises RecipeError for other files and for large ones."""
    import numpy as np
    import torch
    from PIL import Image

    content = io.BytesIO(read_bytes(file, most=MOST_PICTURE))
    try:
        with Image.open(content, formats=["PNG"]) as image:
            if image.width * image.height > MOST_PIXELS or image.height < 2:
                raise ValueError(f"{image.width} x {image.height} pixels: at most {MOST_PIXELS} are read")
            levels = np.asarray(image.convert("RGB"))
    except (*DAMAGE, OSError, SyntaxError, Image.DecompressionBombError) as e:  # PIL raises SyntaxError for bad chunks
        raise RecipeError(f"{printable(file)}: is not a picture that can be read: {printable(e)}") from e
    return torch.from_numpy(levels.copy()).permute(2, 0, 1)[None] / 127.5 - 1


@dataclass(frozen=True)
class Difference:
    """The difference of two folders, each of one target."""

    a: Side
    b: Side

    @property
    def title(self) -> str:
        """Both folders in one line."""
        return f"A {self.a.folder}, B {self.b.folder}"

    @cached_property
    def model(self) -> list[str]:
        """Lines that say how models, targets and layers differ. Layers that both have are compared even then."""
        pairs = [
            (f"{n.lower()}, sha256", *(s.manifest.start.get(n, "-")[:12] for s in (self.a, self.b))) for n in START
        ]
        pairs += [(n, *(str(side.metrics.get(n, "-")) for side in (self.a, self.b))) for n in ("model", "target")]
        problems = [f"{name}: {one} and {other}" for name, one, other in pairs if one != other]
        if self.a.plan is None or self.b.plan is None:
            return problems
        mine, theirs = ({layer.name: layer.shape for layer in plan.layers} for plan in (self.a.plan, self.b.plan))
        found = {
            "layers in A alone": mine.keys() - theirs.keys(),
            "layers in B alone": theirs.keys() - mine.keys(),
            "layers of another shape": {n for n in mine.keys() & theirs.keys() if mine[n] != theirs[n]},
        }
        return problems + [f"{len(n)} {what}, such as {min(n)}" for what, n in found.items() if n]

    @cached_property
    def figures(self) -> dict[str, Change]:
        """Name in metrics.json -> both figures, for figures that at least one side has."""
        changes = {n: Change(self.a.figure(n), self.b.figure(n), better) for n, (_, better) in FIGURES.items()}
        return {n: change for n, change in changes.items() if (change.a, change.b) != (None, None)}

    @cached_property
    def both(self) -> list[tuple[Layer, Layer]]:
        """Pairs of layers with the same name, of A and of B."""
        if self.a.plan is None or self.b.plan is None:
            return []
        others = {layer.name: layer for layer in self.b.plan.layers}
        return [(layer, others[layer.name]) for layer in self.a.plan.layers if layer.name in others]

    @cached_property
    def schemes(self) -> dict[str, tuple[str, str, Change]]:
        """Layer -> both scheme names and bytes, for layers whose scheme differs."""
        one, other = self.a.plan, self.b.plan
        if one is None or other is None:
            return {}
        return {
            mine.name: (
                one.schemes[mine.name].name,
                other.schemes[mine.name].name,
                Change(one.layer_bytes(mine), other.layer_bytes(theirs), "lower"),
            )
            for mine, theirs in self.both
            if one.schemes[mine.name] != other.schemes[mine.name]
        }

    @cached_property
    def parity(self) -> dict[str, Change]:
        """Layer -> relative L2 error on the same input, for layers where both sides have it."""
        one, other = self.a.verification, self.b.verification
        if one is None or other is None:
            return {}
        return {
            n: Change(p.rel_l2, other.layers[n].rel_l2, "lower") for n, p in one.layers.items() if n in other.layers
        }

    @cached_property
    def sensitivity(self) -> dict[str, Change]:
        """Layer -> predicted mean squared error of the samples with this layer alone quantized as planned.

        It has only the layers that both sides predict.
        """
        found = [
            {
                layer.name: side.sensitivity.predicted(layer.name, label)
                for layer in side.plan.layers
                if (label := side.sensitivity.label_of(side.plan, layer.name)) is not None
            }
            for side in (self.a, self.b)
            if side.plan is not None and side.sensitivity is not None
        ]
        if len(found) < 2:
            return {}
        return {n: Change(error, found[1][n], "lower") for n, error in found[0].items() if n in found[1]}

    @cached_property
    def recipe(self) -> list[str]:
        """Lines of the unified diff of both recipes."""
        return list(
            difflib.unified_diff(self.a.recipe, self.b.recipe, "A/recipe.yaml", "B/recipe.yaml", lineterm="", n=2)
        )

    @cached_property
    def versions(self) -> dict[str, tuple[str, str]]:
        """Package or pass -> both versions, where they differ."""
        found = [dict(side.manifest.versions) for side in (self.a, self.b)]
        names = sorted(found[0].keys() | found[1].keys())
        pairs = {name: (found[0].get(name, "-"), found[1].get(name, "-")) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    @cached_property
    def paired(self) -> bool:
        """True if full precision drew the same samples on both sides, or if a side has none."""
        one, other = (side.samples.get("full_precision") for side in (self.a, self.b))
        return one is None or other is None or one.equal(other)

    def comparison(self, pixels_max: int) -> SampleFigure | CurveFigure | None:
        """Return the deployed samples of both sides, beside full precision.

        If their full-precision samples differ, both are shown. None where samples cannot be shown, or have different
        shapes. `pixels_max`: pixels of one sheet.
        """
        one, other = self.a.samples, self.b.samples
        if not {"full_precision", "deployed"} <= one.keys() & other.keys():
            return None
        shapes = {x["deployed"].shape for x in (one, other)}
        if len(shapes) > 1:
            return None
        drawn = {
            "full": Drawn("Full precision", "the model as it was given", one["full_precision"]),
            "a": Drawn("A deployed", str(self.a.folder), one["deployed"]),
            "b": Drawn("B deployed", str(self.b.folder), other["deployed"]),
        }
        if not self.paired:
            drawn["full"] = Drawn("A full precision", "the model of A", one["full_precision"])
            drawn["full_b"] = Drawn("B full precision", "the model of B", other["full_precision"])
        pairs = [("a", "b"), ("full", "a"), ("full_b" if "full_b" in drawn else "full", "b")]
        return laid_out(drawn, pairs, SAMPLES, pixels_max)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the rows of the table that a terminal shows."""

        def row(label: str, change: Change) -> tuple[str, ...]:
            return label, *map(figures.amount, (change.a, change.b, change.delta)), change.verdict

        found = [row(FIGURES[name][0], change) for name, change in self.figures.items()]
        found += [(f"{name}, scheme", one, other, "", "") for name, (one, other, _) in self.schemes.items()]
        found += [(f"{name}, version", one, other, "", "") for name, (one, other) in self.versions.items()]
        return found + [(problem, "", "", "", "") for problem in self.model]

    def to_json(self) -> dict[str, object]:
        """Return the whole difference but its samples; None where a figure was not measured."""

        def plain(changes: Mapping[str, Change]) -> dict[str, dict[str, float | None]]:
            return {name: {"a": change.a, "b": change.b, "delta": change.delta} for name, change in changes.items()}

        return {
            "a": str(self.a.folder),
            "b": str(self.b.folder),
            "model": self.model,
            "figures": plain(self.figures),
            "schemes": {
                name: {"a": one, "b": other, "bytes": plain({name: change})[name]}
                for name, (one, other, change) in self.schemes.items()
            },
            "parity_rel_l2": plain(self.parity),
            "sensitivity_mse": plain(self.sensitivity),
            "recipe": self.recipe,
            "versions": {name: {"a": one, "b": other} for name, (one, other) in self.versions.items()},
        }


def compare(first: Path, second: Path, store: Store) -> tuple[Difference, ...]:
    """Compare the targets with the same name in two folders, or the two targets where each side has one.

    Raises RecipeError for a folder that is no compiled one, and if no target is in both.
    """
    one, other = compiled_folders(first), compiled_folders(second)
    if len(one) == len(other) == 1:
        pairs = [(one[0], other[0])]
    else:
        named = {target_name(folder): folder for folder in other}
        pairs = [(folder, named[target_name(folder)]) for folder in one if target_name(folder) in named]
    if not pairs:
        has, other_has = (", ".join(target_name(folder) for folder in folders) for folders in (one, other))
        raise RecipeError(f"no target is in both: {first} has {has}, {second} has {other_has}: give one folder of each")
    return tuple(Difference(*(Side(folder, Manifest.read(folder), store) for folder in pair)) for pair in pairs)


def page(found: tuple[Difference, ...]) -> str:
    """Return the comparison as one HTML file that needs no other file."""
    return render(
        "difference.html.j2",
        found=[(each, each.comparison(SHEET_PIXELS_MAX // (2 * len(found)))) for each in found],
        labels={name: label for name, (label, _) in FIGURES.items()},
    )
