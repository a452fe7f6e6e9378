"""Reads YAML that anyone may have written, in bounded time and memory."""

import yaml

from intaglio.pipeline.errors import RecipeError

MOST_CHARACTERS = 1 << 20
MOST_VALUES = 100_000
"""Counted as often as aliases repeat them."""
DEEPEST = 50


def read_yaml(text: str, source: str) -> object:
    """The plain values that the text says. Raises RecipeError, which names `source`."""
    if len(text) > MOST_CHARACTERS:
        raise RecipeError(f"{source}: {len(text)} characters, at most {MOST_CHARACTERS} are read")
    try:
        if problem := _too_much(text):
            raise RecipeError(f"{source}: {problem}")
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise RecipeError(f"{source}: not YAML: {error.problem}{place}") from error
    except (yaml.YAMLError, ValueError) as error:  # numbers and dates that there are not are the latter
        raise RecipeError(f"{source}: not YAML: {' '.join(str(error).split())}") from error


def _too_much(text: str) -> str | None:
    """What would take long, or all memory, to spell out."""
    known: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = [(None, 0)]  # anchor and number of values so far of what encloses the event
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        values, anchor = 0, None
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values = open_.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, values = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in (each for each, _ in open_):
                return f"&{event.anchor} has itself in it"
            values = known.get(str(event.anchor), 0)
        if anchor is not None:
            known[anchor] = values
        enclosing, count = open_[-1]
        open_[-1] = enclosing, count + values
        if len(open_) > DEEPEST:
            return f"lists and mappings are nested in each other more than {DEEPEST} deep"
        if count + values > MOST_VALUES:
            return f"more than {MOST_VALUES} values, counted as often as aliases repeat them"
    return None
