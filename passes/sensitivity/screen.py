"""Predict how each layer's rounding changes the output, to first order, with a few backward passes for all layers.

Shapes: y output of a layer, v a random direction of the denoiser's output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from intaglio.passes.sensitivity.first_order import Call, products_of
from intaglio.passes.sensitivity.forms import Form
from intaglio.pipeline.errors import StepFailed
from intaglio.pipeline.formats.schemes import Float
from intaglio.pipeline.model.hooks import after_calls, before_calls

if TYPE_CHECKING:
    from intaglio.passes.sensitivity.rounded import RoundedLayers
    from intaglio.pipeline.model.call_rows import Start
    from intaglio.pipeline.model.sampler import Sampler
    from intaglio.pipeline.model.types import Denoise, Inputs

Forms = Mapping[str, Mapping[str, Form]]
"""Forms by layer name and label."""
Products = dict[tuple[str, str], float]
"""v^T J d by layer name and label, for one direction."""


class Screen:
    """Predicts the squared output error of each rounded layer: |J d|^2 = E_v (v^T J d)^2.

    d = rounded(x) - y on the layer's real input, J = d output / d y, and v has random signs (Hutchinson 1990). This is
    the Gauss-Newton form: at full precision the gradient of the error itself is zero. One backward pass per direction
    gives v^T J for all layers, and `products_of` the products with d. Rows are computed one at a time, because a value
    that all rows share cannot be attributed to one row; so the graph of only one row is in memory. `denoise` or the
    caller sets the clock of the rounded layers.
    """

    def __init__(self, rounded: RoundedLayers, denoise: Denoise, forms: Forms) -> None:
        self.rounded, self.denoise, self.forms = rounded, denoise, forms
        self._leaves: list[torch.Tensor] = []
        self._products: Products = {}

    def errors(
        self, inputs: Inputs, probes: Sequence[torch.Generator]
    ) -> tuple[dict[str, dict[str, float]], torch.Tensor]:
        """Predict the squared output error of one row, by layer and label, as the mean over probes.

        Also returns the output. Raises StepFailed if the model allows no backward pass.
        """
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
        """Predict the mean squared error of the samples from `start`, with one layer rounded at every step.

        The first result has it by layer and label: |sum_t J_t d_t|^2, J_t = d samples / d y at step t. The errors of a
        rounded weight at all steps are added. Later steps change an error; J_t includes this change. Only one random
        direction is used, because another sample gives more information than another direction. On the way back, calls
        are computed again, one at a time. The second result has one number for each call: the mean squared error of the
        samples that white noise in the call's output causes, divided by the noise's relative squared magnitude: |J_t|^2
        in the same direction. Raises RuntimeError if no gradient passes through the scheduler.
        """
        calls: list[tuple[Inputs, torch.Tensor]] = []

        def denoise(inputs: Inputs) -> torch.Tensor:
            with torch.no_grad():
                output = self.denoise(inputs)
            calls.append((inputs, output.detach().requires_grad_()))
            return calls[-1][1]

        with torch.enable_grad():
            *_, samples = sampler.followed(denoise, start)
        assert isinstance(samples, torch.Tensor)  # `followed` yields the samples last
        self._products = {}
        # tensors that depend on an output through the scheduler alone, and the gradients with respect to them
        ends, gradients = [samples], [_signs(samples, probe)]
        weights = []
        for inputs, output in reversed(calls):
            (by_output,) = torch.autograd.grad(ends, output, gradients, retain_graph=True)
            weights.append(float(by_output.square().sum() * output.detach().square().mean()) / samples.numel())
            x = inputs[sampler.names.sample]
            by_sample = self._pulled_back(inputs, sampler.names.sample, by_output)
            if x.requires_grad:  # true for all states except the noise at the start
                ends.append(x)
                gradients.append(by_sample)
        return self._mean_squares([self._products], samples.numel()), weights[::-1]

    def _mean_squares(self, products: Sequence[Products], count: int = 1) -> dict[str, dict[str, float]]:
        """Return the mean over probes of the squared products, divided by `count`, by layer and label."""
        return {
            name: {
                label: sum(each.get((name, label), 0.0) ** 2 for each in products) / (len(products) * count)
                for label in forms
            }
            for name, forms in self.forms.items()
        }

    def _pulled_back(self, inputs: Inputs, sample: str, by_output: torch.Tensor) -> torch.Tensor:
        """Return the gradient with respect to the sample, given that to the output. Adds to all layers' products."""
        self._leaves = []
        x = inputs[sample].detach().requires_grad_()
        with torch.enable_grad(), self._noted():
            output = self.denoise({**inputs, sample: x.clone()})  # a copy, as the model may write into it
        by_sample, *_ = torch.autograd.grad(output, [x, *self._leaves], by_output, allow_unused=True)
        return by_sample

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        layers = {name: self.rounded.module.get_submodule(name) for name in self.forms}
        with before_calls(layers, self._enter), after_calls(layers, self._note):
            yield

    def _enter(self, _: str, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return a copy of the input. Its gradient comes from this layer alone, and no code writes into it."""
        x = args[0]
        if x.requires_grad:
            return x.clone()
        self._leaves.append(x.detach().clone().requires_grad_())
        return self._leaves[-1]

    def _note(self, name: str, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        """Let the backward pass add this call's products; calls of the same layer add up."""
        if not y.requires_grad:  # no error passes through this call
            return
        x, step = args[0], self.rounded.clock.now
        kept, plain = x.detach(), y.detach().clone() if self._rounds_outputs(name) else None
        by_y: list[torch.Tensor] = []

        def add(by_x: torch.Tensor) -> None:
            with self.rounded.clock.at(step), torch.no_grad():
                call = Call(kept, plain, by_y.pop(), by_x)
                for label, product in products_of(self.rounded, name, self.forms[name], call).items():
                    self._products[name, label] = self._products.get((name, label), 0.0) + product

        y.register_hook(by_y.append)  # type: ignore[no-untyped-call]  # torch's has no types
        x.register_hook(add)  # type: ignore[no-untyped-call]

    def _rounds_outputs(self, name: str) -> bool:
        return any(not isinstance(form.scheme.output, Float) for form in self.forms[name].values())


def _signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(2, like.shape, generator=generator).to(like.dtype) * 2 - 1
