"""The module of a factory becomes the same plain module in float32, whatever wrappers it has."""

from pathlib import Path

import accelerate
import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoKrConfig, LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from intaglio.pipeline.errors import RecipeError
from intaglio.pipeline.model.calls import check_inputs
from intaglio.pipeline.model.checkpoint import Checkpoint
from intaglio.pipeline.model.denoiser import DenoiserModel, SecondSize
from intaglio.pipeline.model.received import as_computed
from intaglio.pipeline.model.ref import ModelRef
from intaglio.pipeline.model.sampler import Sampler

SHAPE = (4, 8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.9))

    def forward(self, sample, timestep):
        return self.b(self.a(sample))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def received(module: object, **given) -> DenoiserModel:
    return as_computed(DenoiserModel(module, DDIMScheduler(), SHAPE, **given), "net.py:make")


def output(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.randn(2, 8, generator=torch.Generator().manual_seed(1)), torch.ones(2))


def with_inner_compiled() -> nn.Module:
    module = net()
    module.b[0] = torch.compile(module.b[0])
    module.b = torch.compile(module.b)
    return torch.compile(nn.DataParallel(torch.compile(module)))


def compiled_in_place() -> nn.Module:
    module = net()
    module.a.compile()
    module.compile()
    return module


@pytest.mark.parametrize(
    "hold",
    [
        lambda: net().train(), lambda: net().double(), lambda: torch.compile(net()), lambda: nn.DataParallel(net()),
        with_inner_compiled, compiled_in_place, lambda: accelerate.cpu_offload(net(), execution_device="cpu"),
    ],
)  # fmt: skip
def test_wrappers_are_taken_off(hold):
    made = received(hold())
    assert [type(each) for each in made.module.modules()] == [Net, nn.Linear, nn.Sequential, nn.Linear, nn.Dropout]
    assert torch.equal(output(made.module), output(net().eval()))
    assert made.names.sample == "sample"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    module = received(net().to(dtype)).module
    assert {each.dtype for each in module.parameters()} == {torch.float32}
    assert torch.equal(output(module), output(net().to(dtype).float().eval()))


class Casting(nn.Module):
    """Casts its inputs to a type that it keeps, or to one that its code names."""

    def __init__(self, named: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype, self.named, self.layer = torch.float16, named, nn.Linear(8, 8).half()

    def forward(self, sample, timestep):
        return self.layer(sample.type(self.dtype if self.named is None else torch.bfloat16))


def test_a_module_that_casts_to_a_type_that_it_keeps_casts_to_float32():
    assert output(received(Casting()).module).dtype == torch.float32


def test_a_cast_in_the_code_is_one_error_that_says_so():
    model = received(Casting(torch.bfloat16))
    with pytest.raises(RecipeError, match=r"its weights are made float32: remove casts to other floating-point types"):
        check_inputs(Sampler(model, 2, 1.0))


def lora(**options) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["a", "b.0"], **options)


def turned_off() -> nn.Module:
    model = get_peft_model(net(), lora())
    model.base_model.disable_adapter_layers()
    return model


