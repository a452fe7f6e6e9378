"""Every error a user can meet, with the exit code of the command that ends in it."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import ClassVar, Self


class IntaglioError(Exception):
    """What is wrong, where, with its numbers, and what to do. One error carries every problem found together."""

    exit_code: ClassVar[int] = 1

    def __init__(self, *problems: str) -> None:
        self.problems: tuple[str, ...] = problems
        super().__init__(problems[0] if len(problems) == 1 else numbered(problems))

    @classmethod
    def together(cls, problems: Iterable[str]) -> Self:
        """One error of this kind with all the problems of several."""
        error = cls.__new__(cls)
        IntaglioError.__init__(error, *problems)
        return error


class RecipeError(IntaglioError):
    """The recipe, or the command line that changed it, asks for something that cannot be done."""

    exit_code = 2


class ContractError(IntaglioError):
    """A pass does something else than it declares: its author has to act."""

    exit_code = 3


class TargetError(IntaglioError):
    """The target cannot execute what was asked of it. Lists every layer."""

    exit_code = 4


class StepFailed(IntaglioError):
    """A step raised: the cause is chained, and the message says where its scratch folder is."""

    exit_code = 5


class StoreError(IntaglioError):
    """The store holds something that it cannot have written, or cannot be written."""

    exit_code = 6


class CallError(IntaglioError):
    """A compiled denoiser was called otherwise than it was compiled for."""

    exit_code = 8


class MissingExtra(IntaglioError):
    """A step needs an optional dependency: names the extra to install."""

    exit_code = 7

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the extra {extra!r}: pip install 'intaglio[{extra}]'")


def numbered(problems: Sequence[str]) -> str:
    """A heading with the count, then one numbered line for each problem."""
    lines = (f"  {number}. {problem}" for number, problem in enumerate(problems, start=1))
    return "\n".join((f"{len(problems)} problems:", *lines))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`: did you mean 'x'?`, or the list of what there is."""
    choices = sorted(known)
    match get_close_matches(word, choices, n=1):
        case [near]:
            return f": did you mean {near!r}?"
        case _:
            return f": there is {', '.join(choices)}" if choices else ": there is none"
