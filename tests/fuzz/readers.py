"""Coverage-guided fuzzing of all that reads files by anyone.

    python tests/fuzz/readers.py READER [CORPUS_DIR] [-max_total_time=600]

READER is recipe, manifest, record, lint, lora, modelopt, weights or folder.

Ends with the input that raised anything but the one clear error, or took more than `SECONDS` of CPU time or `MEMORY_MB`
beyond what the process held before, and writes it to a file; the options are libFuzzer's.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import atheris

if TYPE_CHECKING:
    from intaglio.pipeline.formats.target import Target

INSTRUMENTED = ("intaglio", "yaml")
"""Packages whose branches guide the fuzzing. Each reader imports what it needs when it reads the first input."""

SECONDS, MEMORY_MB = 2.0, 500
KINDS, WARM = 10, 20
"""Bytes read before all else, one for each kind of file in a folder; and inputs at the beginning that are not measured:
what they import is not theirs."""
KEY = hashlib.sha256(b"{}").hexdigest()
"""The key of a run record without ingredients."""
SLOW = {"lora": "diffusers.loaders.lora_pipeline", "weights": "diffusers.loaders.single_file_model"}
"""Modules that a reader imports for some files only: the seconds of the import are no fault of the file."""
WHOLE_MANIFEST = {"files": {}, "seed": 0, "start": {}, "steps": [], "versions": {}}


def read_recipe(content: bytes, folder: Path) -> None:
    from intaglio.pipeline.contract.recipe import Recipe

    (folder / "recipe.yaml").write_bytes(content)
    recipe = Recipe.read(folder / "recipe.yaml")
    assert Recipe.parse(recipe.to_yaml()) == recipe


def read_manifest(content: bytes, folder: Path) -> None:
    from intaglio.pipeline.runs.manifest import MANIFEST, Manifest

    (folder / MANIFEST).write_bytes(content)
    list(Manifest.read(folder).departures(folder))


def read_record(content: bytes, folder: Path) -> None:
    from intaglio.pipeline.runs.store import Store

    store = Store(folder / "store")
    (folder / f"store/runs/{KEY}.json").write_bytes(content)
    store.find(KEY)
    list(store.records())


@cache
def target() -> Target:
    from intaglio.pipeline.formats.target import load_target

    return load_target("onnxruntime-cpu")


def read_model(content: bytes, folder: Path) -> None:
    from intaglio.exporters.lint.lint import lint

    (folder / "model.onnx").write_bytes(content)
    list(lint(folder / "model.onnx", target()))


def read_lora(content: bytes, folder: Path) -> None:
    import torch

    from intaglio.pipeline.model.lora import find_lora, fuse_lora_

    (folder / "style.safetensors").write_bytes(content)
    module = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})
    fuse_lora_(module, find_lora("style.safetensors", folder), 1.0, "model.loras[0]")


def read_modelopt(content: bytes, folder: Path) -> None:
    from intaglio.passes.imports.modelopt import read_modelopt as read

    (folder / "quantized.pt").write_bytes(content)
    read(folder / "quantized.pt")


def read_weights(content: bytes, folder: Path) -> None:
    import torch

    from intaglio.passes.imports.imported import NotCarried
    from intaglio.passes.imports.weights import ImportWeights
    from intaglio.passes.imports.weights import read_weights as read
    from intaglio.pipeline.model.layers import layer_table

    file = folder / ("c.gguf" if content.startswith(b"GGUF") else "c.safetensors")
    file.write_bytes(content)
    module = torch.nn.ModuleDict({"to_q": torch.nn.Linear(64, 4)})
    saved = read(ImportWeights.files(file), module, requantize=True)
    for layer in layer_table(module):
        if layer.name in saved.weights:
            with suppress(NotCarried):
                saved.weights[layer.name](layer)


def read_folder(content: bytes, folder: Path) -> None:
    """Read the bytes in the place of each file of a compiled folder, the first of which says which file."""
    from intaglio.exporters.report.difference import compare
    from intaglio.exporters.report.report import metrics_of_files
    from intaglio.pipeline.artifacts.findings import Findings
    from intaglio.pipeline.artifacts.front import Front
    from intaglio.pipeline.artifacts.graph import Engine, Graph
    from intaglio.pipeline.artifacts.plan import QuantPlan
    from intaglio.pipeline.artifacts.profile import Profile
    from intaglio.pipeline.artifacts.sensitivity import Sensitivity
    from intaglio.pipeline.errors import IntaglioError
    from intaglio.pipeline.runs.manifest import MANIFEST
    from intaglio.pipeline.runs.store import Store

    kinds = {
        "graph.json": Graph,
        "plan.json": QuantPlan,
        "engine.json": Engine,
        "front.json": Front,
        "profile.json": Profile,
        "lint.json": Findings,
        "sensitivity.json": Sensitivity,
        "metrics.json": None,
        "samples.png": None,
    }
    out = folder / "onnxruntime-cpu"
    out.mkdir(exist_ok=True)
    for file in out.iterdir():
        file.unlink()
    (out / MANIFEST).write_text(json.dumps(WHOLE_MANIFEST))
    (out / "recipe.yaml").write_text("")
    name = [*kinds][content[0] % len(kinds)] if content else "plan.json"
    (out / name).write_bytes(content[1:])
    kind = kinds[name]
    with suppress(IntaglioError):
        if kind is None:
            for difference in compare(out, out, Store(folder / "store")):
                difference.to_json()
                difference.comparison(1 << 16)
        else:
            kind.load(out)
    metrics_of_files(out)


READERS: dict[str, Callable[[bytes, Path], None]] = {
    "recipe": read_recipe,
    "manifest": read_manifest,
    "record": read_record,
    "lint": read_model,
    "lora": read_lora,
    "modelopt": read_modelopt,
    "weights": read_weights,
    "folder": read_folder,
}


def main() -> None:
    with atheris.instrument_imports(include=INSTRUMENTED):
        from intaglio.pipeline.errors import IntaglioError
        from intaglio.pipeline.runs.memory import forget_peak, resident_bytes

    name = sys.argv.pop(1)
    reader = READERS[name]
    if name in SLOW:
        import_module(SLOW[name])
    read = 0
    with tempfile.TemporaryDirectory() as folder:

        def one_input(content: bytes) -> None:
            nonlocal read
            began, counted = time.process_time(), forget_peak() is not None
            before = resident_bytes("VmRSS") if counted else 0
            with suppress(IntaglioError):
                reader(content, Path(folder))
            seconds, peak = time.process_time() - began, resident_bytes("VmHWM") if counted else 0
            read += 1
            if read > WARM:
                assert seconds < SECONDS, f"{seconds:.1f} s of CPU time"
                assert peak - before < MEMORY_MB * 1e6, f"{(peak - before) / 1e6:.0f} MB"

        with atheris.instrument_imports(include=INSTRUMENTED):
            for kind in range(KINDS):
                one_input(bytes([kind]))
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
