"""The core: artifacts, passes, recipes, targets, the store and the runner. It names no pass and no exporter."""

from intaglio.pipeline.contract.artifact import AnyKey, Artifact, Key, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.contract.recipe import Recipe, Step
from intaglio.pipeline.formats.target import Target
from intaglio.pipeline.runs.binding import bind
from intaglio.pipeline.runs.runner import compile
from intaglio.pipeline.runs.store import Store

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
