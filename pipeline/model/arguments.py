"""Name the inputs of a call flatly: `added_cond_kwargs.text_embeds` in a dict, `image_rotary_emb.0` in a tuple."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

_IN_LIST, _IN_DICT = re.compile(r"\[(\d+)\]"), re.compile(r"\{(-?\d+)\}")


def flatten(inputs: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield every tensor with its path, and every value without tensors as one input.

    The items of a tuple are `name.0`, those of a list `name.[0]`, and a dict's whole numbers `name.{0}`.

    >>> import torch
    >>> dict(flatten({"added": {"ids": torch.tensor(3)}, "freqs": (torch.tensor(1), None), "sizes": [64, 64]}))
    {'added.ids': tensor(3), 'freqs.0': tensor(1), 'freqs.1': None, 'sizes': [64, 64]}
    >>> dict(flatten({"images": [torch.tensor(1)], "blocks": {0: torch.tensor(2)}}))
    {'images.[0]': tensor(1), 'blocks.{0}': tensor(2)}
    """
    for name, value in inputs.items():
        children = _children(value)
        if children is None or not any(_has_tensor(child) for child in children.values()):
            yield name, value
        else:
            yield from ((f"{name}.{path}", leaf) for path, leaf in flatten(children))


def nest(flat: Mapping[str, object], numbered: type[list[object] | tuple[object, ...]] = tuple) -> dict[str, object]:
    """Rebuild the arguments that `flatten` took apart; children `0`, `1`, ... become one value of type `numbered`.

    >>> nest({"added.ids": 3, "freqs.0": 1, "freqs.1": None, "images.[0]": 4, "blocks.{0}": 5})
    {'added': {'ids': 3}, 'freqs': (1, None), 'images': [4], 'blocks': {0: 5}}
    """
    children: dict[str, dict[str, object]] = {}
    nested: dict[str, object] = {}
    for name, leaf in flat.items():
        head, dot, path = name.partition(".")
        if dot:
            children.setdefault(head, {})[path] = leaf
        else:
            nested[head] = leaf
    return nested | {head: _whole(nest(inner, numbered), numbered) for head, inner in children.items()}


def plain_name(name: str) -> str:
    """Return a flat name that is the same for a list, a tuple and a dict of numbers.

    >>> plain_name("added.images.[0]")
    'added.images.0'
    """
    return _IN_DICT.sub(r"\1", _IN_LIST.sub(r"\1", name))


def in_order(names: Iterable[str], arguments: Iterable[str]) -> tuple[str, ...]:
    """Sort flat names by the order of their arguments in a signature.

    >>> in_order(["added.ids", "x"], ["x", "t", "added"])
    ('x', 'added.ids')
    """
    places = {argument: place for place, argument in enumerate(arguments)}
    return tuple(sorted(names, key=lambda name: places.get(name.partition(".")[0], len(places))))


def _children(value: object) -> dict[str, object] | None:
    match value:
        case dict():
            return {f"{{{key}}}" if isinstance(key, int) else str(key): child for key, child in value.items()}
        case list():
            return {f"[{place}]": child for place, child in enumerate(value)}
        case tuple():
            return {str(place): child for place, child in enumerate(value)}
        case _:
            return None


def _whole(children: Mapping[str, object], numbered: type[list[object] | tuple[object, ...]]) -> object:
    """Return the list, tuple or dict with these children, in the order of their numbers."""
    if all(key.isdecimal() for key in children):
        return numbered(_by_number(children, list(children)))
    listed = [match[1] for key in children if (match := _IN_LIST.fullmatch(key))]
    if len(listed) == len(children):
        return list(_by_number({key[1:-1]: child for key, child in children.items()}, listed))
    keys = {key: int(match[1]) if (match := _IN_DICT.fullmatch(key)) else key for key in children}
    return {keys[key]: child for key, child in children.items()}


def _by_number(children: Mapping[str, object], numbers: Sequence[str]) -> Iterator[object]:
    return (children[number] for number in sorted(numbers, key=int))


def _has_tensor(value: object) -> bool:
    import torch

    children = _children(value)
    return isinstance(value, torch.Tensor) if children is None else any(map(_has_tensor, children.values()))
