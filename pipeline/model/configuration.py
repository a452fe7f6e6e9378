"""Refuse the configuration of a diffusers model whose weights another library quantized."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import one_line, printable


def check_float(config: Mapping[str, Any], file: Path) -> None:
    """Raise RecipeError if another library quantized the model. The error names the file.

    Libraries that diffusers calls for such a model may read pickles, or load code.
    """
    if (written := config.get("quantization_config")) is None:
        return
    method = one_line(written.get("quant_method", "") if isinstance(written, Mapping) else written)[:80]
    raise RecipeError(
        f"model: {printable(file)}: its quantization_config says that {method or 'another library'} quantized the"
        " weights: give the full-precision model in model.path"
    )
