"""The artifacts that passes exchange."""

from intaglio.pipeline.artifacts.components import ComponentEngines, Components
from intaglio.pipeline.artifacts.findings import Findings
from intaglio.pipeline.artifacts.front import Front
from intaglio.pipeline.artifacts.graph import Engine, Graph
from intaglio.pipeline.artifacts.layer_times import LayerTimes
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.profile import Profile
from intaglio.pipeline.artifacts.provenance import Provenance
from intaglio.pipeline.artifacts.quantized import Adapter, Quantized
from intaglio.pipeline.artifacts.samples import Samples
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.artifacts.trajectory import Trajectory
from intaglio.pipeline.artifacts.verification import Latency, Report, Verification
from intaglio.pipeline.artifacts.workload import Workload
from intaglio.pipeline.contract.artifact import Key
from intaglio.pipeline.formats.target import Target
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.pipeline_folder import PipelineFolder

MODEL = Key("MODEL", Checkpoint)
PIPELINE = Key("PIPELINE", PipelineFolder)
TARGET = Key("TARGET", Target)
PROVENANCE = Key("PROVENANCE", Provenance)
TRAJECTORY = Key("TRAJECTORY", Trajectory)
WORKLOAD = Key("WORKLOAD", Workload)
SAMPLES = Key("SAMPLES", Samples)
"""Samples of full precision. No step provides them: steps that draw them share them (`Context.keep`)."""
LAYER_TIMES = Key("LAYER_TIMES", LayerTimes)
SENSITIVITY = Key("SENSITIVITY", Sensitivity)
PLAN = Key("PLAN", QuantPlan, published=True)
FRONT = Key("FRONT", Front, published=True)
ADAPTER = Key("ADAPTER", Adapter)
QUANTIZED = Key("QUANTIZED", Quantized)
FLOAT_GRAPH = Key("FLOAT_GRAPH", Graph)
GRAPH = Key("GRAPH", Graph, published=True)
LINT = Key("LINT", Findings)
COMPONENTS = Key("COMPONENTS", Components, published=True)
COMPONENT_ENGINES = Key("COMPONENT_ENGINES", ComponentEngines, published=True)
ENGINE = Key("ENGINE", Engine, published=True)
VERIFICATION = Key("VERIFICATION", Verification)
LATENCY = Key("LATENCY", Latency)
PROFILE = Key("PROFILE", Profile, published=True)
REPORT = Key("REPORT", Report, published=True)
