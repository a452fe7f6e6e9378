"""The artifacts that passes exchange."""

from intaglio.pipeline.artifact import Key
from intaglio.pipeline.checkpoint import Checkpoint
from intaglio.pipeline.components import ComponentEngines, Components, PipelineFolder
from intaglio.pipeline.findings import Findings
from intaglio.pipeline.front import Front
from intaglio.pipeline.graph import Engine, Graph
from intaglio.pipeline.plan import QuantPlan
from intaglio.pipeline.profile import Profile
from intaglio.pipeline.provenance import Provenance
from intaglio.pipeline.quantized import Adapter, Quantized
from intaglio.pipeline.sensitivity import Sensitivity
from intaglio.pipeline.target import Target
from intaglio.pipeline.trajectory import Trajectory
from intaglio.pipeline.verification import Latency, Report, Verification
from intaglio.pipeline.workload import Workload

MODEL = Key("MODEL", Checkpoint)
PIPELINE = Key("PIPELINE", PipelineFolder)
TARGET = Key("TARGET", Target)
PROVENANCE = Key("PROVENANCE", Provenance)
TRAJECTORY = Key("TRAJECTORY", Trajectory)
WORKLOAD = Key("WORKLOAD", Workload)
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
