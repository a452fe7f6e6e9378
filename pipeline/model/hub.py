"""Download the files of a model on the hub that a run reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from intaglio.pipeline.model.model_files import STEM, STEMS, blamed

SETTINGS = ("model_index.json", "config.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja")
DEEPER = "*/*/*"
"""Pattern of files that are not read: no component has folders of its own."""


def download(path: str, denoisers: Sequence[str]) -> Path:
    """Download `hub:owner/name` and return its folder in the cache: settings, and plain weights or else fp16 ones.

    `denoisers`: folders, one of which holds the weights. Raises RecipeError if the download fails.
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
    """Return patterns of weight files: in a component's folder, and in a repository that holds the denoiser alone."""
    files = [
        f"{stem}{each}"
        for stem in STEMS
        for each in (f"{variant}.safetensors", f"{variant}-?????-of-?????.safetensors")
    ]
    return [*(f"*/{file}" for file in files), *(file for file in files if file.startswith(STEM))]
