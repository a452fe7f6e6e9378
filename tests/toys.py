"""An artifact, keys and passes small enough to test the core with."""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field

from intaglio import Context, Key, Outputs, Pass, Recipe, State, Target
from intaglio.pipeline.artifacts.keys import MODEL, PROVENANCE, TARGET
from intaglio.pipeline.errors import MissingExtra, TargetError


@dataclass
class Numbers:
    """Mutable, to show that mutation does not leak."""

    values: list[int]
    file: ClassVar[str] = "numbers.json"

    def save(self, root: Path) -> None:
        (root / self.file).write_text(json.dumps(self.values))

    @classmethod
    def load(cls, root: Path) -> Self:
        return cls(json.loads((root / cls.file).read_text()))


class Text(Numbers):
    file = "text.json"


class Metrics(Numbers):
    file = "metrics.json"

    def save(self, root: Path) -> None:
        (root / self.file).write_text(json.dumps({"quality": {"psnr_db": sum(self.values) / 2}, "layers": self.values}))


NUMBERS = Key("NUMBERS", Numbers, published=True)
SUM = Key("SUM", Text, published=True)
METRICS = Key("METRICS", Metrics, published=True)
NOISE = Key("NOISE", Numbers)
SAME_FILE = Key("SAME_FILE", Numbers, published=True)


class Append(Pass):
    """Refines NUMBERS."""

    name = "append"
    requires = frozenset({NUMBERS})
    provides = frozenset({NUMBERS})
    number: int = Field(1, ge=0, description="what is appended")

    def run(self, state: State, ctx: Context) -> Outputs:
        return {NUMBERS: Numbers([*state[NUMBERS].values, self.number])}


class Origin(Append):
    """Appends how many steps came before."""

    name = "origin"
    wants = frozenset({PROVENANCE})

    def run(self, state: State, ctx: Context) -> Outputs:
        return {NUMBERS: Numbers([*state[NUMBERS].values, len(state[PROVENANCE].runs)])}


class Add(Pass):
    """Reads the target."""

    name = "add"
    requires = frozenset({NUMBERS, TARGET})
    provides = frozenset({SUM})

    def run(self, state: State, ctx: Context) -> Outputs:
        return {SUM: Text([sum(state[NUMBERS].values), state[TARGET].opset_max])}


class Begin(Pass):
    """The first numbers, for recipes that begin with a model."""

    name = "begin"
    requires = frozenset({MODEL})
    provides = frozenset({NUMBERS})

    def run(self, state: State, ctx: Context) -> Outputs:
        return {NUMBERS: Numbers([1])}


class Score(Append):
    """Publishes metrics."""

    name = "score"
    provides = frozenset({METRICS})

    def run(self, state: State, ctx: Context) -> Outputs:
        return {METRICS: Metrics(state[NUMBERS].values)}


class Interrupt(Append):
    """The user presses Ctrl-C."""

    name = "interrupt"

    def run(self, state: State, ctx: Context) -> Outputs:
        raise KeyboardInterrupt


class Same(Append):
    """Another pass, the same numbers."""

    name = "same"


class Roll(Pass):
    name = "roll"
    requires = frozenset({NUMBERS})
    provides = frozenset({NOISE})
    random = True

    def run(self, state: State, ctx: Context) -> Outputs:
        return {NOISE: Numbers(ctx.rng("roll", 1).integers(0, 1000, 4).tolist())}


class RollUndeclared(Roll):
    name = "roll-undeclared"
    random = False


class Peek(Append):
    """Reads what it does not require."""

    name = "peek"

    def run(self, state: State, ctx: Context) -> Outputs:
        return {NUMBERS: Numbers([state[TARGET].opset_max])}


class Forget(Append):
    name = "forget"

    def run(self, state: State, ctx: Context) -> Outputs:
        return {}


class Surplus(Append):
    name = "surplus"

    def run(self, state: State, ctx: Context) -> Outputs:
        return {NUMBERS: Numbers([1]), SUM: Text([1])}


class WrongType(Append):
    name = "wrong-type"

    def run(self, state: State, ctx: Context) -> Outputs:
        return {NUMBERS: state[NUMBERS].values[0]}  # type: ignore[dict-item]  # the mistake that is tested


class Mutate(Pass):
    """Changes its own copy of NUMBERS."""

    name = "mutate"
    requires = frozenset({NUMBERS})
    provides = frozenset({NOISE})

    def run(self, state: State, ctx: Context) -> Outputs:
        state[NUMBERS].values.append(99)
        return {NOISE: Numbers([0])}


class Fail(Append):
    """Leaves a checkpoint, then raises."""

    name = "fail"

    def run(self, state: State, ctx: Context) -> Outputs:
        (ctx.scratch / "half").write_text("half")
        raise ZeroDivisionError("no way")


class Checkpointed(Append):
    """Killed inside its first run, it goes on from its checkpoint."""

    name = "checkpointed"

    def run(self, state: State, ctx: Context) -> Outputs:
        checkpoint = ctx.scratch / "count"
        for count in range(int(checkpoint.read_text()) if checkpoint.exists() else 0, 4):
            checkpoint.write_text(str(count + 1))
            if Path("kill-inside").exists() and count == 2:
                Path("kill-inside").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return {NUMBERS: Numbers([*state[NUMBERS].values, int(checkpoint.read_text())])}


class Slow(Append):
    """Writes a line each time it runs."""

    name = "slow"

    def run(self, state: State, ctx: Context) -> Outputs:
        time.sleep(0.5)
        with Path("slow.log").open("a") as log:
            log.write("ran\n")
        return {NUMBERS: state[NUMBERS]}


class ReadSum(Append):
    name = "read-sum"
    requires = frozenset({SUM, NUMBERS})


class WantSum(Append):
    """The sum where there is one, else 0."""

    name = "want-sum"
    wants = frozenset({SUM})

    def run(self, state: State, ctx: Context) -> Outputs:
        total = state[SUM].values[0] if SUM in state else 0
        return {NUMBERS: Numbers([*state[NUMBERS].values, total])}


class Clash(Append):
    """Publishes a file whose name is taken."""

    name = "clash"
    provides = frozenset({SAME_FILE})

    def run(self, state: State, ctx: Context) -> Outputs:
        return {SAME_FILE: Numbers([1])}


class OnlyTensorRT(Append):
    name = "only-tensorrt"

    @classmethod
    def applies(cls, target: Target) -> bool:
        return target.runtime != "onnxruntime"


class Refuse(Append):
    """No target is good enough."""

    name = "refuse"

    def check(self, target: Target) -> None:
        raise TargetError(f"layer a: not on {target.name}", "layer b: not either")


class NeedsExtra(Append):
    name = "needs-extra"

    def check(self, target: Target) -> None:
        raise MissingExtra("rtx", f"building for {target.name}")


class Abstract(Pass):
    name = "abstract"


class NotAPass:
    pass


START: Outputs = {NUMBERS: Numbers([1])}


def toy_recipe(*steps: object, targets: tuple[str, ...] = ("onnxruntime-cpu",), seed: int = 0) -> Recipe:
    """Steps as in YAML; a class of this file by its name alone."""
    spelled = [_spelled(step) for step in steps]
    return Recipe.model_validate({"model": "toy", "targets": targets, "seed": seed, "steps": spelled})


def _spelled(step: object) -> object:
    match step:
        case str():
            return f"toys:{step}"
        case (name, dict(options)):
            return {f"toys:{name}": options}
    return step
