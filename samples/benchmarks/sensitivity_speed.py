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
from collections.abc import Sequence
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

    def study(*, reuse: bool) -> Study:
        model = checkpoint.open()
        model.module.requires_grad_(False)
        sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
        layers = [layer for layer in layer_table(model.module) if layer.name in trajectory.amax]
        admitted = {layer.name: structural_schemes(layer, (GROUP,), SCHEMES) for layer in layers}
        forms = {name: forms_of({s.name: Form(s) for s in schemes}, parts=False) for name, schemes in admitted.items()}
        batch = Batch.of(sampler, trajectory, rows)
        rounded = RoundedLayers(model.module, trajectory)
        scratch = Path(tempfile.mkdtemp(dir=folder))  # a new one: no measurement is found from before
        return Study(Context(scratch), denoise_with(model.module, model), rounded, batch, steps, forms, reuse)

    def direct(*, reuse: bool) -> Scores:
        made = study(reuse=reuse)
        metrics = {name: {MSE: RelativeError()} for name in made.forms}
        return totals(made.measure({n: list(forms) for n, forms in made.forms.items()}, metrics, MetricContext())[MSE])

    def along(count: int) -> Scores:
        """Return the errors of whole trajectories, as `sensitivity` predicts them."""
        made = study(reuse=True)
        screen = Screen(made.rounded, clock(made), made.forms)
        start = made.batch.sampler.start(count, made.ctx.torch_rng("drift"))
        found: Scores = dict.fromkeys(((name, form) for name, by in made.forms.items() for form in by), 0.0)
        for i in range(count):
            sample, probe = start.part(slice(i, i + 1)), made.ctx.torch_rng("probe", i)
            part, _ = screen.errors_of_samples(made.batch.sampler, sample, probe)
            found = {(name, form): total + part[name][form] for (name, form), total in found.items()}
        return found

    def clock(made: Study) -> Denoise:
        return clocked(made.denoise, made.rounded.clock, made.batch.sampler.names.timestep)

    def of_samples() -> Scores:
        """Squared errors of samples, each layer rounded alone."""
        made = study(reuse=True)
        sampler, denoise = made.batch.sampler, clock(made)
        start = sampler.start(DRAWN, made.ctx.torch_rng("drawn"))
        reference, found = sampler.sample(denoise, start), {}
        for name, form in [(name, form) for name, forms in made.forms.items() for form in forms]:
            with made.rounded.alone(name, made.forms[name][form]):
                found[name, form] = float((sampler.sample(denoise, start) - reference).square().mean())
        return found

    def whole_step() -> Scores:
        step = MeasureSensitivity(schemes=SCHEMES, groups=(GROUP,))
        state = State({MODEL: checkpoint, TRAJECTORY: trajectory}, reader=step.name)
        table = step.run(state, Context(Path(tempfile.mkdtemp(dir=folder))))[SENSITIVITY]
        assert isinstance(table, Sensitivity)  # it is what the step provides
        return {(n, s): table.error_of_samples(n, s) for n, by in table.error.items() for s in by if s != FLOAT.name}

    ways = {
        "whole": lambda: direct(reuse=False),
        "replayed": lambda: direct(reuse=True),
        "screened": lambda: totals(study(reuse=True).screen(probes)),
        "along": lambda: along(MeasureSensitivity().samples),
        "along_one": lambda: along(1),
        "step": whole_step,
        "theirs": lambda: auto_quantized(checkpoint, study(reuse=False), method),
    }
    scores: dict[str, Scores] = {}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        method, failure = "gradient", ""
        try:
            ways["theirs"]()
        except RuntimeError as e:
            method, failure = "kl_div", str(e)
        for way, work in [*ways.items()] * rounds:
            began = time.process_time()
            scores[way] = work()
            seconds[way].append(time.process_time() - began)
        drawn_scores = of_samples() if drawn else {}
    whole, replayed, screened, _, _, _, theirs = scores.values()
    whole_s, replayed_s, screened_s, along_s, one_s, step_s, theirs_s = (min(taken) for taken in seconds.values())
    common = sorted(theirs.keys() & whole.keys())
    return {
        "layers": len({name for name, _ in whole}),
        "layers_and_schemes": len(whole),
        "calls_of_rows": f"{buckets} of {rows}",
        "direct_without_reuse_cpu_s": whole_s,
        "direct_cpu_s": replayed_s,
        "screen_cpu_s": screened_s,
        "screen_of_samples_cpu_s": along_s,
        "screen_of_one_sample_cpu_s": one_s,
        "step_cpu_s": step_s,
        "auto_quantize_cpu_s": theirs_s,
        "auto_quantize_method": method,
        "auto_quantize_by_gradient": failure or "runs",
        "same_numbers_with_reuse": whole == replayed,
        "share_of_products_from_a_layer_on": measure_cost(checkpoint).from_layer,
        "prefix_reuse_speedup": whole_s / replayed_s,
        "screen_speedup_over_direct": replayed_s / screened_s,
        "speedup_over_auto_quantize": theirs_s / replayed_s,
        "screen_speedup_over_auto_quantize": theirs_s / screened_s,
        "screen_rank_correlation": rank(screened, whole, sorted(whole)),
        "auto_quantize_rank_correlation": rank(theirs, whole, common),
        **{
            f"{who}_rank_correlation_{scheme}": rank(scores, whole, [pair for pair in common if pair[1] == scheme])
            for (who, scores), scheme in itertools.product([("screen", screened), ("auto_quantize", theirs)], SCHEMES)
        },
        **{
            f"{way}_rank_correlation_to_samples": rank(scores[way], drawn_scores, common)
            for way in (scores if drawn else ())
        },
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


def auto_quantized(checkpoint: Checkpoint, study: Study, method: str) -> Scores:
    """modelopt's scores on the same calls."""
    formats = [_format(*FORMATS[scheme]) for scheme in SCHEMES]
    return _scores(auto_quantize(checkpoint, [study.batch.inputs(step) for step in study.steps], formats, method))


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
