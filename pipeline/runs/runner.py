"""Run the steps of a recipe that the store does not have yet, for each target."""

import errno
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from intaglio.pipeline.artifacts.provenance import Provenance
from intaglio.pipeline.contract.artifact import A, AnyKey, Key, Outputs, State
from intaglio.pipeline.contract.context import Context, Keep, make_anew
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.contract.processes import Processes, processes
from intaglio.pipeline.contract.recipe import Recipe
from intaglio.pipeline.contract.run_record import RunRecord
from intaglio.pipeline.errors import ContractError, IntaglioError, StepFailed, StoreError
from intaglio.pipeline.files import parse_json
from intaglio.pipeline.machine import giving_back
from intaglio.pipeline.runs.binding import BoundStep, Chain, bind, resolved
from intaglio.pipeline.runs.kept import StoreKeep
from intaglio.pipeline.runs.memory import WeightSizes, check_memory, estimated_bytes, forget_peak, resident_bytes
from intaglio.pipeline.runs.publish import check_folders, publish
from intaglio.pipeline.runs.registry import plugin_source
from intaglio.pipeline.runs.store import Store
from intaglio.pipeline.runs.versions import find_version

if TYPE_CHECKING:
    from intaglio.pipeline.model.ref import ModelRef

Digests: TypeAlias = Mapping[AnyKey, str]
NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
"""Texts of out-of-memory errors from torch and the system that have no class of their own."""
MENDED = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR)
"""System errors that may be gone at the next run."""


@dataclass(frozen=True)
class Place:
    """Place of a step in its chain."""

    target: str
    step: str
    position: int
    """Position of the step, counted from 1."""
    count: int


@dataclass(frozen=True)
class StepEvent:
    """Argument of `on_step`: a step is about to run, has run, or is in the store."""

    place: Place
    status: Literal["runs", "done", "hit"]
    seconds: float | None = None
    """Duration in seconds after the step ran; None before."""


@dataclass(frozen=True)
class CompiledTarget:
    """Finished chain. `compiled[PLAN]` loads a fresh copy of an artifact."""

    store: Store
    outputs: Digests
    """Digest of each key's last artifact."""
    runs: tuple[RunRecord, ...]
    folder: Path | None
    """Folder of the published files; None if `compile` was given no `out`."""

    def __getitem__(self, key: Key[A]) -> A:
        return self.store.load(key, self.outputs[key])

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about the quality of the compiled graph; empty where nothing measured it."""
        from intaglio.pipeline.artifacts.keys import VERIFICATION

        digest = self.outputs.get(VERIFICATION)
        return () if digest is None else VERIFICATION.type.load_warnings(self.store.open(digest))


@dataclass(frozen=True)
class PlannedStep:
    """Prediction of what a step would do now.

    `depends`: this is known only after the steps before it have run. If their outputs are those of the last time, the
    step does not run.
    """

    step: str
    status: Literal["hit", "runs", "depends"]
    seconds: float | None
    """Duration when the pass last ran on this model; None if it never did."""
    peak_bytes: int | None = None
    """Peak memory in bytes of that run."""
    estimate_s: float | None = None
    """Estimated duration in seconds, from the rows it computes; only for a step that never ran."""
    estimate_bytes: int | None = None
    """Estimated memory in bytes for the model's weights; only for a step that never ran."""
    disk_bytes: int | None = None
    """Bytes of its outputs in the store in that run, or of all that it writes, estimated from the number of weights."""


