"""Programs with complex numbers compute the same with pairs of real numbers."""

import pytest
import torch
from torch import nn

from intaglio.exporters.float_graph.complex_pairs import with_pairs
from intaglio.pipeline.errors import StepFailed

X = torch.linspace(-2, 3, 24).reshape(2, 3, 2, 2)  # as complex numbers (2, 3, 2)
ANGLES = torch.linspace(0, 5, 6).reshape(3, 2)
TABLE = torch.polar(1 + ANGLES, ANGLES)
z = torch.view_as_complex


class Computes(nn.Module):
    def __init__(self, compute) -> None:
        super().__init__()
        self.compute, self.table = compute, TABLE

    def forward(self, x):
        return self.compute(x, self.table)


FORMS = {
    "product": lambda x, t: torch.view_as_real(z(x) * t),
    "product in float64": lambda x, t: torch.view_as_real(z(x) * t.to(torch.complex128)).float(),
    "real factor": lambda x, t: torch.view_as_real(z(x) * x[..., 0] * 2.0),
    "sum and difference": lambda x, t: torch.view_as_real(z(x) + t - z(x).conj() / 4.0),
    "sum with real": lambda x, t: torch.view_as_real(z(x) + x[..., 1]),
    "polar": lambda x, t: torch.view_as_real(torch.polar(x[..., 0], x[..., 1])),
    "complex": lambda x, t: torch.view_as_real(torch.complex(x[..., 0], x[..., 1]) * t),
    "parts": lambda x, t: z(x).real * (z(x) * t).imag,
    "magnitude": lambda x, t: (z(x) * t).abs(),
    "views": lambda x, t: torch.view_as_real(z(x).reshape(6, -1).unsqueeze(-1).transpose(-1, -2).flatten(-2)),
    "turned and back": lambda x, t: torch.view_as_real(
        (z(x).transpose(0, 1) * z(x).transpose(0, 1)).transpose(0, 1).view(2, -1)
    ),
    "axes": lambda x, t: torch.view_as_real(z(x).permute(2, 0, 1).squeeze(-1)[..., 1:].expand(2, 2, 2)),
    "pieces": lambda x, t: torch.view_as_real(torch.cat([*t.split([1, 1], -1), *t.chunk(2, -1)], -1)) + x[0, 0, 0, 0],
    "rows of a table": lambda x, t: torch.view_as_real(z(x) * t[torch.tensor([2, 0, 2])]),
    "gathered": lambda x, t: torch.view_as_real(t.gather(0, (x[0, :, :, 0] > 0).long())),
    "written": lambda x, t: torch.view_as_real(written(z(x))),
    "products of matrices": lambda x, t: torch.view_as_real(torch.einsum("bij,ik->bkj", z(x), t) @ t.mT),
    "real spectrum": lambda x, t: torch.view_as_real(torch.fft.rfft2(x, dim=(1, 3), norm="ortho")),
    "spectrum": lambda x, t: torch.view_as_real(torch.fft.fftn(z(x), dim=(0, 1)) + torch.fft.fft(x[..., 0])),
    "inverse spectrum": lambda x, t: torch.view_as_real(torch.fft.ifft2(z(x), norm="forward")),
    "even signal": lambda x, t: torch.fft.irfft2(z(x), s=(5, 2), dim=(1, 2)),
    "odd signal": lambda x, t: torch.fft.irfft(z(x), n=3, dim=1),
    "sums": lambda x, t: torch.view_as_real(z(x).sum(-1) + torch.stack([t, t], -1).mean(-1).unbind(-1)[0]),
}


def written(x: torch.Tensor) -> torch.Tensor:
    held = torch.zeros(2, 3, 2, dtype=torch.complex64)
    held[:, 1:] = x[:, 1:]
    return held


@pytest.mark.parametrize("form", FORMS)
def test_pairs_compute_what_complex_numbers_do(form):
    module = Computes(FORMS[form])
    program = with_pairs(torch.export.export(module, (X,), strict=False))
    values = [node.meta.get("val") for node in program.graph.nodes]
    assert not any(isinstance(value, torch.Tensor) and value.is_complex() for value in values)
    torch.testing.assert_close(program.module()(X), module(X), rtol=1e-6, atol=1e-6)


def test_a_program_without_complex_numbers_stays_as_it_is():
    program = torch.export.export(Computes(lambda x, t: x + 1), (X,), strict=False)
    assert with_pairs(program) is program


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda x, t: torch.view_as_real(torch.exp(z(x))), "no real form of the complex operator aten.exp.default"),
        (lambda x, t: torch.view_as_real(z(x).sum()), "no real form of aten.sum.default is known"),
        (lambda x, t: z(x), "returns complex numbers"),
        (lambda x, t: torch.view_as_real(z(x) * 1j), "multiplies by a complex number"),
    ],
)
def test_what_has_no_form_with_pairs_is_named(compute, message):
    with pytest.raises(StepFailed, match=message):
        with_pairs(torch.export.export(Computes(compute), (X,), strict=False))
