"""Folders of weights that others quantized, and the step that imports them."""

from pathlib import Path

from harness import Artifacts, run_pass

from intaglio.passes.imports.weights import ImportWeights

LAYER = "transformer_blocks.0.attn1.to_q"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def take(start: Artifacts, path: Path) -> Artifacts:
    return start | run_pass(ImportWeights(path=str(path)), start, Path("import"))
