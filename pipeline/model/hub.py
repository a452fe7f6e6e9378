"""Downloads what a run reads of a model on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from intaglio.pipeline.model.model_files import STEM, STEMS, blamed

SETTINGS = ("model_index.json", "config.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja")
DEEPER = "*/*/*"
"""Files of other tools, or of checkpoints during training: no component has folders of its own."""


def download(path: str, denoisers: Sequence[str]) -> Path:
    """The folder in the cache that `hub:owner/name` is in: settings and plain weights, or fp16 ones without plain ones.

    `denoisers`: folders that one of the weights is in. Raises RecipeError for what cannot be had.
    """
    from huggingface_hub import snapshot_download

    name = path.removeprefix("hub:")
    with blamed(path):
        folder = Path(snapshot_download(name, allow_patterns=[*SETTINGS, *_weights("")], ignore_patterns=[DEEPER]))
        if not any(each for place in denoisers for each in (folder / place).glob(f"{STEM}[.-]*safetensors")):
            patterns = [*SETTINGS, *_weights(".fp16")]
            folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=[DEEPER]))
    return folder


def _weights(variant: str) -> list[str]:
    """Patterns of files in a component's folder, and of a denoiser's that is a repository of its own."""
    files = [
        f"{stem}{each}"
        for stem in STEMS
        for each in (f"{variant}.safetensors", f"{variant}-?????-of-?????.safetensors")
    ]
    return [*(f"*/{file}" for file in files), *(file for file in files if file.startswith(STEM))]
