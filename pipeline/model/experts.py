"""Compute mixtures of experts densely: every expert for every token, since a graph cannot choose tokens by values.

Shapes: x (R, S, C) tokens, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from intaglio.pipeline.numerics.quality import rel_l2

if TYPE_CHECKING:
    import torch
    from torch import nn

SAME = 1e-4
"""Relative L2 distance up to which the dense form of a module computes the same."""


def dense_experts_(module: nn.Module) -> tuple[str, ...]:
    """Give each mixture of experts a dense forward. Changes `module`; returns the names of the mixtures.

    A mixture has a list `experts` and a gate that returns the indices and weights (R S, K) of each token's experts, and
    perhaps `shared_experts` for all tokens. The first module of a class is called with noise in both forms: only where
    they agree does the class get the dense form. On the meta device, which holds no values, nothing is compared.
    """
    found: dict[type, Callable[[Any, torch.Tensor], torch.Tensor] | None] = {}
    named = []
    for name, part in module.named_modules():
        if not _is_mixture(part):
            continue
        if type(part) not in found:
            found[type(part)] = _dense_form(part)
        if (form := found[type(part)]) is not None:
            named.append(name)
            part.__class__ = _with_forward(type(part), form)  # type: ignore[arg-type]  # a class is hashable
    return tuple(named)


def _is_mixture(part: nn.Module) -> bool:
    from torch import nn

    experts = getattr(part, "experts", None)
    same = isinstance(experts, nn.ModuleList) and len(experts) > 1 and len({type(each) for each in experts}) == 1
    return same and not getattr(type(part), "is_dense", False)


def _dense_form(part: nn.Module) -> Callable[[Any, torch.Tensor], torch.Tensor] | None:
    """Return the dense form of a mixture, None if none computes the same for noise."""
    import torch

    width = next((layer.in_features for layer in part.experts.modules() if isinstance(layer, torch.nn.Linear)), 0)  # type: ignore[union-attr]  # `_is_mixture` checked it
    weight = next(part.parameters())
    gates = [name for name, child in part.named_children() if name not in ("experts", "shared_experts")]
    if not width or len(gates) != 1:
        return None
    form = _form(gates[0])
    if weight.is_meta:
        return form
    x = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.no_grad():
            expected, dense = part(x), form(part, x)
    except Exception:  # whatever a module raises that is called in another way
        return None
    return form if rel_l2(dense, expected) <= SAME else None


@cache
def _form(gate: str) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Return the forward of a mixture whose gate has this name."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        indices, weights = _chosen(getattr(self, gate)(x))
        tokens = x.reshape(-1, x.shape[-1])
        parts = (
            expert(tokens) * (weights * (indices == number)).sum(-1, keepdim=True)
            for number, expert in enumerate(self.experts)
        )
        result = _sum(parts).reshape(x.shape)
        shared = getattr(self, "shared_experts", None)
        return result if shared is None else result + shared(x)

    return forward


def _sum(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def _chosen(routed: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices and weights (R S, K) of a gate's output. Raises ValueError if it has none of one shape."""
    import torch
    from torch.utils._pytree import tree_leaves

    tensors = [leaf for leaf in tree_leaves(routed) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    for indices in tensors:
        for weights in tensors:
            if not indices.is_floating_point() and weights.is_floating_point() and indices.shape == weights.shape:
                return indices.reshape(-1, indices.shape[-1]), weights.reshape(-1, weights.shape[-1])
    raise ValueError("the gate returns no indices and weights of one shape")


@cache
def _with_forward(kind: Any, forward: Callable[..., Any]) -> Any:
    """Return a class with another forward, of the same name."""
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "is_dense": True})
