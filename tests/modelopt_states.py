"""Denoisers that NVIDIA's Model Optimizer quantizes, what it saves of them, and what is imported from that."""

import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path

import torch
from _four_bits_peers import nvfp4_on_cpu
from harness import Artifacts, run_pass

from intaglio.passes.imports.modelopt import ImportModelopt
from intaglio.pipeline.artifacts.keys import MODEL, TRAJECTORY
from intaglio.pipeline.model.calls import denoise_with


def linear(weight, entering=None, algorithm="max"):
    """Return a configuration of Model Optimizer that quantizes linear layers only."""
    parts = {"weight": weight} | ({"input": entering} if entering else {})
    rows = [
        {"quantizer_name": f"*{n}_quantizer", "parent_class": "nn.Linear", "cfg": dict(c)} for n, c in parts.items()
    ]
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}, *rows], "algorithm": algorithm}


def quantize(start: Artifacts, config, file: Path, *, packed: bool = False):
    """Calibrated on the recorded calls, and saved; `packed`: with its weights packed."""
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq

    model, trajectory = start[MODEL].open(), start[TRAJECTORY]

    def calibrate(module):
        for step in range(len(trajectory.timesteps)):
            denoise_with(module, model)(trajectory.call(step))

    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), nvfp4_on_cpu():
        mtq.quantize(model.module, config, calibrate)
        if packed:
            mtq.compress(model.module)
    mto.save(model.module, file)
    return model


def take(start: Artifacts, file: Path, **options) -> Artifacts:
    return start | run_pass(ImportModelopt(path=str(file), **options), start, file.parent / "import")


def changed(saved, change: Callable, file: Path) -> Path:
    """A file with other quantizers; `change` gets their attributes and all tensors."""
    content = copy.deepcopy(saved)
    mode = content["modelopt_state"]["modelopt_state_dict"][-1][1]
    change(mode["metadata"]["quantizer_state"], content["model_state_dict"])
    torch.save(content, file)
    return file
