"""Define the metrics of an output's change: relative error, structure, edges, conditions and time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from intaglio.pipeline.contract.metric import MetricContext

if TYPE_CHECKING:
    import torch


WINDOW = 7
"""Width of the windows whose structure is compared (Wang et al. 2004)."""


class _OfView:
    """Squared error of a view of the outputs, relative to the mean energy of a row of that view."""

    def view(self, output: torch.Tensor, context: MetricContext) -> torch.Tensor:
        """Return a linear function of the output: (R, ...) -> (R, ...)."""
        raise NotImplementedError

    def compare(self, output: torch.Tensor, reference: torch.Tensor, context: MetricContext) -> torch.Tensor:
        """Return |view(y) - view(y_ref)|^2 / mean over rows |view(y_ref)|^2, (R,)."""
        expected = self.view(reference, context).flatten(1)
        error = self.view(output, context).flatten(1) - expected
        return error.square().sum(1) / expected.square().sum(1).mean()


class RelativeError(_OfView):
    """Error of the whole output. It replaces every metric that does not apply."""

    def applies(self, reference: torch.Tensor, context: MetricContext) -> bool:
        """Return True: the metric always applies."""
        return True

    def view(self, output: torch.Tensor, context: MetricContext) -> torch.Tensor:
        """Return the whole output."""
        return output


class Edges(_OfView):
    """Error of the differences between neighbours along the last two axes."""

    def applies(self, reference: torch.Tensor, context: MetricContext) -> bool:
        """Return True for pictures and videos."""
        return reference.ndim >= 4 and min(reference.shape[-2:]) > 1

    def view(self, output: torch.Tensor, context: MetricContext) -> torch.Tensor:
        """Return both kinds of differences, joined in one row."""
        import torch

        return torch.cat([output.diff(dim=-1).flatten(1), output.diff(dim=-2).flatten(1)], dim=1)


class ConditionSwap(_OfView):
    """Error of the response to the condition: the change of the output when only the condition changes."""

    def applies(self, reference: torch.Tensor, context: MetricContext) -> bool:
        """Return True if rows have partners, and the output in full precision responds to the condition."""
        return context.partner is not None and bool(self.view(reference, context).any())

    def view(self, output: torch.Tensor, context: MetricContext) -> torch.Tensor:
        """Return y - y[partner]."""
        return output - output[context.partner]


class Temporal(_OfView):
    """Error of the differences between neighbouring frames."""

    def applies(self, reference: torch.Tensor, context: MetricContext) -> bool:
        """Return True for videos whose frames differ."""
        return reference.ndim == 5 and bool(self.view(reference, context).any())

    def view(self, output: torch.Tensor, context: MetricContext) -> torch.Tensor:
        """Return y[t + 1] - y[t] along the frame axis."""
        return output.diff(dim=context.frame_axis)


class Structure:
    """One minus the contrast and structure terms of SSIM, averaged over channels and square windows of equal weight.

    (2 cov + c) / (var + var_ref + c) (Wang et al. 2004, Eq. 9 and 10). The luminance term is left out,
    because it is defined for values of at least 0 only.
    """

    def applies(self, reference: torch.Tensor, context: MetricContext) -> bool:
        """Return True for pictures and videos."""
        return reference.ndim >= 4 and min(reference.shape[-2:]) > 1

    def compare(self, output: torch.Tensor, reference: torch.Tensor, context: MetricContext) -> torch.Tensor:
        """Return the error of each row, (R,); c is (0.03 * range of the reference)^2."""
        from torch.nn import functional

        height, width = reference.shape[-2:]
        window = (min(WINDOW, height), min(WINDOW, width))
        x, y = (tensor.reshape(len(tensor), -1, height, width).double() for tensor in (output, reference))

        def covariance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            mean_a, mean_b, mean_ab = (functional.avg_pool2d(values, window, stride=1) for values in (a, b, a * b))
            return mean_ab - mean_a * mean_b

        c = (0.03 * float(y.max() - y.min())) ** 2
        similar = (2 * covariance(x, y) + c) / (covariance(x, x) + covariance(y, y) + c)
        return (1 - similar.flatten(1).mean(1)).float()
