"""Write a first recipe for a model, from facts that need no weights, except the time of a call."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import yaml

from intaglio.exporters.starter.effort import EFFORTS, Effort, choose_effort, limited, seconds_of
from intaglio.exporters.starter.found import Found, Sampling
from intaglio.exporters.starter.steps import INT8, amounts_of, steps_of
from intaglio.pipeline.cli.schema import FILE as SCHEMA_FILE
from intaglio.pipeline.cli.schema import editor_line
from intaglio.pipeline.contract.recipe import Recipe, beside
from intaglio.pipeline.errors import IntaglioError, RecipeError
from intaglio.pipeline.formats.layer import Layer, structural_schemes, unfit
from intaglio.pipeline.formats.schemes import FLOAT
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.inputs import MissingInputs
from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.model.model_files import single_file_cure
from intaglio.pipeline.model.pipeline_folder import PipelineFolder
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.runs.binding import bind
from intaglio.pipeline.runs.memory import least_bytes
from intaglio.pipeline.runs.registry import runtimes

if TYPE_CHECKING:
    from intaglio.pipeline.model.cost import ModelCost
    from intaglio.pipeline.model.denoiser import DenoiserModel

RECORDING = "conditions.safetensors"
MOST_STEPS = 50
"""Largest number of denoising steps taken from a pipeline: calibration time grows with it."""


def look_at(model: str, targets: tuple[str, ...], base: Path, minutes: float | None = None) -> Found:
    """Inspect a model. Raises RecipeError if it is no model, or has nothing to quantize.

    `base`: the folder of the recipe. `minutes`: the time in which a run of the recipe should end; a call of the model
    is timed for it, which raises RecipeError for a model without weights.
    """
    from intaglio.pipeline.model.blocks import find_blocks
    from intaglio.pipeline.model.cost import count_cost

    chosen = targets or _usual_targets()
    for name in chosen:
        load_target(name)
    path = _beside(model, base)
    ref = ModelRef(path=path)
    checkpoint = Checkpoint.resolve(ref, base)
    sampling = _sampling(checkpoint)
    recording = next((file for file in _recordings(path) if (base / file).is_file()), None)
    if path.rpartition(":")[0].endswith(".py"):
        recording = None  # a factory returns the conditions itself
    ref = ref.model_copy(
        update={"conditions": recording, "sampling_steps": sampling.steps, "guidance": sampling.guidance}
    )
    checkpoint = Checkpoint.resolve(ref, base)
    lacks, cost, opened = None, None, None
    try:
        opened = checkpoint.open(weights=False)
        sampling = _possible(sampling, opened)
        ref = ref.model_copy(update={"sampling_steps": sampling.steps})
        cost = count_cost(opened, ref) if minutes is None else _timed(checkpoint, sampling)
    except MissingInputs as error:
        lacks = str(error).partition(": ")[2].partition(":")[0]
    except (NotImplementedError, RuntimeError):  # the model needs values of a tensor without values
        pass
    module = checkpoint.empty() if opened is None else opened.module
    layers = layer_table(module)
    if not layers:
        raise RecipeError(f"model: {model} has neither Linear nor ConvNd layers: there is nothing to quantize")
    found = Found(
        path=path,
        kind=type(module).__name__,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        layers=layers,
        blocks=len(find_blocks(module)),
        sampling=sampling,
        takes="" if opened is None else _takes(opened),
        conditions=RECORDING if recording is None and lacks is not None else recording,
        lacks=lacks,
        targets=chosen,
        size=max(_relative_size(layers, name, INT8) for name in chosen),
        least=max(_relative_size(layers, name, (*INT8, "w4a16")) for name in chosen),
        components=_components(checkpoint),
        cost=cost,
        minutes=minutes,
        has_weights=checkpoint.has_weights,
        partners=_partners(checkpoint),
    )
    return limited(found, partial(amounts_of, found))


def recipe_text(found: Found, *, schema: bool = False, name: str = "recipe.yaml") -> str:
    """Return the recipe as YAML with the facts as comments. `schema`: True if the schema's file is beside it."""
    effort = choose_effort(found, partial(amounts_of, found))
    lines = [editor_line(SCHEMA_FILE)] if schema else []
    lines += [f"# {line}" if line else "#" for line in _about(found, effort, name)]
    lines += ["model:", f"  path: {_scalar(found.path)}"]
    lines += [f"  sampling_steps: {found.sampling.steps}{_said(found.sampling)}"]
    lines += [f"  guidance: {found.sampling.guidance:g}   # classifier-free guidance scale; 1 means none"]
    if found.conditions is not None:
        lines.append(f"  conditions: {_scalar(found.conditions)}")
    lines += [f"targets: [{', '.join(found.targets)}]   # see `intaglio targets`", "seed: 0", "steps:"]
    for step, comment in steps_of(found, effort):
        lines.append(f"  - {step}{f'   # {comment}' if comment else ''}")
        if step == "lint":
            lines += _commented_components(found)
    return "\n".join(lines) + "\n"


