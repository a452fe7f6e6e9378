"""Measure what it costs to find the sensitivity of every layer: CPU seconds of three estimates, and of modelopt's.

    OMP_NUM_THREADS=1 python samples/benchmarks/sensitivity_speed.py [samples/emoji-unet.yaml] [--json]

All on the same rows of the same recorded calls, in the same formats: 8-bit weights and inputs, and 4-bit weights. Each
layer rounded alone, with the whole model computed and with calls that begin at the layer (which give the same numbers,
to the bit); all layers predicted by backward passes, of those calls and of whole trajectories; and
`modelopt.torch.quantization.auto_quantize`, by its gradients where they work, else by the KL divergence of its outputs.
Fitting scales is part of every time. So is everything of the pass itself, with its options as they are. With `--drawn`
samples are drawn from eight noises with every layer rounded alone, and all ways are ranked against what became of them.
"""

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from _efficientdm_peers import blocks, channel, quiet, tensor
from scipy.stats import spearmanr

from intaglio import Context, Recipe, Step, Store, compile
from intaglio.passes.sensitivity.estimates import MSE
from intaglio.passes.sensitivity.forms import Form, forms_of
from intaglio.passes.sensitivity.measure import MeasureSensitivity
from intaglio.passes.sensitivity.metrics import RelativeError
from intaglio.passes.sensitivity.rounded import RoundedLayers
from intaglio.passes.sensitivity.screen import Screen
from intaglio.passes.sensitivity.study import Batch, Errors, Study
from intaglio.pipeline.artifacts.keys import MODEL, SENSITIVITY, TRAJECTORY
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.artifacts.trajectory import Trajectory
from intaglio.pipeline.contract.artifact import State
from intaglio.pipeline.contract.metric import MetricContext
from intaglio.pipeline.formats.layer import structural_schemes
from intaglio.pipeline.formats.schemes import FLOAT
from intaglio.pipeline.model.calls import clocked, denoise_with
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.cost import measure_cost
from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.model.types import Denoise, Inputs

SCHEMES = ("w8a8_step", "w4a16")
GROUP = 32
DRAWN = 8
"""Samples that ranks are held against."""
FORMATS = {
    "w8a8_step": (channel(8), tensor(8)),
    "w4a16": (blocks(-1), None),
}
"""Weight and input of each scheme as modelopt has it; its 4-bit formats are for linear layers."""
Scores = dict[tuple[str, str], float]
"""Scores by layer and scheme."""


def main(
    recipe_file: Annotated[Path, typer.Argument()] = Path(__file__).parents[1] / "emoji-dit.yaml",
    buckets: int = 1,
    rows: int = 8,
    probes: int = 2,
    rounds: Annotated[int, typer.Option(help="by turns; the least CPU seconds of each count")] = 2,
    samples: Annotated[int, typer.Option(help="trajectories that are recorded")] = 8,
    store: Path = Path(".intaglio/store"),
    drawn: Annotated[bool, typer.Option(help="rank against samples too")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="figures only, for machines")] = False,
) -> None:
    options = {"buckets": buckets, "rows": rows, "probes": probes, "rounds": rounds, "samples": samples}
    figures = speeds(recipe_file, Store(store), drawn=drawn, **options)
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:40} {value:.4g}" if isinstance(value, float) else f"{name:40} {value}")


