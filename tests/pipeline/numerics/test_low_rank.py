import numpy as np
import pytest
import torch

from intaglio.pipeline.numerics.low_rank import Branch, load_branches, save_branches


@pytest.mark.parametrize("shape", [(48, 32), (24, 64)])
def test_it_is_the_nearest_matrix_of_its_rank(shape):
    """The rest has the smaller singular values (Eckart and Young)."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    branch = Branch.of(w, 4)
    values = np.linalg.svd(w.double().numpy(), compute_uv=False)
    assert (branch.rank, branch.size_bytes) == (4, 8 * sum(shape))
    assert float(branch.rest(w).norm()) == pytest.approx(float(np.sqrt((values[4:] ** 2).sum())), rel=1e-5)
    for part in (branch.down_RK, branch.up_NR):
        assert torch.equal(part.half().float(), part)


def test_a_weight_of_that_rank_leaves_nothing():
    up, down = torch.tensor([[1.0], [-2.0], [0.5]]), torch.tensor([[3.0, 0.0, -1.0, 2.0]])
    rest = Branch.of(up @ down, 1).rest(up @ down)
    assert float(rest.norm()) < 1e-3 * float((up @ down).norm())


def test_what_float16_does_not_hold_is_refused():
    with pytest.raises(ValueError, match="beyond the range of float16"):
        Branch.of(torch.full((4, 4), 1e30), 1)


def test_branches_are_read_as_they_were_written(tmp_path):
    branch = Branch.of(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), 2)
    save_branches({"a.b": branch}, tmp_path / "branch.safetensors")
    read = load_branches(tmp_path / "branch.safetensors")["a.b"]
    assert torch.equal(read.down_RK, branch.down_RK)
    assert torch.equal(read.up_NR, branch.up_NR)