def compile(
    recipe: Recipe,
    store: Store,
    *,
    out: Path | None = None,
    start: Outputs | None = None,
    on_step: Callable[[StepEvent], None] = lambda event: None,
    base: Path = Path(),
) -> Mapping[str, CompiledTarget]:
    """Run the recipe for each of its targets and publish to `out / target`. Steps in the store are not run again.

    `start`: the artifacts that exist before the first step; MODEL, as the recipe names it, if not given.
    `base`: the folder that paths in the recipe are relative to.
    """
    from intaglio.pipeline.artifacts.keys import MODEL, PROVENANCE, TARGET

    chains = bind(recipe, start=start, base=base)
    if out is not None and processes().first:
        check_folders([out / chain.target.name for chain in chains], store)
    whole = resolved(recipe, chains)
    artifacts = start_artifacts(recipe, base, chains) if start is None else start
    shared = _put(artifacts, store)
    compiled = {}
    with _lean(artifacts):
        for chain in chains:
            given = shared | _put({TARGET: chain.target}, store)
            outputs = dict(given)
            if start is None and store.find(run_key(chain.steps[0], given, recipe.seed)[0]) is None:
                passes = [step.configured for step in chain.steps]
                check_memory(artifacts[MODEL], passes)  # type: ignore[arg-type]  # MODEL is a Checkpoint
            runs: list[RunRecord] = []
            for position, step in enumerate(chain.steps, start=1):
                if PROVENANCE in step.requires:
                    outputs |= _put({PROVENANCE: Provenance(whole, _by_name(given), tuple(runs))}, store)
                place = Place(chain.target.name, step.name, position, len(chain.steps))
                with _by_users_paths(recipe.model, base, store, given):
                    record = _run_step(step, outputs, recipe.seed, store, on_step, place)
                outputs |= {key: record.outputs[key.name] for key in step.provides}
                runs.append(record)
            folder = None if out is None else out / chain.target.name
            if folder is not None and processes().first:
                publish(folder, store, outputs, Provenance(whole, _by_name(given), tuple(runs)))
            compiled[chain.target.name] = CompiledTarget(store, outputs, tuple(runs), folder)
    return compiled


def plan(
    recipe: Recipe, store: Store, *, start: Outputs | None = None, base: Path = Path()
) -> Mapping[str, tuple[PlannedStep, ...]]:
    """Return what `compile` would do now, for each target. Runs nothing."""
    from intaglio.pipeline.artifacts.keys import TARGET

    chains = bind(recipe, start=start, base=base)
    whole = resolved(recipe, chains)
    artifacts = start_artifacts(recipe, base, chains) if start is None else start
    shared = _put(artifacts, store)
    measured = {(record.origin, _model_of(record)): record for record in store.records()}
    planned = {}
    for chain in chains:
        given = shared | _put({TARGET: chain.target}, store)
        planned[chain.target.name] = tuple(_plan_chain(chain, given, whole, store, measured))
    with _by_users_paths(recipe.model, base, store, shared):
        return _estimated(planned, chains, artifacts)


def _lean(artifacts: Outputs) -> AbstractContextManager[None]:
    """Return a block in which memory is returned at once if the model is large."""
    from intaglio.pipeline.artifacts.keys import MODEL
    from intaglio.pipeline.model.checkpoint import Checkpoint

    model = artifacts.get(MODEL)
    return giving_back() if isinstance(model, Checkpoint) and model.is_large else nullcontext()


def start_artifacts(recipe: Recipe, base: Path, chains: Iterable[Chain]) -> Outputs:
    """Return the first artifacts of chains, except targets; the pipeline around the model only if a step reads it."""
    from intaglio.pipeline.artifacts.keys import MODEL, PIPELINE
    from intaglio.pipeline.model.checkpoint import Checkpoint
    from intaglio.pipeline.model.pipeline_folder import PipelineFolder

    model = Checkpoint.resolve(recipe.model, base)
    if not any(PIPELINE in step.requires for chain in chains for step in chain.steps):
        return {MODEL: model}
    return {MODEL: model, PIPELINE: PipelineFolder.around(model)}


