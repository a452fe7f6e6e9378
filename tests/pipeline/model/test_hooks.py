import pytest
import torch
from torch import nn

from intaglio.pipeline.model.hooks import after_calls, before_calls


def hooks_of(module: nn.Module) -> int:
    return len(module._forward_pre_hooks) + len(module._forward_hooks)


@pytest.mark.parametrize("watch", [before_calls, after_calls])
def test_no_hook_is_left_behind_an_exception(watch):
    layer = nn.Linear(2, 2)

    def fail():
        assert hooks_of(layer) == 1
        raise KeyError

    with pytest.raises(KeyError), watch({"a": layer}, lambda *_: None):
        fail()
    assert hooks_of(layer) == 0


@pytest.mark.parametrize("watch", [before_calls, after_calls])
def test_no_hook_is_left_where_one_of_the_modules_takes_none(watch):
    layer = nn.Linear(2, 2)
    with pytest.raises(AttributeError), watch({"a": layer, "b": None}, lambda *_: None):
        pass
    assert hooks_of(layer) == 0


def test_arguments_are_noted_with_named_ones_last_and_an_output_can_be_replaced():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    module, seen = Sum(), []
    with before_calls({"sum": module}, lambda name, args: seen.append((name, args))):
        module(1, b=2)
    assert seen == [("sum", (1, 2))]
    with after_calls({"sum": module}, lambda name, args, output: 10 * output):
        assert module(torch.tensor(1), b=2) == 30
    assert module(1, 2) == 3
