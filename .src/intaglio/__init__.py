"""Deployment compiler for diffusion models.

Everything that users import is here, and is imported when it is first used: `import intaglio` alone imports neither
torch nor onnxruntime. All other modules may move between versions.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from intaglio.exporters.deploy.denoiser import load
    from intaglio.exporters.deploy.pipeline import load_pipeline
    from intaglio.exporters.qdq.lowering import Lowering
    from intaglio.pipeline.artifacts.graph import Engine, Graph
    from intaglio.pipeline.artifacts.keys import (
        ADAPTER,
        COMPONENTS,
        ENGINE,
        FLOAT_GRAPH,
        FRONT,
        GRAPH,
        LATENCY,
        LINT,
        MODEL,
        PLAN,
        PROFILE,
        QUANTIZED,
        REPORT,
        SENSITIVITY,
        TARGET,
        TRAJECTORY,
        VERIFICATION,
    )
    from intaglio.pipeline.contract.artifact import AnyKey, Artifact, Key, Outputs, State
    from intaglio.pipeline.contract.context import Context
    from intaglio.pipeline.contract.metric import MetricContext
    from intaglio.pipeline.contract.pass_base import Pass
    from intaglio.pipeline.contract.recipe import Recipe, Step
    from intaglio.pipeline.errors import (
        CallError,
        ContractError,
        IntaglioError,
        MissingExtra,
        RecipeError,
        StepFailed,
        StoreError,
        TargetError,
    )
    from intaglio.pipeline.formats.schemes import FLOAT, W8A8_TOKEN
    from intaglio.pipeline.formats.target import Target
    from intaglio.pipeline.model.denoiser import DenoiserModel, SecondSize
    from intaglio.pipeline.model.recording import record
    from intaglio.pipeline.runs.binding import bind
    from intaglio.pipeline.runs.machine import Ability, Fact, Faults, Found, Machine, Package
    from intaglio.pipeline.runs.runner import compile
    from intaglio.pipeline.runs.runtime import Opened, Runtime
    from intaglio.pipeline.runs.store import Store

__version__ = "0.1.0"

_KEYS = """ADAPTER COMPONENTS ENGINE FLOAT_GRAPH FRONT GRAPH LATENCY LINT MODEL PLAN PROFILE QUANTIZED REPORT
SENSITIVITY TARGET TRAJECTORY VERIFICATION"""
_ERRORS = "CallError ContractError IntaglioError MissingExtra RecipeError StepFailed StoreError TargetError"
_MODULES = {
    "exporters.deploy.denoiser": "load",
    "exporters.deploy.pipeline": "load_pipeline",
    "exporters.qdq.lowering": "Lowering",
    "pipeline.artifacts.graph": "Engine Graph",
    "pipeline.artifacts.keys": _KEYS,
    "pipeline.contract.artifact": "AnyKey Artifact Key Outputs State",
    "pipeline.contract.context": "Context",
    "pipeline.contract.metric": "MetricContext",
    "pipeline.contract.pass_base": "Pass",
    "pipeline.contract.recipe": "Recipe Step",
    "pipeline.errors": _ERRORS,
    "pipeline.formats.schemes": "FLOAT W8A8_TOKEN",
    "pipeline.formats.target": "Target",
    "pipeline.model.denoiser": "DenoiserModel SecondSize",
    "pipeline.model.recording": "record",
    "pipeline.runs.binding": "bind",
    "pipeline.runs.machine": "Ability Fact Faults Found Machine Package",
    "pipeline.runs.runner": "compile",
    "pipeline.runs.runtime": "Opened Runtime",
    "pipeline.runs.store": "Store",
}
_PLACES = {name: f"intaglio.{module}" for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "ADAPTER",
    "COMPONENTS",
    "ENGINE",
    "FLOAT",
    "FLOAT_GRAPH",
    "FRONT",
    "GRAPH",
    "LATENCY",
    "LINT",
    "MODEL",
    "PLAN",
    "PROFILE",
    "QUANTIZED",
    "REPORT",
    "SENSITIVITY",
    "TARGET",
    "TRAJECTORY",
    "VERIFICATION",
    "W8A8_TOKEN",
    "Ability",
    "AnyKey",
    "Artifact",
    "CallError",
    "Context",
    "ContractError",
    "DenoiserModel",
    "Engine",
    "Fact",
    "Faults",
    "Found",
    "Graph",
    "IntaglioError",
    "Key",
    "Lowering",
    "Machine",
    "MetricContext",
    "MissingExtra",
    "Opened",
    "Outputs",
    "Package",
    "Pass",
    "Recipe",
    "RecipeError",
    "Runtime",
    "SecondSize",
    "State",
    "Step",
    "StepFailed",
    "Store",
    "StoreError",
    "Target",
    "TargetError",
    "bind",
    "compile",
    "load",
    "load_pipeline",
    "record",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used. Raises AttributeError for any other name."""
    if name not in _PLACES:
        raise AttributeError(f"module 'intaglio' has no attribute {name!r}")
    found = getattr(import_module(_PLACES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """List the public names."""
    return sorted({*globals(), *__all__})