def run_key(step: BoundStep, inputs: Digests, seed: int) -> tuple[str, str]:
    """Return the key of a run, and the JSON text of everything that its outputs depend on."""
    configured = step.configured
    ingredients: dict[str, object] = {
        "pass": f"{step.origin}@{configured.version}",
        "options": configured.model_dump(mode="json"),
        "inputs": _by_name({key: inputs[key] for key in step.requires}),
        "needs": {name: installed_version(name) for name in configured.needs},
    }
    if configured.random:
        ingredients["seed"] = seed
    if step.source_sha256 is not None:
        ingredients["source"] = step.source_sha256
    sources = {name: plugin_source(group, name) for group, name in step.plugins}
    if outside := {name: source for name, source in sources.items() if source is not None}:
        ingredients["plugins"] = outside
    text = json.dumps(ingredients, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest(), text


def installed_version(distribution: str) -> str:
    """Return the version of a distribution, or `none` if it is not installed; a run key treats `none` as a version."""
    return find_version(distribution) or "none"


def _run_step(
    step: BoundStep, inputs: Digests, seed: int, store: Store, tell: Callable[[StepEvent], None], place: Place
) -> RunRecord:
    """Run one step. Only the first process works and the others wait, unless the pass is `shared`."""
    key, ingredients = run_key(step, inputs, seed)
    every = processes()
    with store.lock(key) if every.first else nullcontext():
        if (record := every.agree(store.find(key, _key_names(step)) if every.first else None)) is not None:
            tell(StepEvent(place, "hit", record.seconds))
            return record
        tell(StepEvent(place, "runs"))
        began, counted = time.perf_counter(), forget_peak() is not None
        outputs: Outputs = {}
        if every.first or step.configured.shared:
            state = State({each: store.load(each, inputs[each]) for each in step.requires}, reader=step.name)
            context = Context(
                scratch=store.scratch(key),
                seed=seed if step.configured.random else None,
                log=logging.getLogger(f"intaglio.{step.name}"),
                processes=every if step.configured.shared else Processes(),
                keep=_keep(step, inputs, store, every),
            )
            outputs = _outputs(step, state, context)
        if every.first:
            digests = {each.name: store.put(outputs[each], staging=key) for each in sorted(outputs, key=str)}
            record = RunRecord(
                step=step.name,
                origin=step.origin,
                key=key,
                ingredients=ingredients,
                outputs=digests,
                seconds=round(time.perf_counter() - began, 3),
                peak_bytes=resident_bytes("VmHWM") if counted else None,
            )
            store.finish(record)
        record = every.agree(record)
        assert record is not None  # the first process has made it
    tell(StepEvent(place, "done", record.seconds))
    return record


def _keep(step: BoundStep, inputs: Digests, store: Store, every: Processes) -> Keep:
    """Return how the step shares what depends on its model alone; processes that each compute a part share nothing."""
    from intaglio.pipeline.artifacts.keys import MODEL

    alone = every.count == 1 or not step.configured.shared
    return StoreKeep(store, inputs[MODEL]) if alone and MODEL in step.requires else make_anew


def _outputs(step: BoundStep, state: State, context: Context) -> Outputs:
    """Run the pass and check its outputs against its declarations."""
    try:
        outputs = step.configured.run(state, context)
    except IntaglioError:
        raise
    except Exception as error:
        raise StepFailed(f"{step.name}: {type(error).__name__}: {error}: {_advice(error, context.scratch)}") from error
    if missing := _names(step.provides - outputs.keys()):
        raise ContractError(f"{step.name}: provides {missing}, but did not return it")
    if undeclared := _names(outputs.keys() - step.provides):
        raise ContractError(f"{step.name}: returned {undeclared}, but does not provide it: add it to provides")
    for key, artifact in outputs.items():
        if not isinstance(artifact, key.type):
            raise ContractError(
                f"{step.name}: returned {type(artifact).__name__} as {key}, which is {key.type.__name__}"
            )
    return outputs


def _advice(error: Exception, scratch: Path) -> str:
    """Return advice: run again if the machine was the cause, such as too little memory; else fix the cause first."""
    text = str(error).lower()
    for_lack = isinstance(error, MemoryError) or any(lack in text for lack in NO_MEMORY)
    if for_lack or isinstance(error, BrokenExecutor) or (isinstance(error, OSError) and error.errno in MENDED):
        return f"its progress is in {scratch}: run the same command again to continue"
    return f"its progress is in {scratch}; fix the cause first, `intaglio --debug run` shows where it is"


@contextmanager
def _by_users_paths(model: "ModelRef", base: Path, store: Store, given: Digests) -> Iterator[None]:
    """Replace the path of the model's copy in the store by the user's path in every error."""
    file, colon, _ = model.path.rpartition(":")
    if model.path.startswith("hub:"):
        known = model.path
    else:
        known = str((base / file).parent if colon and file.endswith(".py") else base / model.path)
    copies = [store.object_folder(digest) for key, digest in given.items() if key.name in ("MODEL", "PIPELINE")]
    stored = [str(path) for copy in copies for path in (copy / "model", copy)]  # the longer path first
    try:
        yield
    except IntaglioError as error:
        problems = list(error.problems)
        for path in stored:
            problems = [problem.replace(path, known) for problem in problems]
        if problems == list(error.problems):
            raise
        raise type(error).together(problems) from error


def _model_of(record: RunRecord) -> str | None:
    """Return the digest of the model that the step read; None if it read none or the record does not say."""
    match parse_json(record.ingredients, source=f"the ingredients of {record.step}", error=StoreError):
        case {"inputs": {"MODEL": str(digest)}}:
            return digest
    return None


def _plan_chain(
    chain: Chain, given: Digests, recipe: Recipe, store: Store, measured: Mapping[tuple[str, str | None], RunRecord]
) -> Iterator[PlannedStep]:
    from intaglio.pipeline.artifacts.keys import MODEL, PROVENANCE

    known = dict(given)
    runs: list[RunRecord] = []
    for position, step in enumerate(chain.steps):
        if PROVENANCE in step.requires and len(runs) == position:  # only if all earlier steps are known
            known |= _put({PROVENANCE: Provenance(recipe, _by_name(given), tuple(runs))}, store)
        decidable = step.requires <= known.keys()
        record = store.find(run_key(step, known, recipe.seed)[0], _key_names(step)) if decidable else None
        for key in (PROVENANCE, *step.provides):
            known.pop(key, None)
        if record is not None:
            known |= {key: record.outputs[key.name] for key in step.provides}
            runs.append(record)
            stored = store.size_bytes(record.outputs.values())
            yield PlannedStep(step.name, "hit", record.seconds, record.peak_bytes, disk_bytes=stored)
        else:
            last = measured.get((step.origin, known.get(MODEL) if MODEL in step.requires else None))
            status: Literal["runs", "depends"] = "runs" if decidable else "depends"
            if last is None:
                yield PlannedStep(step.name, status, None)
            else:
                stored = store.size_bytes(last.outputs.values())
                yield PlannedStep(step.name, status, last.seconds, last.peak_bytes, disk_bytes=stored)


def _estimated(
    planned: Mapping[str, tuple[PlannedStep, ...]], chains: tuple[Chain, ...], artifacts: Outputs
) -> Mapping[str, tuple[PlannedStep, ...]]:
    """Add estimates for steps that never ran; one call of the denoiser is timed if some of them compute its rows."""
    from intaglio.pipeline.artifacts.keys import MODEL
    from intaglio.pipeline.model.checkpoint import Checkpoint
    from intaglio.pipeline.model.cost import measure_cost

    passes = {step.name: step.configured for chain in chains for step in chain.steps}
    unknown = {step.step for steps in planned.values() for step in steps if step.seconds is None}
    model = artifacts.get(MODEL)
    counted = any(type(passes[name]).forward_rows is not Pass.forward_rows for name in unknown)
    if not unknown or not isinstance(model, Checkpoint) or (model.entry and not counted):  # a factory makes its weights
        return planned
    cost = measure_cost(model) if counted else None
    sizes, large = WeightSizes.of(model.empty()), model.is_large

    def estimated(step: PlannedStep) -> PlannedStep:
        if step.seconds is not None:
            return step
        configured = passes[step.step]
        rows = None if cost is None else configured.forward_rows(cost)
        seconds = None if rows is None or cost is None else rows * cost.seconds_per_row
        held = estimated_bytes(configured, sizes, large=large)
        stored = configured.stored_bytes(sizes.whole, model.stored_count) or None
        return replace(step, estimate_s=seconds, estimate_bytes=held, disk_bytes=stored)

    return {target: tuple(map(estimated, steps)) for target, steps in planned.items()}


def _put(artifacts: Outputs, store: Store) -> dict[AnyKey, str]:
    with store.lock("start"):
        return {key: store.put(each, staging="start") for key, each in artifacts.items()}


def _by_name(digests: Digests) -> dict[str, str]:
    return {key.name: digests[key] for key in sorted(digests, key=str)}


def _key_names(step: BoundStep) -> list[str]:
    return [key.name for key in step.provides]


def _names(keys: frozenset[AnyKey] | set[AnyKey]) -> str:
    return ", ".join(sorted(map(str, keys)))
