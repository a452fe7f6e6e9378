"""What every layer's rounding does to the output, to first order, from a few backward passes for all layers at once.

Shapes: y output of a layer, v a random direction of the denoiser's output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from intaglio.pipeline.errors import StepFailed

if TYPE_CHECKING:
    from torch import nn

    from intaglio.passes._rounded import RoundedLayers
    from intaglio.pipeline.denoiser import Denoise, Inputs, Sampler, Start
    from intaglio.pipeline.quant.spec import LayerScheme

Forms = Mapping[str, Mapping[str, "LayerScheme"]]
"""By layer name and by label."""


class Screen:
    """|J d|^2 = E_v (v^T J d)^2, d = rounded(x) - y on the layer's real input, J = d output / d y, v of random signs.

    The Gauss-Newton form (Hutchinson 1990): at full precision the gradient of the error itself is zero. One backward
    pass a direction gives v^T J for all layers. Rows are computed one at a time: what they share has no row of its own,
    and one row's graph is all that is in memory. `denoise` sets the clock of the rounded layers, or who calls does.
    """

    def __init__(self, rounded: RoundedLayers, denoise: Denoise, forms: Forms) -> None:
        self.rounded, self.denoise, self.forms = rounded, denoise, forms
        self._leaves: list[torch.Tensor] = []
        self._products: dict[tuple[str, str], float] = {}

    def errors(
        self, inputs: Inputs, probes: Sequence[torch.Generator]
    ) -> tuple[dict[str, dict[str, float]], torch.Tensor]:
        """Predicted squared error of the output for one row, by layer and label, the mean over probes; the output."""
        self._leaves = []
        totals = {(name, label): 0.0 for name, forms in self.forms.items() for label in forms}
        try:
            with torch.enable_grad(), self._noted():
                output = self.denoise(inputs)
            for generator in probes:
                self._products = {}
                signs = torch.randint(2, output.shape, generator=generator).to(output.dtype) * 2 - 1
                torch.autograd.grad(output, self._leaves, signs, retain_graph=True, allow_unused=True)
                for key, product in self._products.items():
                    totals[key] += product**2 / len(probes)
        except RuntimeError as e:
            raise StepFailed(f"sensitivity: no backward pass through this model ({e}): set sensitivity.probes=0") from e
        predicted = {name: {label: totals[name, label] for label in forms} for name, forms in self.forms.items()}
        return predicted, output.detach()

    def errors_of_samples(
        self, sampler: Sampler, start: Start, probes: Sequence[torch.Generator]
    ) -> dict[str, dict[str, float]]:
        """Predicted mean squared error of the samples from `start`, one layer rounded all the way, by layer and label.

        |sum_t J_t d_t|^2, J_t = d samples / d y at step t: what a rounded weight does at every step adds up, and counts
        as the steps that follow leave it. Raises RuntimeError where no gradient comes through the sampler.
        """
        names, totals = sampler.names, {(name, label): 0.0 for name, forms in self.forms.items() for label in forms}
        noise = start.noise.clone().requires_grad_()

        def denoise(inputs: Inputs) -> torch.Tensor:
            output: torch.Tensor = _Recomputed.apply(inputs[names.sample], inputs, names.sample, self)  # type: ignore[no-untyped-call]  # torch's has no types
            return output

        with torch.enable_grad():
            *_, samples = sampler.followed(denoise, replace(start, noise=noise))
        assert isinstance(samples, torch.Tensor)  # they come last
        for generator in probes:
            self._products = {}
            signs = torch.randint(2, samples.shape, generator=generator).to(samples.dtype) * 2 - 1
            torch.autograd.grad(samples, noise, signs, retain_graph=True)
            for key, product in self._products.items():
                totals[key] += product**2 / (len(probes) * samples.numel())
        return {name: {label: totals[name, label] for label in forms} for name, forms in self.forms.items()}

    def pulled_back(self, inputs: Inputs, sample: str, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient by the sample, of a call computed once more; what layers do to its product is added up."""
        self._leaves = []
        x = inputs[sample].detach().requires_grad_()
        with torch.enable_grad(), self._noted():
            output = self.denoise({**inputs, sample: x.clone()})  # which the model may write into
        found: torch.Tensor = torch.autograd.grad(output, [x, *self._leaves], gradient, allow_unused=True)[0]
        return found

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        hooks = [
            self.rounded.module.get_submodule(name).register_forward_hook(partial(self._note, name=name))
            for name in self.forms
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, _: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor, name: str) -> torch.Tensor:
        """Follow this output; a layer that is called twice adds up."""
        x, plain = args[0].detach(), y.detach()
        moved = {label: self.rounded.output(name, form, x) - plain for label, form in self.forms[name].items()}
        if not y.requires_grad:  # nothing before it is followed
            leaf = plain.clone().requires_grad_()
            self._leaves.append(leaf)
            y = leaf.clone()  # which the model may write into

        def add(gradient: torch.Tensor) -> None:
            for label, difference in moved.items():
                product = float((gradient * difference).sum())
                self._products[name, label] = self._products.get((name, label), 0.0) + product

        y.register_hook(add)  # type: ignore[no-untyped-call]  # torch's has no types
        return y


class _Recomputed(torch.autograd.Function):
    """A call of the denoiser of which nothing is kept but its inputs: going back computes it again."""

    @staticmethod
    def forward(ctx: Any, _: torch.Tensor, inputs: Inputs, sample: str, screen: Screen) -> torch.Tensor:
        ctx.call = inputs, sample, screen
        return screen.denoise(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, sample, screen = ctx.call
        return screen.pulled_back(inputs, sample, *gradients), None, None, None
