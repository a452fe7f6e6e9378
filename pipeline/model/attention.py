"""Give torch's MultiheadAttention a linear layer for each of its projections, so that they are layers to quantize.

Shapes: query (B, L, E), key (B, S, E_k), value (B, S, E_v), or with the first two axes exchanged. The E values are H
heads of D values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from intaglio.pipeline.stored_tensors import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
"""Names of the layers that compute query, key and value; torch's class has one more, `out_proj`."""


def split_attention_(module: nn.Module) -> tuple[str, ...]:
    """Give each MultiheadAttention layers for its projections. Changes `module`; returns the names of the attentions.

    Subclasses stay as they are. Stored weights (`StoredTensor`) are not read.
    """
    found = {name: part for name, part in module.named_modules() if type(part) is nn.MultiheadAttention}
    for part in found.values():
        _split_(part)
    return tuple(found)


class SplitAttention(nn.MultiheadAttention):
    """A MultiheadAttention whose projections are linear layers. `split_attention_` makes it from one of torch.

    It computes the same. `in_proj_weight` and similar attributes are computed from the weights of the layers.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    @property
    def in_proj_weight(self) -> torch.Tensor | None:  # type: ignore[override]  # a parameter in torch's class
        """The weights of all three layers, (3 E, E), for code that reads them instead of calling the module.

        None if the inputs have other widths than E, as in torch.
        """
        if not self.embed_dim == self.kdim == self.vdim:
            return None
        return torch.cat([layer.weight.detach() for layer in self._layers()])

    @property
    def in_proj_bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """The biases of all three layers, (3 E,), or None."""
        if self.q_proj.bias is None:
            return None
        return torch.cat([layer.bias.detach() for layer in self._layers()])

    @property
    def q_proj_weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight of the layer that computes the query."""
        return self.q_proj.weight

    @property
    def k_proj_weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight of the layer that computes the key."""
        return self.k_proj.weight

    @property
    def v_proj_weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight of the layer that computes the value."""
        return self.v_proj.weight

    def _layers(self) -> Sequence[nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj

    def forward(  # noqa: PLR0913 - as torch has it
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # a hint: the mask, which is given too, is causal
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attention's output, (B, L, E), and its weights if they are needed. Masks are those of torch."""
        one_sample = query.dim() == 2
        rows_first = one_sample or self.batch_first
        given = [x[None] if one_sample else x if rows_first else x.transpose(0, 1) for x in (query, key, value)]
        q, k, v = (layer(x) for layer, x in zip(self._layers(), given, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, b.expand(x.shape[0], 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        mask = self._mask(q, k, key_padding_mask, attn_mask)
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-1, -2)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if one_sample:
            return y[0], None if weights is None else weights[0]
        return y if rows_first else y.transpose(0, 1), weights

    def _mask(
        self, q: torch.Tensor, k: torch.Tensor, padding: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return what is added to the scores, broadcast to (B, H, L, S); None if there are no masks."""
        added = None
        if mask is not None:
            added = _added(mask, q)
            added = added.reshape(*q.shape[:2], *mask.shape[1:]) if mask.dim() == 3 else added
        if padding is not None:
            padded = _added(padding, q).reshape(q.shape[0], 1, 1, -1)
            added = padded if added is None else added + padded
        if added is None:
            return None
        return F.pad(added, (0, k.shape[2] - added.shape[-1]))  # no mask covers the keys that were appended


def _added(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a mask to add; a Boolean mask is True at places that are not attended to."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)


def _split_(part: nn.MultiheadAttention) -> None:
    """Change torch's module into a SplitAttention, in its place."""
    held: dict[str, Any] = part._parameters
    packed, bias = held.pop("in_proj_weight", None), held.pop("in_proj_bias", None)
    alone = [held.pop(f"{name}_weight", None) for name in PROJECTIONS]
    weights = alone if packed is None else _thirds(packed)
    biases = [None] * 3 if bias is None else _thirds(bias)
    part.__class__ = SplitAttention
    part._qkv_same_embed_dim = False  # layers around it then call it, and do not read its weights
    for name, weight, own in zip(PROJECTIONS, weights, biases, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=own is not None, device="meta")
        layer.weight, layer.bias = weight, own  # type: ignore[assignment]  # None is no bias
        part.register_module(name, layer.train(part.training))


def _thirds(packed: nn.Parameter) -> list[nn.Parameter]:
    """Return the three parts of a parameter along its first axis."""
    size = packed.shape[0] // 3

    def part(place: int) -> nn.Parameter:
        rows = slice(place * size, (place + 1) * size)
        if not isinstance(packed, StoredTensor):
            return nn.Parameter(packed.detach()[rows].clone(), requires_grad=packed.requires_grad)
        shape = (size, *packed.shape[1:])
        return StoredTensor(shape, packed.dtype, lambda: packed.read()[rows].clone()).as_parameter()

    return [part(place) for place in range(3)]
