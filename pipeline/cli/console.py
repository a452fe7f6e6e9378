"""Print tables, figures and durations on the terminal."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from intaglio.pipeline.files import printable

STDOUT = "standard output"
"""Name of the output in messages."""
WIDE = 10_000
"""Line width in characters for output that is no terminal."""


@contextmanager
def printing() -> Iterator[None]:
    """Name the standard output in the error of a block that cannot print. Raises OSError."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads the output any more
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, STDOUT) from error


def open_standard_streams() -> None:
    """Lead the input, the output and the messages of this process to nowhere where its caller closed them.

    Otherwise the next file that is opened, such as one of the store, would receive what is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
    # Python has no object for a stream that was closed when it started
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


def print_table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table as wide as the terminal; where the output is no terminal, as wide as its content."""
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    headed = (Column(printable(name), overflow="fold") for name in columns)
    table = Table(*headed, title=printable(title) or None, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(printable, row))
    width = None if sys.stdout.isatty() else WIDE
    with printing():
        Console(width=width, soft_wrap=width is not None, markup=False, emoji=False).print(table)


def print_json(content: object) -> None:
    """Print JSON in ASCII, with every control character escaped."""
    with printing():
        print(json.dumps(content, indent=1).replace("\x7f", "\\u007f"))


def figure(found: object) -> str:
    """Write a value of metrics.json as text."""
    match found:
        case float():
            # cosine similarities are so close to 1 that 4 digits do not tell them apart
            return f"{found:.6f}" if 0.999 <= found < 1 else f"{found:.4g}"
        case str():
            return found
        case _:
            return json.dumps(found)


def duration(seconds: float | None) -> str:
    """Write seconds as `12.3 s` or `4.5 min`, and `?` where they are not known."""
    if seconds is None:
        return "?"
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
