"""Coverage-guided fuzzing of all that reads files by anyone: recipes, manifests, and lint's ONNX models.

    python tests/fuzz/readers.py recipe|manifest|lint [CORPUS_DIR] [-max_total_time=600]

Ends with the input that raised anything but the one clear error, and writes it to a file; the options are libFuzzer's.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["intaglio", "yaml"]):
    from intaglio.exporters.lint import lint
    from intaglio.pipeline.errors import RecipeError
    from intaglio.pipeline.manifest import MANIFEST, Manifest
    from intaglio.pipeline.recipe import Recipe
    from intaglio.pipeline.target import load_target


TARGET = load_target("onnxruntime-cpu")


def read_recipe(content: bytes, folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(content)
    recipe = Recipe.read(folder / "recipe.yaml")
    assert Recipe.parse(recipe.to_yaml()) == recipe


def read_manifest(content: bytes, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(content)
    list(Manifest.read(folder).departures(folder))


def read_model(content: bytes, folder: Path) -> None:
    (folder / "model.onnx").write_bytes(content)
    list(lint(folder / "model.onnx", TARGET))


READERS: dict[str, Callable[[bytes, Path], None]] = {
    "recipe": read_recipe,
    "manifest": read_manifest,
    "lint": read_model,
}


def main() -> None:
    reader = READERS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory() as folder:

        def one_input(content: bytes) -> None:
            with suppress(RecipeError):
                reader(content, Path(folder))

        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
