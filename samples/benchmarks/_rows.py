"""Rows of figures that a benchmark keeps on disk, and the samples of full precision that they are compared with."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from intaglio.pipeline.artifacts.keys import MODEL, QUANTIZED
from intaglio.pipeline.model.calls import clocked, denoise_with
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.model.types import Denoise
from intaglio.pipeline.runs.runner import CompiledTarget
from intaglio.pipeline.runs.store import write_atomically
from intaglio.pipeline.simulation.model import simulate

NOISE_SEED = 2
"""Seed of the samples that are compared; no training saw them. The next two seeds are for other noise."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Measured rows, stored by everything that they depend on, so that a killed run continues.

    All rows depend on `depends`.
    """

    work: Path
    depends: Mapping[str, Any]

    def kept(self, make: Callable[[Path], Figures], **depends: Any) -> Figures:
        """Return the row that `make` returns, now or in an earlier run; it writes tensors to the path that it gets."""
        on = {**self.depends, **depends}
        place = self.work / "rows" / hashlib.sha256(json.dumps(on, sort_keys=True).encode()).hexdigest()
        file = place.with_suffix(".json")
        if not file.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            began = time.process_time()
            row = {**make(place), "place": place.name, "made_in_cpu_s": time.process_time() - began}
            write_atomically(file, json.dumps({"row": row, "depends": on}, indent=1) + "\n")
        return json.loads(file.read_text())["row"]

    def tensors(self, row: Figures) -> dict[str, torch.Tensor]:
        """Return the tensors that were written beside a row."""
        from safetensors.torch import load_file

        return load_file(self.work / "rows" / f"{row['place']}.safetensors")


def draw(denoise: Denoise, sampler: Sampler, count: int, seed: int = NOISE_SEED) -> torch.Tensor:
    """Samples, not clamped. The conditions are the same for every seed."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    start = sampler.start(1024, generator).part(slice(count))
    if seed != NOISE_SEED:
        noise = torch.randn(start.noise.shape, generator=torch.Generator().manual_seed(seed))
        start = type(start)(noise, start.conditions, start.null)
    parts = [start.part(slice(i, i + 16)) for i in range(0, count, 16)]
    return torch.cat([sampler.sample(denoise, part) for part in parts])


def full_precision(rows: Rows, checkpoint: Checkpoint, digest: str, count: int) -> Figures:
    """Its samples; of pictures also others of the same conditions from other noise, and how far apart they are."""
    from safetensors.torch import save_file

    def make(place: Path) -> Figures:
        model = checkpoint.open()
        sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
        denoise, file = denoise_with(model.module, model), place.with_suffix(".safetensors")
        samples = draw(denoise, sampler, count)
        if samples.ndim != 4:
            save_file({"samples": samples}, file)
            return {}
        from _image_distance import feature_distance, features, kid

        others, more = (features(draw(denoise, sampler, count, NOISE_SEED + i)) for i in (1, 2))
        reference = features(samples)
        save_file({"samples": samples, "features.reference": reference, "features.others": others}, file)
        apart = feature_distance(reference, others)
        return {
            "feature_distance_of_noises": float(apart.mean()),
            "feature_distance_of_noises_spread": float(apart.std()),
            "kid": kid(reference, others),
            "kid_again": kid(more, others),
        }

    return rows.kept(make, what="reference", model=digest)


def simulated(done: CompiledTarget) -> tuple[Denoise, Sampler]:
    """The merged integers in torch, and what samples with them."""
    model, ref = done[MODEL].open(), done[MODEL].ref
    sampler = Sampler(model, ref.sampling_steps, ref.guidance)
    clock = simulate(model.module, done[QUANTIZED])
    return clocked(denoise_with(model.module, model), clock, sampler.names.timestep), sampler


def speak() -> None:
    """Progress goes to stderr."""
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("intaglio").setLevel(logging.INFO)


def say(model: str, what: str) -> None:
    logging.getLogger(f"intaglio.{model}").info(what)
