import torch
from tiny import tiny_dit, tiny_unet

from intaglio.pipeline.formats.layer_tables import LayerTables
from intaglio.pipeline.formats.schemes import W8A8_STEP
from intaglio.pipeline.model.blocks import find_blocks, find_units, recomputed
from intaglio.pipeline.model.step_clock import StepClock
from intaglio.pipeline.simulation.layer import QuantizedLayer


def test_blocks_are_the_outermost_members_of_module_lists():
    assert list(find_blocks(tiny_dit())) == ["transformer_blocks.0", "transformer_blocks.1"]
    unet = list(find_blocks(tiny_unet()))
    assert unet[:4] == ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"]
    assert "mid_block.resnets.1" in unet
    assert find_blocks(torch.nn.Linear(2, 2)) == {}


def test_units_are_blocks_and_what_is_beside_them():
    assert list(find_units(tiny_unet()))[:5] == [
        "conv_in",
        "time_proj",
        "time_embedding",
        "class_embedding",
        "down_blocks.0",
    ]
    nested = torch.nn.Module()
    nested.stages = torch.nn.ModuleList(
        [torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.ReLU()]), torch.nn.Linear(1, 1)]
    )
    assert list(find_units(nested)) == ["stages.0.0", "stages.0.1", "stages.1"]


def test_recomputed_activations_give_the_same_gradients_and_are_not_kept():
    model = tiny_dit().requires_grad_(True)
    inputs = {"hidden_states": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 3])}
    inputs["class_labels"] = torch.tensor([0, 4])

    def gradient_and_kept_bytes() -> tuple[torch.Tensor, int]:
        kept = 0

        def note(x: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += x.numel() * x.element_size()
            return x

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = model(**inputs).sample.square().sum()
        loss.backward()
        return model.transformer_blocks[0].ff.net[2].weight.grad.clone(), kept

    plain, all_kept = gradient_and_kept_bytes()
    clock = StepClock((1.0,))
    with clock.at(0), recomputed(find_blocks(model).values(), clock):
        again, kept = gradient_and_kept_bytes()
    assert torch.equal(plain, again)
    assert kept < 0.5 * all_kept
    assert "forward" not in vars(model.transformer_blocks[0])


def test_activations_are_recomputed_at_the_step_of_their_forward_pass():
    """The backward pass runs outside of the step, as it does in training."""
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        clock, tables = StepClock((2.0, 1.0)), LayerTables(torch.tensor([100.0, 1.0]))
        block = torch.nn.Sequential(QuantizedLayer(torch.nn.Linear(8, 8), W8A8_STEP, clock, tables), torch.nn.SiLU())
        x = torch.linspace(-1, 1, 8).reshape(1, 8).requires_grad_()
        with recomputed([block] if again else [], clock):
            with clock.at(1):
                y = block(x).square().sum()
            y.backward()
        gradients.append(block[0].layer.weight.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0
