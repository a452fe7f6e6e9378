"""Name the inputs of a call flatly: `added_cond_kwargs.text_embeds` in a dict, `image_rotary_emb.0` in a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping


def flatten(inputs: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield every tensor with its path, and every value without tensors as one input.

    >>> import torch
    >>> dict(flatten({"added": {"ids": torch.tensor(3)}, "freqs": (torch.tensor(1), None), "sizes": [64, 64]}))
    {'added.ids': tensor(3), 'freqs.0': tensor(1), 'freqs.1': None, 'sizes': [64, 64]}
    """
    for name, value in inputs.items():
        children = _children(value)
        if children is None or not any(_has_tensor(child) for child in children.values()):
            yield name, value
        else:
            yield from ((f"{name}.{path}", leaf) for path, leaf in flatten(children))


def nest(flat: Mapping[str, object]) -> dict[str, object]:
    """Rebuild the arguments that `flatten` took apart: numbered children become a tuple, others a dict.

    >>> nest({"added.ids": 3, "freqs.0": 1, "freqs.1": None})
    {'added': {'ids': 3}, 'freqs': (1, None)}
    """
    children: dict[str, dict[str, object]] = {}
    nested: dict[str, object] = {}
    for name, leaf in flat.items():
        head, dot, path = name.partition(".")
        if dot:
            children.setdefault(head, {})[path] = leaf
        else:
            nested[head] = leaf
    for head, inner in children.items():
        found = nest(inner)
        numbered = all(key.isdecimal() for key in found)
        nested[head] = tuple(found[key] for key in sorted(found, key=int)) if numbered else found
    return nested


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
            return {str(key): child for key, child in value.items()}
        case list() | tuple():
            return {str(place): child for place, child in enumerate(value)}
        case _:
            return None


def _has_tensor(value: object) -> bool:
    import torch

    children = _children(value)
    return isinstance(value, torch.Tensor) if children is None else any(map(_has_tensor, children.values()))
