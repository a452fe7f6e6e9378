"""Weights that stay in their files: the same model, one weight at a time, and nothing of the files in memory."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_folder, tiny_dit, tiny_unet

from intaglio.pipeline.model import stored_weights
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.stored_tensors import StoredTensor, save_tensors


@pytest.fixture(autouse=True)
def all_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_weights, "LEAST_BYTES", 0)


def assert_same(checkpoint: Checkpoint) -> torch.nn.Module:
    """The model with stored weights, which has the state and the outputs of the one in memory."""
    stored, kept = checkpoint.open(stored=True).module, checkpoint.open().module
    weights = dict(stored.named_parameters())
    assert all(isinstance(each, StoredTensor) and isinstance(each, torch.nn.Parameter) for each in weights.values())
    expected = kept.state_dict() | dict(kept.named_buffers())
    found = stored.state_dict() | dict(stored.named_buffers())
    assert [*found] == [*expected]
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in found)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        outputs = [m(x, torch.tensor([5, 9]), class_labels=torch.tensor([1, 2])).sample for m in (stored, kept)]
    assert torch.equal(*outputs)
    return stored


@pytest.mark.parametrize("make", [tiny_dit, tiny_unet])
def test_shards_in_bfloat16_are_the_model_in_float32(make, tmp_path: Path) -> None:
    save_folder(make(), tmp_path)
    folder = tmp_path / ("unet" if make is tiny_unet else "transformer")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    make().bfloat16().save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_same(Checkpoint.resolve(ModelRef(path=str(tmp_path), sampling_steps=1), tmp_path))


def test_a_model_that_diffusers_converts_is_read_as_a_whole(tmp_path: Path) -> None:
    """A file without one of the weights: `from_pretrained` decides what that is, here an error."""
    save_folder(tiny_dit(), tmp_path)
    checkpoint = Checkpoint.resolve(ModelRef(path=str(tmp_path), sampling_steps=1), tmp_path)
    empty = checkpoint.empty()
    del empty.proj_out_1.weight
    empty.proj_out_1.register_parameter("other", torch.nn.Parameter(torch.empty(3, device="meta")))
    assert checkpoint._weights is not None
    assert not stored_weights.fill_(empty, checkpoint._weights)
    assert all(each.is_meta for each in empty.parameters())


def test_stored_values_cannot_be_changed_and_are_read_by_every_operation() -> None:
    values, reads = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), []
    stored = StoredTensor((2, 2), torch.float32, lambda: reads.append(1) or values.clone())
    assert (stored.shape, stored.dtype, stored.device.type, stored.numel()) == ((2, 2), torch.float32, "cpu", 4)
    assert copy.deepcopy(stored) is stored
    assert not reads
    assert type(stored.detach()) is type(stored + 1) is torch.Tensor
    assert torch.equal(torch.nn.functional.linear(values, stored), values @ values.T)
    assert stored.numpy().tolist() == stored.tolist() == values.tolist()
    assert len(reads) == 5
    with pytest.raises(TypeError, match=r"mul_.*stays in its file"):
        stored.mul_(2)


def test_tensors_are_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    """In its order: by type, then by name."""
    kinds = [torch.bool, torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.int32]
    kinds += [torch.float32, torch.int64, torch.float64]
    shapes = [(3, 5), (), (0, 2), (7,)]
    tensors = {f'é"{k % 3}:{dtype}{s}': torch.ones(s).to(dtype) for k, dtype in enumerate(kinds) for s in shapes}
    tensors["strided"] = torch.arange(6.0).reshape(2, 3).T
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "whole")
    save_tensors(tmp_path / "parts", tensors.items())
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
