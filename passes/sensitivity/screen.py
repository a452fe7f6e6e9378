"""What every layer's rounding does to the output, to first order, from a few backward passes for all layers at once.

Shapes: y output of a layer, v a random direction of the denoiser's output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from intaglio.pipeline.errors import StepFailed
from intaglio.pipeline.formats.schemes import LayerScheme
from intaglio.pipeline.model.hooks import after_calls

if TYPE_CHECKING:
    from intaglio.passes.sensitivity.rounded import RoundedLayers
    from intaglio.pipeline.model.sampler import Sampler, Start
    from intaglio.pipeline.model.types import Denoise, Inputs

Forms = Mapping[str, Mapping[str, LayerScheme]]
"""By layer name and by label."""
Products = dict[tuple[str, str], float]
"""v^T J d by layer name and label, of one direction."""


class Screen:
    """|J d|^2 = E_v (v^T J d)^2, d = rounded(x) - y on the layer's real input, J = d output / d y, v of random signs.

    The Gauss-Newton form (Hutchinson 1990): at full precision the gradient of the error itself is zero. One backward
    pass a direction gives v^T J for all layers. Rows are computed one at a time: what they share has no row of its own,
    and one row's graph is all that is in memory. The clock of the rounded layers is set by
    `denoise`, or by the caller.
    """

    def __init__(self, rounded: RoundedLayers, denoise: Denoise, forms: Forms) -> None:
        self.rounded, self.denoise, self.forms = rounded, denoise, forms
        self._leaves: list[torch.Tensor] = []
        self._products: Products = {}

    def errors(
        self, inputs: Inputs, probes: Sequence[torch.Generator]
    ) -> tuple[dict[str, dict[str, float]], torch.Tensor]:
        """Predicted squared error of the output for one row, by layer and label, the mean over probes; the output."""
        self._leaves = []
        products: list[Products] = [{} for _ in probes]
        try:
            with torch.enable_grad(), self._noted():
                output = self.denoise(inputs)
            for generator, self._products in zip(probes, products, strict=True):
                signs = _signs(output, generator)
                torch.autograd.grad(output, self._leaves, signs, retain_graph=True, allow_unused=True)
        except RuntimeError as e:
            raise StepFailed(f"sensitivity: no backward pass through this model ({e}): set sensitivity.probes=0") from e
        return self._mean_squares(products), output.detach()

    def errors_of_samples(
        self, sampler: Sampler, start: Start, probe: torch.Generator
    ) -> tuple[dict[str, dict[str, float]], list[float]]:
        """Predicted mean squared error of the samples from `start`, one layer rounded all the way, by layer and label.

        |sum_t J_t d_t|^2, J_t = d samples / d y at step t: what a rounded weight does at every step adds up, and counts
        as the steps that follow leave it. One direction: the next sample says more than another one. Calls are computed
        once more on the way back, one at a time. Also, for each call, the mean squared error of the samples that white
        noise in its output would make, over the noise's relative squared magnitude: |J_t|^2 in the same direction.
        Raises RuntimeError where no gradient comes through the scheduler.
        """
        calls: list[tuple[Inputs, torch.Tensor]] = []

        def denoise(inputs: Inputs) -> torch.Tensor:
            with torch.no_grad():
                output = self.denoise(inputs)
            calls.append((inputs, output.detach().requires_grad_()))
            return calls[-1][1]

        with torch.enable_grad():
            *_, samples = sampler.followed(denoise, start)
        assert isinstance(samples, torch.Tensor)  # they come last
        self._products = {}
        # what depends on an output through the scheduler alone, and the gradients by it
        ends, gradients = [samples], [_signs(samples, probe)]
        weights = []
        for inputs, output in reversed(calls):
            (by_output,) = torch.autograd.grad(ends, output, gradients, retain_graph=True)
            weights.append(float(by_output.square().sum() * output.detach().square().mean()) / samples.numel())
            x = inputs[sampler.names.sample]
            by_sample = self._pulled_back(inputs, sampler.names.sample, by_output)
            if x.requires_grad:  # not the noise that it all begins with
                ends.append(x)
                gradients.append(by_sample)
        return self._mean_squares([self._products], samples.numel()), weights[::-1]

    def _mean_squares(self, products: Sequence[Products], count: int = 1) -> dict[str, dict[str, float]]:
        """By layer and label the mean over probes, of a sum over `count` numbers the mean over these."""
        return {
            name: {
                label: sum(each.get((name, label), 0.0) ** 2 for each in products) / (len(products) * count)
                for label in forms
            }
            for name, forms in self.forms.items()
        }

    def _pulled_back(self, inputs: Inputs, sample: str, by_output: torch.Tensor) -> torch.Tensor:
        """The gradient by the sample of one call from that by its output; what layers do is added to the products."""
        self._leaves = []
        x = inputs[sample].detach().requires_grad_()
        with torch.enable_grad(), self._noted():
            output = self.denoise({**inputs, sample: x.clone()})  # which the model may write into
        by_sample, *_ = torch.autograd.grad(output, [x, *self._leaves], by_output, allow_unused=True)
        return by_sample

    def _noted(self) -> contextlib.AbstractContextManager[None]:
        return after_calls({name: self.rounded.module.get_submodule(name) for name in self.forms}, self._note)

    def _note(self, name: str, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
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


def _signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(2, like.shape, generator=generator).to(like.dtype) * 2 - 1