def next_steps(found: Found, recipe: str) -> Iterator[str]:
    """Yield the next steps for the user, in order."""
    if not found.has_weights:
        yield f"put the weights in safetensors into {found.path}: a run needs them"
    if found.lacks is not None:
        yield f"record {found.conditions}, as the recipe says: {found.lacks}"
        if found.minutes is not None:
            yield f"run `intaglio init` again with --force: it then chooses steps for {found.minutes:g} minutes"
    try:
        bind(Recipe.parse(recipe_text(found)), base=Path(recipe).parent)
    except IntaglioError as error:
        yield from error.problems
    if found.assumed_threads is not None:
        yield f"the recipe is for about {found.minutes:g} minutes: for more or less, give `intaglio init --minutes`"
    yield f"intaglio plan {recipe}    # how long it will take"
    yield f"intaglio run {recipe}"


def _about(found: Found, effort: Effort, name: str) -> Iterator[str]:
    million, float_bytes = found.parameters / 1e6, 4 * found.parameters
    held = sum(layer.n * layer.k for layer in found.layers) / found.parameters
    yield f"{found.kind}: {million:.1f} M parameters, {float_bytes / 1e6:,.1f} MB in float32."
    yield f"Compiling it takes at least {least_bytes(found.parameters) / 1e9:.1f} GB of memory."
    for partner in found.partners:
        yield f"{partner} shares its steps: compile it by a recipe of its own, with `subfolder: {partner}` in `model`."
    yield f"Layers that can be quantized: {found.counts}, with {held:.1%} of the parameters."
    if found.takes:
        yield f"Further inputs besides sample and timestep: {found.takes}."
    if found.lacks is not None:
        yield from ("", *wrap(f"{found.lacks}. Record it once, with the pipeline, beside this file:", 110))
        yield from _snippet(found)
    if found.cost is not None:
        operations = found.cost.operations_per_row
        yield from (
            "",
            f"One row (one sample in one call) takes {operations / 1e9:,.3g} GFLOP. Steps that call the model:",
        )
        for step, rows in amounts_of(found, effort):
            yield f"  {step:<12} {rows:>9,} rows, {rows * operations / 1e12:>10,.3g} TFLOP"
        yield from _about_time(found, effort)
    yield ""
    yield f"intaglio plan {name}    # how long it takes here"
    yield f"intaglio run {name}"
    yield f"intaglio run {name} --set assign.budget.size={_between(found):.2f}    # 4-bit weights where they cost least"
    yield f"    # (bytes of the layers relative to fp16: 8 bits are {found.size:.2f}, {found.least:.2f} is the least)"


def _snippet(found: Found) -> Iterator[str]:
    place = found.path if found.components else "the pipeline's folder"
    yield "  import diffusers"
    yield "  from intaglio import record"
    yield f"  pipe = diffusers.DiffusionPipeline.from_pretrained({place.removeprefix('hub:')!r})"
    yield '  plain = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}'
    yield '  prompts = ["a lighthouse on a cliff at dusk", "a bowl of fruit, oil on canvas"]    # 8 or more are better'
    yield f'  record(pipe, {{"prompt": prompts, **plain}}, {{"prompt": "", **plain}}).save("{found.conditions}")'


def _commented_components(found: Found) -> Iterator[str]:
    if found.components:
        yield f"  # other models of the pipeline: {', '.join(f'{n} ({kind})' for n, kind in found.components.items())}"
        first = next(iter(found.components))
        yield f"  # - components: {{precision: {{{first}: w4a16}}, image_to_image: true}}"


def _about_time(found: Found, effort: Effort) -> Iterator[str]:
    """Yield how long the recipe takes here, and what more time would add."""
    if found.minutes is None:
        return
    seconds = seconds_of(found, amounts_of(found, effort))
    if found.assumed_threads is None:
        yield f"Estimated time on this machine: {_minutes(seconds)}; asked for: {found.minutes:g} minutes."
    else:
        yield f"Estimated time with {found.assumed_threads} CPU threads: {_minutes(seconds)}. No call was timed for"
        yield f"it: `intaglio init --minutes` does. Without this option, the limit is {found.minutes:g} minutes."
    if seconds > 60 * found.minutes:
        yield "This is the least that a recipe can do."
    for more in reversed(EFFORTS[: EFFORTS.index(effort)]):
        needed = math.ceil(seconds_of(found, amounts_of(found, more)) / 60)
        yield f"  --minutes {needed}: {more.more_than(effort)}"


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds / 60))} minutes"


def _between(found: Found) -> float:
    """Return a budget at which some layers have 4 bits."""
    return (found.size + found.least) / 2


def _usual_targets() -> tuple[str, ...]:
    """Return the targets that this machine can build completely."""
    return tuple(name for runtime in runtimes().values() for name in runtime.usual_targets())


