"""Read what the configuration of a diffusers model says: the shape of a sample, the classes, the quantization."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import one_line, printable
from intaglio.pipeline.model.inputs import MissingInputs


def check_float(config: Mapping[str, Any], file: Path) -> None:
    """Raise RecipeError, which names the file, for the configuration of a model that another library quantized.

    Libraries that diffusers calls for such a model may read pickles, or load code.
    """
    if (written := config.get("quantization_config")) is None:
        return
    method = one_line(written.get("quant_method", "") if isinstance(written, Mapping) else written)[:80]
    raise RecipeError(
        f"model: {printable(file)}: its quantization_config says that {method or 'another library'} quantized the"
        " weights: name the full-precision model that was quantized"
    )


def sample_shape(config: Any) -> tuple[int, ...]:  # a diffusers FrozenDict
    """Return the sample shape in a configuration; `received.check_sample_shape` checks it."""
    size = config.get("sample_size")
    if size is None:
        raise MissingInputs(
            "model: its configuration has no sample_size: name a file of intaglio.record in `conditions`"
        )
    return (config.get("in_channels"), *(size if isinstance(size, list | tuple) else (size, size)))


def class_count(module: Any) -> int | None:  # a model of diffusers
    """Return the number of classes, the null class not counted.

    A DiT adds one class for it, a UNet counts it among its class embeddings.
    """
    config = module.config
    if "class_labels" not in inspect.signature(module.forward).parameters:
        return None
    if config.get("num_embeds_ada_norm") is not None:
        return int(config["num_embeds_ada_norm"])
    if config.get("num_class_embeds") is not None:
        return int(config["num_class_embeds"]) - 1
    return None
