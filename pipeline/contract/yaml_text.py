"""Read YAML from any author in bounded time and memory."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import yaml
from yaml.constructor import ConstructorError, SafeConstructor

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.files import printable

MOST_CHARACTERS = 1 << 18
MOST_VALUES = 30_000
"""Largest number of values, counted as often as aliases repeat them."""
DEEPEST = 50
LONGEST_NUMBER = 100
"""Largest number of characters in a number."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_OTHER_BASE = re.compile(r"[-+]?(0[0-7_]*[0-7]_*|.*:.*)")
"""Numbers to base 8 or 60 in YAML, which look like decimal numbers and times."""
_MERGE = "tag:yaml.org,2002:merge"
"""The key << takes over what another mapping has."""


def read_yaml(text: str, source: str) -> object:
    """Return the content of the text: None, bool, 64-bit int, finite float, str, list, or dict with names as keys.

    Raises RecipeError that names `source` and the position in the text.
    """
    if len(text) > MOST_CHARACTERS:
        raise RecipeError(f"{source}: {len(text)} characters: at most {MOST_CHARACTERS} are read")
    try:
        if problem := _too_much(text):
            raise RecipeError(f"{source}: {problem}")
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise RecipeError(f"{source}: not YAML: {printable(error.problem)}{place}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: characters that UTF-8 cannot encode
        raise RecipeError(f"{source}: not YAML: {printable(' '.join(str(error).split()))}") from error
    return None if node is None else _Values(source).read(node, ())


def _too_much(text: str) -> str | None:
    """Describe content that would take too much time or memory to expand; None if there is none."""
    known: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = [(None, 0)]  # anchor and number of values of each enclosing node
    for event in yaml.parse(text, Loader=_LOADER):
        values, anchor = 0, None
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values = open_.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, values = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in (each for each, _ in open_):
                return f"&{printable(event.anchor)} contains itself"
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


@dataclass(frozen=True)
class _Values:
    """Convert YAML nodes to values. Nodes that no recipe needs are refused, and the error names their position."""

    source: str

    def read(self, node: yaml.Node, place: tuple[str, ...]) -> object:
        """Return the value of a node. Raises RecipeError."""
        tag = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self.read(each, (*place, str(number))) for number, each in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and tag in _SCALARS:
            return self._scalar(node, tag, place)
        if tag == "timestamp":
            raise self._error("a date instead of text: put it in quotes", node, place)
        problem = f"the tag {printable(node.tag)[:80]} is not read: write plain text, numbers, lists or mappings"
        raise self._error(problem, node, place)

    def _mapping(self, node: yaml.MappingNode, place: tuple[str, ...]) -> dict[str, object]:
        merged: dict[str, object] = {}
        own: dict[str, object] = {}
        for key, value in node.value:
            if key.tag == _MERGE:
                for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if not isinstance(each, yaml.MappingNode):
                        raise self._error("<< takes a mapping, or a list of mappings", key, place)
                    merged = self._mapping(each, place) | merged
                continue
            if key.tag != f"{_TAG}str":
                said = printable(key.value)[:80] if isinstance(key, yaml.ScalarNode) else "this key"
                raise self._error(f"{said} is no name: put names that look like numbers in quotes", key, place)
            name = str(self.read(key, place))
            if name in own:
                raise self._error("is given twice", key, (*place, name))
            own[name] = self.read(value, (*place, name))
        return merged | own

    def _scalar(self, node: yaml.ScalarNode, tag: str, place: tuple[str, ...]) -> object:
        text = node.value
        if tag in ("int", "float") and len(text) > LONGEST_NUMBER:
            raise self._error(f"a number of {len(text)} characters: at most {LONGEST_NUMBER} are read", node, place)
        if any(each == "\0" or "\ud800" <= each <= "\udfff" for each in text):
            raise self._error("a NUL character or half of a surrogate pair: remove it", node, place)
        try:
            value = _SCALARS[tag](node)
        except (ArithmeticError, ConstructorError, LookupError, ValueError) as e:
            raise self._error(f"{printable(text)[:80]} is no {tag}", node, place) from e
        if tag in ("int", "float") and _OTHER_BASE.fullmatch(text):
            base = 60 if ":" in text else 8
            why = (
                f"{printable(text)} is the number {value} to base {base} in YAML: write {value}, or put text in quotes"
            )
            raise self._error(why, node, place)
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise self._error(f"the number {text} does not fit in 64 bits", node, place)
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(f"{text} is no finite number", node, place)
        return value

    def _error(self, why: str, node: yaml.Node, place: tuple[str, ...]) -> RecipeError:
        named = "".join(f"{part}: " for part in [".".join(printable(each)[:80] for each in place)] if part)
        at = node.start_mark
        return RecipeError(f"{self.source}: {named}{why} (line {at.line + 1}, column {at.column + 1})")


_CONSTRUCTOR = SafeConstructor()
_SCALARS: Mapping[str, Callable[[yaml.ScalarNode], object]] = {
    "str": _CONSTRUCTOR.construct_yaml_str,
    "int": _CONSTRUCTOR.construct_yaml_int,
    "float": _CONSTRUCTOR.construct_yaml_float,
    "bool": _CONSTRUCTOR.construct_yaml_bool,
    "null": _CONSTRUCTOR.construct_yaml_null,
}