def _beside(model: str, base: Path) -> str:
    """Return the path of the model relative to the recipe; it is given relative to the current folder."""
    if model.startswith("hub:") or Path(model).is_absolute():
        return model
    if model.rpartition(":")[0].endswith(".py"):
        return beside(model, base)
    if Path(model).is_file():
        raise RecipeError(f"{model} is a file, but a folder is needed: {single_file_cure(model)}")
    if not Path(model).is_dir():
        raise RecipeError(
            f"no folder {model}: give a diffusers folder, `./file.py:factory`, or `hub:{model}` to download it"
            if model.count("/") == 1
            else f"no folder {model}: give a diffusers folder, `./file.py:factory` or `hub:owner/name`"
        )
    return Path(os.path.relpath(model, base)).as_posix()


def _recordings(path: str) -> tuple[str, ...]:
    """Return the places where a recording may be: beside the recipe, and in the model's folder."""
    return RECORDING, f"{path}/{RECORDING}"


def _sampling(checkpoint: Checkpoint) -> Sampling:
    """Return the default settings of the pipeline around the model.

    Guidance that the denoiser takes as an input does not count.
    """
    try:
        folder = PipelineFolder.around(checkpoint)
    except RecipeError:
        return Sampling()
    try:
        kind = folder.kind()
    except RecipeError as error:
        return Sampling(unknown=str(error).removeprefix("model: "))
    if backends := getattr(kind, "_backends", ()):  # diffusers' dummy for a class with missing packages
        absent = [name for name in backends if find_spec(name) is None] or backends
        return Sampling(unknown=f"{kind.__name__} cannot be inspected without {' and '.join(absent)}")
    defaults = {name: each.default for name, each in inspect.signature(kind.__call__).parameters.items()}
    steps, guidance = defaults.get("num_inference_steps"), defaults.get("guidance_scale")
    embedded = checkpoint.config().get("guidance_embeds", False)
    if not isinstance(steps, int):
        return Sampling(unknown=f"{kind.__name__} does not say it")
    return Sampling(
        min(steps, MOST_STEPS),
        max(1.0, float(guidance)) if isinstance(guidance, int | float) and not embedded else Sampling.guidance,
        kind.__name__,
    )


def _possible(sampling: Sampling, model: DenoiserModel) -> Sampling:
    """Return the sampling with its steps limited to those that the model's scheduler makes."""
    from intaglio.pipeline.model.scheduler import scheduled, timesteps

    scheduler = scheduled(model.scheduler, sampling.steps, model.schedule)
    made = len(timesteps(scheduler))
    return replace(sampling, steps=made, said_by=type(scheduler).__name__) if made < sampling.steps else sampling


def _said(sampling: Sampling) -> str:
    """Return a YAML comment on the origin of the number of steps."""
    if sampling.said_by:
        return f"   # default of {sampling.said_by}"
    return f"   # unknown, set the value you sample with: {sampling.unknown}" if sampling.unknown else ""


def _takes(model: DenoiserModel) -> str:
    named = ", ".join((*model.conditions, *model.shared))
    if model.conditions:
        return f"{named}, of {len(next(iter(model.conditions.values())))} rows"
    return named or ("" if model.classes is None else f"class_labels, of {model.classes} classes")


def _timed(checkpoint: Checkpoint, sampling: Sampling) -> ModelCost:
    """Return the cost of a call with its time on this machine. Raises RecipeError for a model without weights."""
    from intaglio.pipeline.model.cost import measure_cost

    if not checkpoint.has_weights:
        raise RecipeError("--minutes: without weights no call can be timed: add them, or leave --minutes out")
    return measure_cost(replace(checkpoint, ref=checkpoint.ref.model_copy(update={"sampling_steps": sampling.steps})))


def _components(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the models of the pipeline that have weights, except the denoiser."""
    try:
        folder = PipelineFolder.around(checkpoint)
    except RecipeError:
        return {}
    classes = {n: kind for n, (_, kind) in folder.classes().items() if n not in folder.denoisers}
    return {n: kind for n, kind in classes.items() if any((folder.root / n).glob("*.safetensors"))}


def _partners(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the pipeline's components that are denoisers of the same class."""
    try:
        return tuple(n for n in PipelineFolder.around(checkpoint).denoisers if n != checkpoint.place)
    except RecipeError:
        return ()


def _relative_size(layers: tuple[Layer, ...], target_name: str, names: tuple[str, ...]) -> float:
    """Return the size relative to fp16 with the smallest possible scheme of each layer, rounded up a little."""
    target = load_target(target_name)
    smallest = (
        min(s.size_bytes(scheme) for scheme in structural_schemes(s, names=names) if unfit(s, scheme, target) is None)
        for s in layers
    )
    return math.ceil(100 * sum(smallest) / sum(layer.size_bytes(FLOAT) for layer in layers)) / 100


def _scalar(text: str) -> str:
    """Write a text as a YAML scalar, in quotes if needed."""
    return yaml.safe_dump(text, default_flow_style=True, width=1000, allow_unicode=True).removesuffix("...\n").strip()
