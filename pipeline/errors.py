"""Define every error that a user can meet, with the exit code of the command."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import ClassVar, Self

INTERRUPTED = 130
LISTED = 24
"""Largest number of known names that a message lists if none is similar."""
LONGEST_WORD = 200
"""Largest number of characters of an unknown name that are compared with known names."""


class IntaglioError(Exception):
    """Error that says what is wrong, where, with numbers, and what to do; it carries all problems found together."""

    exit_code: ClassVar[int] = 1

    def __init__(self, *problems: str) -> None:
        self.problems: tuple[str, ...] = problems
        super().__init__(problems[0] if len(problems) == 1 else numbered(problems))

    @classmethod
    def together(cls, problems: Iterable[str]) -> Self:
        """Make one error of this kind with all the problems of several."""
        error = cls.__new__(cls)
        IntaglioError.__init__(error, *problems)
        return error


class RecipeError(IntaglioError):
    """The recipe, or the command line that changed it, asks for something that cannot be done."""

    exit_code = 2


class ContractError(IntaglioError):
    """A pass does not do what it declares: its author has to act."""

    exit_code = 3


class TargetError(IntaglioError):
    """The target cannot execute what was asked of it. Lists every layer."""

    exit_code = 4


class StepFailed(IntaglioError):
    """A step failed: if the pass raised another error, that is chained, and the message names the scratch folder."""

    exit_code = 5


class StoreError(IntaglioError):
    """The store is damaged, or cannot be written."""

    exit_code = 6


class CallError(IntaglioError):
    """A compiled denoiser was called in a way that it was not compiled for."""

    exit_code = 8


class MissingExtra(IntaglioError):
    """A step needs an optional dependency: names the extra to install."""

    exit_code = 7

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the extra {extra!r}: pip install 'intaglio[{extra}]'")


def exit_codes() -> dict[int, str]:
    """Return the meaning of each exit code of the command."""
    kinds = sorted(IntaglioError.__subclasses__(), key=lambda kind: kind.exit_code, reverse=True)
    meant = {kind.exit_code: re.split("[.:]", kind.__doc__ or "")[0] for kind in kinds}
    own = {0: "Success", 1: "A check found errors, or a file cannot be read or written", INTERRUPTED: "Interrupted"}
    return dict(sorted((meant | own).items()))


def numbered(problems: Sequence[str]) -> str:
    """Write a heading with the count, then one numbered line for each problem.

    >>> print(numbered(["no pass 'asign'", "no target 'tensorrt'"]))
    2 problems:
      1. no pass 'asign'
      2. no target 'tensorrt'
    """
    lines = (f"  {number}. {problem}" for number, problem in enumerate(problems, start=1))
    return "\n".join((f"{len(problems)} problems:", *lines))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest the nearest known word, ignoring case, or else list up to `LISTED` known words.

    >>> did_you_mean("Asign", ["assign", "merge"]), did_you_mean("x", ["assign", "merge"]), did_you_mean("x", [])
    (": did you mean 'assign'?", ': known are assign, merge', ': none is known')
    """
    choices = sorted(known)
    folded = {choice.casefold(): choice for choice in choices}
    match get_close_matches(word[:LONGEST_WORD].casefold(), folded, n=1):
        case [near]:
            return f": did you mean {folded[near]!r}?"
        case _ if not choices:
            return ": none is known"
    more = f" and {len(choices) - LISTED} more" if len(choices) > LISTED else ""
    return f": known are {', '.join(choices[:LISTED])}{more}"
