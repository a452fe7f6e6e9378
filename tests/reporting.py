"""The artifacts that a report is written from, small enough to know every figure, and a reader of pages."""

import re
from html.parser import HTMLParser
from pathlib import Path

import torch
from safetensors.torch import save_file

from intaglio.exporters.report.report import WriteReport
from intaglio.pipeline.artifacts.findings import Finding, Findings
from intaglio.pipeline.artifacts.front import Point
from intaglio.pipeline.artifacts.graph import Engine, Graph, TensorSpec
from intaglio.pipeline.artifacts.keys import (
    ADAPTER,
    ENGINE,
    GRAPH,
    LATENCY,
    LINT,
    MODEL,
    PLAN,
    PROVENANCE,
    REPORT,
    SENSITIVITY,
    TARGET,
    VERIFICATION,
)
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.artifacts.provenance import Provenance
from intaglio.pipeline.artifacts.quantized import Adapter, DrawnError
from intaglio.pipeline.artifacts.sensitivity import Sensitivity
from intaglio.pipeline.artifacts.verification import Latency, LayerParity, Report, Verification, VerificationFigures
from intaglio.pipeline.contract.artifact import AnyKey, Artifact, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.recipe import Recipe
from intaglio.pipeline.contract.run_record import RunRecord
from intaglio.pipeline.formats.layer import Layer
from intaglio.pipeline.formats.schemes import FLOAT, W8A8_STEP, W8A8_TOKEN, w4a16
from intaglio.pipeline.formats.target import load_target
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.numerics.quality import SampleRange

SAMPLES = SampleRange(-1.0, 1.0, 0.25)
HOSTILE = 'transformer_blocks.1.<script>alert("x")</script>&amp;'
EMBED = Layer(name="pos_embed.proj", op="conv", shape=(64, 3, 2, 2), bias=True)
LAYERS = (
    EMBED,
    Layer(name="transformer_blocks.0.attn1.to_q", op="linear", shape=(64, 64), bias=True),
    Layer(name="transformer_blocks.0.ff.net.0.proj", op="linear", shape=(256, 128), bias=False),
    Layer(name="transformer_blocks.1.attn1.to_q", op="linear", shape=(64, 64), bias=True),
    Layer(name=HOSTILE, op="linear", shape=(64, 64), bias=True),
)
SCHEMES = (FLOAT, W8A8_TOKEN, w4a16(64), W8A8_STEP, W8A8_TOKEN)
FIGURES = VerificationFigures(
    samples_drawn=16,
    psnr_peak=2.0,
    psnr_db=31.42,
    psnr_db_min=24.1,
    psnr_simulated_db=31.54,
    fidelity_gap_db=0.12,
    fidelity_gap_error_db=0.05,
    sqnr_db=28.9,
    sqnr_db_min=21.6,
    sqnr_simulated_db=29.02,
    cosine=0.99934,
    cosine_min=0.9967,
    error_max=0.125,
    parity_layer_rel_l2_max=4.1e-7,
    parity_rel_l2=0.013,
    fp16_bytes=100_000.0,
)
MODEL_BYTES = 40_000


class Page(HTMLParser):
    """Every start tag as (section, tag, attributes), and the text of every section."""

    VOID = frozenset({"meta", "img", "col", "line", "polyline", "link", "input"})
    APART = frozenset({"dd", "dt", "li", "small", "td", "th"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}
        self.open: list[str] = []
        self.section = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: text or "" for name, text in attrs}
        if tag in ("section", "dl") and named.get("id", named.get("class")) != "facts":
            self.section = named.get("id", "tiles")
        self.tags.append((self.section, tag, named))
        if tag in self.APART:
            self.handle_data(" ")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self.section] = self.texts.get(self.section, "") + data

    def found(self, section: str, tag: str, css: str = "") -> list[dict[str, str]]:
        return [
            attrs
            for where, name, attrs in self.tags
            if (where, name) == (section, tag) and re.search(css, attrs.get("class", ""))
        ]

    def text(self, section: str) -> str:
        return " ".join(self.texts[section].split())


def artifacts(root: Path) -> dict[AnyKey, Artifact]:
    (root / "transformer").mkdir(parents=True)
    (root / "transformer" / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    save_file({"x": torch.zeros(1)}, root / "transformer" / "diffusion_pytorch_model.safetensors")
    (root / "model.onnx").write_bytes(bytes(MODEL_BYTES))
    plan = QuantPlan(LAYERS, {layer.name: scheme for layer, scheme in zip(LAYERS, SCHEMES, strict=True)})
    measured = {x.name: (FLOAT, W8A8_STEP) if x.op == "conv" else (FLOAT, W8A8_TOKEN, W8A8_STEP) for x in LAYERS}
    sensitivity = Sensitivity(
        ((0, 4), (4, 8)),
        (1.0, 3.0),
        LAYERS,
        {name: {s.name: s for s in schemes} for name, schemes in measured.items()},
        {n: {s.name: (0.0, 0.0) if s == FLOAT else (2e-3, 3e-5) for s in schemes} for n, schemes in measured.items()},
        samples=SAMPLES,
    )
    full = torch.full((4, 3, 8, 8), -1.0)
    samples = {"full_precision": full, "simulated": full + 0.124, "deployed": full + 0.125}
    parity = {layer.name: LayerParity(4.1e-7, 4096, 3, 1) for layer in LAYERS[1:]}
    sample = TensorSpec("float32", ("batch", 3, 8, 8))
    recipe = Recipe.parse("{model: models/tiny, targets: [onnxruntime-cpu], seed: 11, steps: [{assign: {samples: 2}}]}")
    ingredients = '{"pass": "intaglio.passes.assign.assign:AssignPrecision@4"}'
    run = RunRecord(
        step="assign",
        origin="x",
        key="0" * 64,
        ingredients=ingredients,
        outputs={"PLAN": "ab12cd34" * 8},
        seconds=1.25,
        peak_bytes=1_500_000_000,
    )
    finding = Finding("int4-shape", "warning", "node <7>", "it is odd", "make it even")
    return {
        MODEL: Checkpoint(root, ModelRef(path="model", sampling_steps=8, guidance=1.5)),
        TARGET: load_target("onnxruntime-cpu"),
        SENSITIVITY: sensitivity,
        PLAN: plan,
        ADAPTER: Adapter(
            {}, tuple(0.1 * 0.98**i for i in range(100)), drawn=(DrawnError(0, 0.04), DrawnError(100, 0.0004)), peak=2.0
        ),
        GRAPH: Graph(root / "model.onnx", {"sample": sample, "step": TensorSpec("int64", ())}, {"noise": sample}),
        ENGINE: Engine("onnxruntime", "1.31.1", low_precision_products=3, float_products=2),
        VERIFICATION: Verification(FIGURES, parity, samples=samples),
        LATENCY: Latency(rows=8, float32_ms=30.0, compiled_ms=12.0),
        LINT: Findings((finding,)),
        PROVENANCE: Provenance(recipe, {"MODEL": "0123abcd" * 8}, (run,)),
    }


def points(*losses: float) -> tuple[Point, ...]:
    schemes = {layer.name: scheme.name for layer, scheme in zip(LAYERS, SCHEMES, strict=True)}
    return tuple(Point({"size": 0.3 + 0.1 * i, "latency": 0.5}, loss, schemes) for i, loss in enumerate(losses))


def write(made: dict[AnyKey, Artifact], **options: int) -> Report:
    report = WriteReport(**options).run(State(made, reader="report"), Context(Path()))[REPORT]
    assert isinstance(report, Report)
    return report
