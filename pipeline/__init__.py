"""The core: artifacts, passes, recipes, targets, the store and the runner. It names no pass and no exporter."""

from intaglio.pipeline.artifact import AnyKey, Artifact, Key, Outputs, State
from intaglio.pipeline.binding import bind
from intaglio.pipeline.context import Context
from intaglio.pipeline.pass_base import Pass
from intaglio.pipeline.recipe import Recipe, Step
from intaglio.pipeline.runner import compile
from intaglio.pipeline.store import Store
from intaglio.pipeline.target import Target

__all__ = [
    "AnyKey",
    "Artifact",
    "Context",
    "Key",
    "Outputs",
    "Pass",
    "Recipe",
    "State",
    "Step",
    "Store",
    "Target",
    "bind",
    "compile",
]