@dataclass(frozen=True)
class Ways:
    """The ways to find sensitivities, all on the same recorded calls: `rows` of them at each of `steps`.

    `method` is how modelopt scores layers. Files are written below `folder`.
    """

    checkpoint: Checkpoint
    trajectory: Trajectory
    steps: Sequence[int]
    rows: int
    probes: int
    folder: Path
    method: str = "gradient"

    def study(self, *, reuse: bool) -> Study:
        """Return a new study of every layer in every scheme, which finds no earlier measurement."""
        model = self.checkpoint.open()
        model.module.requires_grad_(False)
        sampler = Sampler(model, self.checkpoint.ref.sampling_steps, self.checkpoint.ref.guidance)
        layers = [layer for layer in layer_table(model.module) if layer.name in self.trajectory.amax]
        admitted = {layer.name: structural_schemes(layer, (GROUP,), SCHEMES) for layer in layers}
        forms = {name: forms_of({s.name: Form(s) for s in schemes}, parts=False) for name, schemes in admitted.items()}
        batch = Batch.of(sampler, self.trajectory, self.rows)
        rounded = RoundedLayers(model.module, self.trajectory)
        denoise = denoise_with(model.module, model)
        return Study(self.context(), denoise, rounded, batch, list(self.steps), forms, reuse)

    def context(self) -> Context:
        """Return a context with a new scratch folder."""
        return Context(Path(tempfile.mkdtemp(dir=self.folder)))

    def direct(self, *, reuse: bool) -> Scores:
        """Return the errors with each layer rounded alone."""
        made = self.study(reuse=reuse)
        metrics = {name: {MSE: RelativeError()} for name in made.forms}
        return totals(made.measure({n: list(forms) for n, forms in made.forms.items()}, metrics, MetricContext())[MSE])

    def screened(self) -> Scores:
        """Return the errors of calls, predicted by backward passes."""
        return totals(self.study(reuse=True).screen(self.probes))

    def along(self, count: int) -> Scores:
        """Return the errors of whole trajectories, as `sensitivity` predicts them."""
        made = self.study(reuse=True)
        screen = Screen(made.rounded, clock(made), made.forms)
        start = made.batch.sampler.start(count, made.ctx.torch_rng("drift"))
        found: Scores = dict.fromkeys(((name, form) for name, by in made.forms.items() for form in by), 0.0)
        for i in range(count):
            sample, probe = start.part(slice(i, i + 1)), made.ctx.torch_rng("probe", i)
            part, _ = screen.errors_of_samples(made.batch.sampler, sample, probe)
            found = {(name, form): total + part[name][form] for (name, form), total in found.items()}
        return found

    def of_samples(self) -> Scores:
        """Return the squared errors of samples that are drawn with each layer rounded alone."""
        made = self.study(reuse=True)
        sampler, denoise = made.batch.sampler, clock(made)
        start = sampler.start(DRAWN, made.ctx.torch_rng("drawn"))
        reference, found = sampler.sample(denoise, start), {}
        for name, form in [(name, form) for name, forms in made.forms.items() for form in forms]:
            with made.rounded.alone(name, made.forms[name][form]):
                found[name, form] = float((sampler.sample(denoise, start) - reference).square().mean())
        return found

    def whole_step(self) -> Scores:
        """Return the predictions of the step `sensitivity` with its options as they are."""
        step = MeasureSensitivity(schemes=SCHEMES, groups=(GROUP,))
        state = State({MODEL: self.checkpoint, TRAJECTORY: self.trajectory}, reader=step.name)
        table = step.run(state, self.context())[SENSITIVITY]
        assert isinstance(table, Sensitivity)  # it is what the step provides
        return {(n, s): table.error_of_samples(n, s) for n, by in table.error.items() for s in by if s != FLOAT.name}

    def theirs(self) -> Scores:
        """Return modelopt's scores on the same calls."""
        study = self.study(reuse=False)
        formats = [_format(*FORMATS[scheme]) for scheme in SCHEMES]
        calls = [study.batch.inputs(step) for step in study.steps]
        return _scores(auto_quantize(self.checkpoint, calls, formats, self.method))

    def timed(self) -> Mapping[str, Callable[[], Scores]]:
        """Return the ways that are timed, by name."""
        return {
            "whole": lambda: self.direct(reuse=False),
            "replayed": lambda: self.direct(reuse=True),
            "screened": self.screened,
            "along": lambda: self.along(MeasureSensitivity().samples),
            "along_one": lambda: self.along(1),
            "step": self.whole_step,
            "theirs": self.theirs,
        }


def clock(study: Study) -> Denoise:
    """Return the study's denoiser, which sets the clock of the rounded layers."""
    return clocked(study.denoise, study.rounded.clock, study.batch.sampler.names.timestep)


def speeds(
    recipe_file: Path,
    store: Store,
    *,
    buckets: int = 1,
    rows: int = 8,
    probes: int = 2,
    rounds: int = 2,
    samples: int = 8,
    drawn: bool = False,
) -> dict[str, Any]:
    """CPU seconds, and rank correlations with the first way and, if samples are drawn, with these."""
    recipe = Recipe.read(recipe_file)
    record = Step(uses="calibrate", options={"samples": samples})
    short = recipe.model_copy(update={"steps": (record,), "targets": recipe.targets[:1]})
    trajectory = compile(short, store, base=recipe_file.parent)[recipe.targets[0]][TRAJECTORY]
    checkpoint = Checkpoint.resolve(recipe.model, recipe_file.parent)
    count = len(trajectory.timesteps)
    steps = [round(count * (i + 0.5) / buckets) for i in range(buckets)]
    scores: dict[str, Scores] = {}
    with tempfile.TemporaryDirectory() as folder:
        ways, failure = Ways(checkpoint, trajectory, steps, rows, probes, Path(folder)), ""
        try:
            ways.theirs()
        except RuntimeError as e:
            ways, failure = replace(ways, method="kl_div"), str(e)
        seconds: dict[str, list[float]] = {way: [] for way in ways.timed()}
        for way, work in [*ways.timed().items()] * rounds:
            began = time.process_time()
            scores[way] = work()
            seconds[way].append(time.process_time() - began)
        drawn_scores = ways.of_samples() if drawn else None
    return {
        "layers": len({name for name, _ in scores["whole"]}),
        "layers_and_schemes": len(scores["whole"]),
        "calls_of_rows": f"{buckets} of {rows}",
        "auto_quantize_method": ways.method,
        "auto_quantize_by_gradient": failure or "runs",
        "share_of_products_from_a_layer_on": measure_cost(checkpoint).from_layer,
        **times({way: min(taken) for way, taken in seconds.items()}),
        **agreements(scores, drawn_scores),
    }


