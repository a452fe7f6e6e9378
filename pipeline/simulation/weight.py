"""Round the weight of a layer as it will be deployed.

Shapes: N out features, K in features (of a convolution: input channels times kernel), G scales per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, assert_never

import torch
from torch import nn

from intaglio.pipeline.formats.schemes import Float, RoundedWeight

if TYPE_CHECKING:
    from intaglio.pipeline.numerics.basis import Balance
    from intaglio.pipeline.numerics.low_rank import Branch


class WeightRounding(nn.Module):
    """Round a float weight to the deployed one. Simulation, distillation and merge use this class.

    The weight is put into the basis of the layer's balance, the layer's branch is subtracted, and the rest is
    rounded onto the grid of the scales. If the attribute `trained` is set, the weight (N, K) that it returns is rounded
    instead of the model's own. Export writes the codes that merge made, and rounds no weight.
    """

    def __init__(
        self, form: Float | RoundedWeight, balance: Balance | None = None, branch: Branch | None = None
    ) -> None:
        super().__init__()
        self.form, self.balance, self.branch = form, balance, branch
        self.scale: nn.Parameter
        self.group: nn.Parameter | None = None
        self.trained: Callable[[], torch.Tensor] | None = None

    @classmethod
    def fitted(
        cls,
        form: Float | RoundedWeight,
        weight: torch.Tensor,
        balance: Balance | None = None,
        branch: Branch | None = None,
    ) -> WeightRounding:
        """Return a rounding with the scales that the format fits to this weight, which has the layer's shape."""
        made = cls(form, balance, branch)
        if isinstance(form, RoundedWeight):
            made.fit(weight)
        return made

    @property
    def rounded_form(self) -> RoundedWeight:
        """The format of the codes. Raises ValueError for a weight that stays in float."""
        match self.form:
            case RoundedWeight():
                return self.form
            case Float():
                raise ValueError("a float weight has no codes")
            case other:
                assert_never(other)

    def fit(self, weight: torch.Tensor) -> None:
        """Set the scales that the format fits to this weight; its shape is that of the layer."""
        self.set_scales(*self.rounded_form.fit(self.base(weight.detach())))

    def set_scales(self, scale_NG: torch.Tensor, group_NG: torch.Tensor | None) -> None:
        """Round onto this grid from now on; a weight of two levels has scales (N, 1) and integers (N, G)."""
        self.scale = nn.Parameter(scale_NG.clone(), requires_grad=False)
        self.group = None if group_NG is None else nn.Parameter(group_NG.float(), requires_grad=False)

    def code_scale(self) -> torch.Tensor:
        """Return the value of one code of the weight, (N, G)."""
        return self.rounded_form.code_scale(self.scale, self.group)

    def base(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the model's own weight in the basis in which it is rounded, without its branch: (N, K)."""
        w_NK = (weight if self.balance is None else self.balance.weight(weight)).flatten(1)
        return w_NK if self.branch is None else self.branch.rest(w_NK)

    def float_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the float weight that is rounded, (N, K): the trained one if there is one."""
        return self.base(weight) if self.trained is None else self.trained()

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the integer codes, int8 (N, K). Raises ValueError for a weight that stays in float."""
        return self.rounded_form.quantize(self.float_weight(weight), self.code_scale())

    def value(self, codes_NK: torch.Tensor) -> torch.Tensor:
        """Return the weight that these codes stand for, float32 (N, K)."""
        return self.rounded_form.dequantize(codes_NK, self.code_scale().detach())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight that the layer computes with, in the layer's own shape; differentiable in all its parts."""
        match self.form:
            case Float():
                return self.base(weight).reshape(weight.shape)
            case RoundedWeight() as form:
                return form.fake_quantize(self.float_weight(weight), self.code_scale()).reshape(weight.shape)
            case other:
                assert_never(other)
