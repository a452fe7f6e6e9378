"""Writes the reference of all that is public, from its docstrings: `python .ci/reference.py build/docs`."""

import sys
import warnings
from pathlib import Path
from pkgutil import walk_packages

from pdoc import render
from pdoc.doc import Module

import intaglio

DEVICE = "kit_scripts"
"""Scripts that run on a device without intaglio, which nobody imports."""


def public_modules() -> list[str]:
    """Return intaglio and all modules below it without an underscore in front, the scripts of devices left out."""
    below = (module.name for module in walk_packages(intaglio.__path__, "intaglio."))
    return [
        "intaglio",
        *(name for name in below if not any(part.startswith("_") or part == DEVICE for part in name.split("."))),
    ]


def write_reference(folder: Path) -> None:
    """HTML, from `index.html` on. What pdoc warns of, such as an annotation that names nothing, is an error."""
    for name in intaglio.__all__:  # found by its __getattr__, which pdoc does not ask
        setattr(intaglio, name, getattr(intaglio, name))
    render.configure(template_directory=Path(__file__).parent / "reference", show_source=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*ForwardRef", UserWarning)  # in a NamedTuple, of no module
        warnings.filterwarnings(
            "ignore", r"Cannot determine where .*\._\w+ is taken from", UserWarning
        )  # private: not shown
        modules = {name: Module.from_name(name) for name in public_modules()}
        pages = {f"{name.replace('.', '/')}.html": render.html_module(each, modules) for name, each in modules.items()}
        pages |= {"index.html": render.html_index(modules), "search.js": render.search_index(modules)}
    for name, text in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_reference(Path(sys.argv[1]))