@pytest.mark.parametrize(
    ("adapt", "changes"),
    [
        (lambda: get_peft_model(net(), lora()), True),
        (lambda: inject_adapter_in_model(lora(), net()), True),
        (lambda: get_peft_model(net(), lora(use_dora=True)), True),
        (lambda: get_peft_model(net(), LoKrConfig(r=2, target_modules=["a"], init_weights=False)), True),
        (turned_off, False),
    ],
)
def test_adapters_are_fused_as_the_module_computes_them(adapt, changes):
    expected = output(adapt().eval())
    module = received(adapt()).module
    assert [type(each) for each in module.modules()] == [Net, nn.Linear, nn.Sequential, nn.Linear, nn.Dropout]
    torch.testing.assert_close(output(module), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(output(module), output(net().eval())) != changes
    assert not hasattr(module, "peft_config")


def test_inputs_are_on_the_cpu_in_float32():
    rows = torch.ones(3, 5, dtype=torch.bfloat16, requires_grad=True)
    made = received(
        net(), conditions={"text": rows, "ids": torch.arange(3)}, shared={"mask": torch.full((2,), -torch.inf)},
        other=SecondSize((4, 4, 4), {"text": rows}),
    )  # fmt: skip
    assert (made.conditions["text"].dtype, made.conditions["ids"].dtype) == (torch.float32, torch.int64)
    assert not made.conditions["text"].requires_grad
    assert made.other.conditions["text"].dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            "DenoiserModel(3, DDIMScheduler(), (3, 8, 8))",
            "its DenoiserModel has a int as module, not a torch.nn.Module",
        ),
        (
            "DenoiserModel(torch.nn.Linear(2, 2, device='meta'), DDIMScheduler(), (2,))",
            "2 parameters are on torch's meta",
        ),
        ("DenoiserModel(torch.nn.ReLU(), DDIMScheduler(), (3, 0))", r"\(3, 0\) is no shape of a sample"),
        ("DenoiserModel(torch.nn.ReLU(), DDIMScheduler(), (3, 10**9))", "more than 33,554,432 numbers"),
        (
            "DenoiserModel(torch.nn.ReLU(), DDIMScheduler(), (3,), shared={'x': [1]})",
            "x is a list, no tensor: give it in",
        ),
        (
            "DenoiserModel(torch.nn.ReLU(), DDIMScheduler(), (3,), shared={'x': torch.tensor(float('nan'))})",
            "x has NaN",
        ),
        (
            "DenoiserModel(torch.nn.LazyLinear(2), DDIMScheduler(), (2,))",
            "the module is a LazyLinear that has no weights yet: call the module once",
        ),
        (
            "DenoiserModel(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(2)), DDIMScheduler(), (2,))",
            "the module is a TopLevelTracedModule of TorchScript",
        ),
        (
            "DenoiserModel(torch.ao.nn.quantized.dynamic.Linear(2, 2), DDIMScheduler(), (2,))",
            "the module is a Linear, quantized by torch already",
        ),
        (
            "DenoiserModel(type('N', (torch.nn.Module,), {'forward': lambda self, *a: 0})(), DDIMScheduler(), (2,))",
            r"forward of N names no argument \(\*a\): give sample_name and timestep_name",
        ),
        (
            "DenoiserModel(type('N', (torch.nn.Module,), {'forward': lambda s, x, t, /: 0})(), DDIMScheduler(), (2,))",
            "N takes x, t by position alone",
        ),
        ("torch.nn.ReLU()", "returned a ReLU, not an intaglio DenoiserModel"),
        ("1 / 0", "net.py:make raised ZeroDivisionError: division by zero"),
        ("exit(3)", "net.py:make raised SystemExit: 3"),
    ],
)
def test_what_a_factory_must_not_return_is_one_clear_error(make, message, tmp_path):
    source = "import torch\nfrom diffusers import DDIMScheduler\nfrom intaglio import DenoiserModel\n"
    (tmp_path / "net.py").write_text(f"{source}def make():\n    return {make}\n")
    with pytest.raises(RecipeError, match=message):
        Checkpoint.resolve(ModelRef(path="./net.py:make"), tmp_path).open()


def test_an_adapter_without_weights_cannot_be_fused():
    class Config(dict):
        vocab_size, to_dict = 8, dict

    class Prompted(Net):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.config = Config()
            self.word = nn.Embedding(8, 8)

    config = PromptTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=2, token_dim=8, num_layers=1, num_attention_heads=1
    )
    with pytest.raises(RecipeError, match="PROMPT_TUNING adds inputs, not weights, so it cannot be fused"):
        received(get_peft_model(Prompted(), config))


def test_what_a_factory_prints_is_no_result(tmp_path: Path, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom diffusers import DDIMScheduler\nfrom intaglio import DenoiserModel\n"
        "print('read')\ndef make():\n    print('made')\n"
        "    return DenoiserModel(torch.nn.ReLU(), DDIMScheduler(), (3, 8, 8))\n"
    )
    Checkpoint.resolve(ModelRef(path="./net.py:make"), tmp_path).empty()
    assert capsys.readouterr() == ("", "read\nmade\n")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ({"other_size": (3, 8)}, r"model.other_size: \[3, 8\] has 2 axes, but a sample \[3, 8, 8\] has 3"),
        ({"other_size": (3, 0, 8)}, r"other_size: \(3, 0, 8\) is no shape of a sample: give positive whole numbers"),
        ({"path": "a" * 5000}, "model: a{200} cannot be read: File name too long"),
        ({"path": "loop/x"}, "model: loop/x cannot be read|no folder loop/x"),
        ({"path": "./loop.py:make"}, r"model: ./loop.py:make cannot be read|no file ./loop.py"),
    ],
)
def test_what_cannot_be_in_a_recipe_is_one_clear_error(ref, message, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom diffusers import DDIMScheduler\nfrom intaglio import DenoiserModel\n"
        "def make():\n    module = torch.nn.Conv2d(3, 3, 1)\n"
        "    return DenoiserModel(module, DDIMScheduler(), (3, 8, 8), sample_name='input')\n"
    )
    for name in ("loop", "loop.py"):
        (tmp_path / name).symlink_to(name)
    with pytest.raises(RecipeError, match=message):
        Checkpoint.resolve(ModelRef(**{"path": "./net.py:make", **ref}), tmp_path).open()
