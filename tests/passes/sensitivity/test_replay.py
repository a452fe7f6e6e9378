import pytest
import torch
from tiny import tiny_dit, tiny_unet
from torch import nn
from torch.overrides import TorchFunctionMode

from intaglio.passes.sensitivity.replay import Replay
from intaglio.pipeline.model.layers import layer_table
from intaglio.pipeline.model.recorded_call import record, replayed


class Block(nn.Module):
    """Two layers, and a residual that is added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, skip=None):
        y = self.second(self.first(x).relu())
        y += x  # writes into what `second` returned
        return y if skip is None else y + skip


class Plain(nn.Module):
    """Blocks with a skip from the first to the last, and a layer that is called at the beginning and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        early = y = self.blocks[0](self.ends(x))
        for block in self.blocks[1:-1]:
            y = block(y)
        return self.ends(self.blocks[-1](y, early))


class Counting(nn.Module):
    """A block that acts on more than what it returns: every call adds to what all blocks see."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(8, 8), seen

    def forward(self, x):
        self.seen[0] += 1
        return self.layer(x) * self.seen[0]


class Products(TorchFunctionMode):
    """Counts linear layers and convolutions that are computed."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (nn.functional.linear, nn.functional.conv2d)
        return func(*args, **(kwargs or {}))


def plain():
    torch.manual_seed(0)
    return Plain().eval(), {"x": torch.randn(3, 8)}


def dit():
    inputs = {"hidden_states": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([5, 5]), "class_labels": [0, 4]}
    return tiny_dit(), inputs | {"class_labels": torch.tensor([0, 4])}


def unet():
    inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor(5), "class_labels": torch.tensor([0, 4])}
    return tiny_unet(), inputs


def denoise_with(module):
    def denoise(inputs):
        output = module(**inputs)
        return output if isinstance(output, torch.Tensor) else output.sample

    return denoise


def places(replay: Replay, module: nn.Module, *, check: bool = True):
    """Every layer, with its unit open."""
    for unit in replay.units:
        names = [layer.name for layer in layer_table(module) if layer.name == unit or layer.name.startswith(f"{unit}.")]
        with replay.unit(unit, names, check=check) as exact:
            for name in names:
                assert exact
                yield name


@pytest.mark.parametrize(("make", "check"), [(plain, True), (dit, True), (unet, True), (unet, False)])
def test_a_call_from_a_layer_on_is_the_whole_call_to_the_bit(make, check):
    module, inputs = make()
    replay = Replay(module, denoise_with(module), inputs)
    changed = 0
    for name in places(replay, module, check=check):
        layer = module.get_submodule(name)
        with torch.no_grad():
            weight = layer.weight.clone()
            layer.weight.mul_(1.5)
            expected = denoise_with(module)(inputs)
            found = replay.call(name)
            layer.weight.copy_(weight)
        assert torch.equal(found, expected)
        changed += not torch.equal(expected, replay.output)
    assert changed == len(layer_table(module))


def test_only_what_comes_after_a_layer_is_computed():
    """One of the nine layers is called at both ends, and ends after every other layer: it is computed twice."""
    module, inputs = plain()
    replay = Replay(module, denoise_with(module), inputs)
    counts = {}
    for name in places(replay, module):
        with Products() as products:
            replay.call(name)
        counts[name] = products.count
    assert counts["ends"] == 10
    assert [counts[f"blocks.{i}.{n}"] for i in range(4) for n in ("first", "second")] == [10, 9, 8, 7, 6, 5, 4, 3]


def test_a_unit_that_is_not_checked_costs_what_is_in_it():
    """Two layers of a block, and the outer one in front."""
    module, inputs = plain()
    replay = Replay(module, denoise_with(module), inputs)
    for check, count in ((True, 10 - 2 * 2), (False, 1 + 2)):
        with Products() as products, replay.unit("blocks.2", ["blocks.2.first", "blocks.2.second"], check=check):
            assert products.count == count


def test_without_reuse_all_is_computed():
    module, inputs = plain()
    replay = Replay(module, denoise_with(module), inputs, reuse=False)
    with replay.unit("blocks.3", ["blocks.3.first"]) as exact, Products() as products:
        replay.call("blocks.3.first")
    assert (exact, products.count) == (False, 10)


def test_modules_that_do_more_than_return_are_computed_whole():
    module, seen = nn.Module(), [0]
    module.blocks = nn.ModuleList(Counting(seen) for _ in range(3))

    def denoise(inputs):
        seen[0] = 0
        y = inputs["x"]
        for block in module.blocks:
            y = block(y)
        return y

    replay = Replay(module, denoise, {"x": torch.ones(1, 8)})
    with replay.unit("blocks.2", ["blocks.2.layer"]) as exact:
        assert not exact
        assert torch.equal(replay.call("blocks.2.layer"), replay.output)


def test_what_is_kept_is_of_the_size_of_blocks():
    """Four blocks and the outer layer, which is called twice, each with 3 x 8 numbers of four bytes."""
    module, inputs = plain()
    assert Replay(module, denoise_with(module), inputs).whole.size_bytes == 6 * 3 * 8 * 4


def test_replayed_modules_are_as_they_were_afterwards():
    module, inputs = plain()
    with torch.no_grad():
        modules = dict(module.named_modules())
        recording = record(modules, lambda: module(**inputs), {"blocks.0"})
        with replayed(modules, recording.returned):
            module(x=torch.zeros(3, 8))
        assert torch.equal(module(**inputs), recording.output)