def times(least: Mapping[str, float]) -> dict[str, float]:
    """Return the CPU seconds of each way, and their ratios."""
    return {
        "direct_without_reuse_cpu_s": least["whole"],
        "direct_cpu_s": least["replayed"],
        "screen_cpu_s": least["screened"],
        "screen_of_samples_cpu_s": least["along"],
        "screen_of_one_sample_cpu_s": least["along_one"],
        "step_cpu_s": least["step"],
        "auto_quantize_cpu_s": least["theirs"],
        "prefix_reuse_speedup": least["whole"] / least["replayed"],
        "screen_speedup_over_direct": least["replayed"] / least["screened"],
        "speedup_over_auto_quantize": least["theirs"] / least["replayed"],
        "screen_speedup_over_auto_quantize": least["theirs"] / least["screened"],
    }


def agreements(scores: Mapping[str, Scores], drawn: Scores | None) -> dict[str, Any]:
    """Return the rank correlations with each layer rounded alone and, if samples were drawn, with their errors."""
    whole, screened, theirs = scores["whole"], scores["screened"], scores["theirs"]
    common = sorted(theirs.keys() & whole.keys())
    return {
        "same_numbers_with_reuse": whole == scores["replayed"],
        "screen_rank_correlation": rank(screened, whole, sorted(whole)),
        "auto_quantize_rank_correlation": rank(theirs, whole, common),
        **{
            f"{who}_rank_correlation_{scheme}": rank(found, whole, [pair for pair in common if pair[1] == scheme])
            for (who, found), scheme in itertools.product([("screen", screened), ("auto_quantize", theirs)], SCHEMES)
        },
        **{f"{way}_rank_correlation_to_samples": rank(scores[way], drawn, common) for way in (scores if drawn else ())},
    }


def totals(errors: Errors) -> Scores:
    """The mean over buckets and samples."""
    return {
        (name, label): sum(map(sum, found)) / sum(map(len, found))
        for name, by in errors.items()
        for label, found in by.items()
    }


def rank(scores: Scores, direct: Scores, pairs: list[tuple[str, str]]) -> float:
    """Spearman's."""
    return float(spearmanr([scores[pair] for pair in pairs], [direct[pair] for pair in pairs]).statistic)


def auto_quantize(checkpoint: Checkpoint, calls: Sequence[Inputs], formats: Sequence[Any], method: str) -> Any:
    """Return the state of modelopt's search after it has ended."""
    import modelopt.torch.quantization as mtq

    model = checkpoint.open()
    with quiet():
        _, state = mtq.auto_quantize(
            model.module,
            constraints={"effective_bits": 8.0},
            quantization_formats=list(formats),
            data_loader=calls,
            forward_step=lambda module, call: denoise_with(module, model)(call),
            loss_func=(lambda output, _: output.square().mean()) if method == "gradient" else None,
            num_calib_steps=len(calls),
            num_score_steps=len(calls),
            method=method,
        )
    return state


def _format(weight: Any, x: Any) -> dict[str, Any]:
    entries = [{"quantizer_name": "*", "enable": False}]
    for name, quantizer in (("weight", weight), ("input", x)):
        if quantizer is not None:
            entries.append({"quantizer_name": f"*{name}_quantizer", "cfg": dict(quantizer)})
    return {"quant_cfg": entries, "algorithm": "max"}


def _scores(state: Any) -> Scores:
    """Return the scores of a search; its schemes differ in the bits of their weights."""
    schemes = {"(effective-bits: 8.0)": "w8a8_step", "(effective-bits: 4.0)": "w4a16"}
    return {
        (layer, scheme): float(score)
        for stats in state["candidate_stats"].values()
        for layer in stats["module_names"]
        for form, score in zip(stats["formats"], stats["scores"], strict=True)
        for bits, scheme in schemes.items()
        if str(form).endswith(bits)
    }


if __name__ == "__main__":
    typer.run(main)
