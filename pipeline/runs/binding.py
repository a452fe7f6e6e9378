"""Turn a recipe into one chain of configured passes for each target, and report its problems first."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from intaglio.pipeline.contract.artifact import AnyKey
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.contract.recipe import Recipe, Step, validated
from intaglio.pipeline.entry_points import RUNTIMES
from intaglio.pipeline.errors import IntaglioError, RecipeError
from intaglio.pipeline.formats.target import Target, load_target
from intaglio.pipeline.runs.registry import find_pass, find_runtime


@dataclass(frozen=True)
class BoundStep:
    """Step whose pass exists and whose options are valid."""

    name: str
    configured: Pass
    origin: str
    source_sha256: str | None
    """Digest of the source of a pass from outside intaglio; intaglio's own passes have their `version`."""
    wanted: frozenset[AnyKey] = frozenset()
    """Optional inputs of the pass that this chain provides."""
    plugins: tuple[tuple[str, str], ...] = ()
    """Entry points that the outputs depend on, as pairs of a group and a name: those that the options select, and the
    target's runtime if the pass reads the target."""

    @property
    def requires(self) -> frozenset[AnyKey]:
        """Keys that the step may read."""
        return self.configured.requires | self.wanted

    @property
    def provides(self) -> frozenset[AnyKey]:
        """Return the keys that the step provides."""
        return self.configured.provides


@dataclass(frozen=True)
class Chain:
    """Steps of one target, in order. Each input of a step is provided before it."""

    target: Target
    steps: tuple[BoundStep, ...]


def bind(recipe: Recipe, *, start: Iterable[AnyKey] | None = None, base: Path = Path()) -> tuple[Chain, ...]:
    """Return one chain for each target. Runs nothing; raises one error with every problem of the recipe.

    `start`: the keys that exist before the first step, MODEL and PIPELINE if not given; TARGET and PROVENANCE always.
    `base`: the folder that paths in the recipe are relative to.
    """
    from intaglio.pipeline.artifacts.keys import MODEL, PIPELINE, PROVENANCE, TARGET

    given: set[AnyKey] = {TARGET, PROVENANCE, *((MODEL, PIPELINE) if start is None else start)}
    found = _Problems()
    targets = []
    for name in recipe.targets:
        with found.collect("targets: "):
            target = load_target(name)
            targets.append(find_runtime(target.runtime).here(target))
    found.repeated("target", recipe.targets)
    found.repeated("step", [step.name for step in recipe.steps])
    steps = []
    for step in recipe.steps:
        with found.collect(f"{step.name}: "):
            steps.append(_bind_step(step, base))
    chains = tuple(
        Chain(target, tuple(_wired((step for step in steps if step.configured.applies(target)), given, target)))
        for target in targets
    )
    for chain in chains:
        if len(steps) == len(recipe.steps):  # otherwise the outputs of a missing pass are unknown
            found.collect_wiring(chain, given)
        for bound in chain.steps:
            with found.collect(f"{bound.name}, {chain.target.name}: "):
                bound.configured.check(chain.target)
    found.raise_together()
    return chains


def resolved(recipe: Recipe, chains: Iterable[Chain]) -> Recipe:
    """Return the recipe with every option of every step written out."""
    options = {step.name: step.configured.model_dump(mode="json") for chain in chains for step in chain.steps}
    steps = [step.model_copy(update={"options": options.get(step.name, step.options)}) for step in recipe.steps]
    return recipe.model_copy(update={"steps": tuple(steps)})


def _wired(steps: Iterable[BoundStep], given: Iterable[AnyKey], target: Target) -> Iterator[BoundStep]:
    """Yield the steps with the optional inputs that earlier steps provide, and with the entry points that they use."""
    from intaglio.pipeline.artifacts.keys import TARGET

    available = set(given)
    for step in steps:
        wired = replace(step, wanted=step.configured.wants & available)
        runtime = [(RUNTIMES, target.runtime)] if TARGET in wired.requires else []
        yield replace(wired, plugins=(*step.configured.plugins(), *runtime))
        available |= step.provides


def _bind_step(step: Step, base: Path) -> BoundStep:
    source = find_pass(step.uses, base)
    configured = validated(source.pass_class, dict(step.options), {"base": base})
    return BoundStep(step.name, configured, source.origin, source.source_sha256)


class _Problems:
    """Collect errors and raise them as one error: of their class if all have the same class, else a RecipeError."""

    def __init__(self) -> None:
        self._found: dict[str, type[IntaglioError]] = {}

    @contextmanager
    def collect(self, where: str) -> Iterator[None]:
        try:
            yield
        except IntaglioError as error:
            self._found |= {f"{where}{problem}": type(error) for problem in error.problems}

    def repeated(self, what: str, names: Iterable[str]) -> None:
        listed = list(names)
        for name in sorted({name for name in listed if listed.count(name) > 1}):
            self._found[f"{what} {name!r} is listed {listed.count(name)} times: give each its own name"] = RecipeError

    def collect_wiring(self, chain: Chain, given: Iterable[AnyKey]) -> None:
        available = set(given)
        for position, step in enumerate(chain.steps):
            for key in sorted(step.requires - available, key=str):
                later = [other.name for other in chain.steps[position + 1 :] if key in other.provides]
                advice = f"move it after {later[0]!r}" if later else "put a step that provides it before this one"
                there = ", ".join(sorted(map(str, available)))
                problem = f"{step.name}, {chain.target.name}: needs {key}, but only {there} exist there: {advice}"
                self._found[problem] = RecipeError
            available |= step.provides

    def raise_together(self) -> None:
        kinds = set(self._found.values())
        if kinds:
            kind = kinds.pop() if len(kinds) == 1 else RecipeError
            raise kind.together(self._found)
