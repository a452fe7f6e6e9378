"""Record a pipeline's calls of the models around its denoiser, and repeat them as functions of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from intaglio.pipeline.errors import StepFailed
from intaglio.pipeline.model.arguments import flatten, in_order, nest
from intaglio.pipeline.model.pipeline_folder import METHODS, is_generator
from intaglio.pipeline.model.recording import as_constant

if TYPE_CHECKING:
    from torch import nn

    from intaglio.exporters.float_graph.capture import Compute
    from intaglio.pipeline.model.types import Inputs

PARAMETERS = "parameters"
"""Name of the parameters of a distribution of latents, which an encoder returns in place of latents."""


@dataclass(frozen=True)
class MethodCalls:
    """Calls of one method of a component in one run: tensors by flat name, call by call, and constants."""

    component: str
    method: str
    arguments: tuple[str, ...]
    constants: Mapping[str, object]
    inputs: tuple[Inputs, ...]

    @property
    def name(self) -> str:
        """Return the name of the call, such as `vae.decode`."""
        return f"{self.component}.{self.method}"

    @property
    def shared(self) -> frozenset[str]:
        """Inputs without an axis of rows: those whose length differs from that of the first."""
        first, *_ = usual = list(self.inputs[0].values())
        return frozenset(n for n, v in zip(self.inputs[0], usual, strict=True) if v.ndim == 0 or len(v) != len(first))


def record_calls(pipe: Any, models: Mapping[str, nn.Module], call: Mapping[str, Any]) -> list[MethodCalls]:
    """Record the calls of these components in `pipe(**call)`, in order.

    Raises StepFailed for a method that is called in two ways.
    """
    seen: dict[tuple[str, str], list[dict[str, object]]] = {}
    with _listening(models, lambda name, method, given: seen.setdefault((name, method), []).append(given)):
        pipe(**call)
    order = [(name, method) for name in models for method in METHODS if (name, method) in seen]
    return [_method_calls(models[name], name, method, seen[name, method]) for name, method in order]


def picture_for(pipe: Any) -> Any:  # an image of Pillow
    """Return a picture of the size that the pipeline draws by default: colors that run from side to side."""
    from PIL import Image

    denoiser = next(each for name in ("transformer", "unet") if (each := getattr(pipe, name, None)) is not None)
    size = denoiser.config.get("sample_size") or 32
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    factor = getattr(pipe, "vae_scale_factor", 8)
    ramp = Image.linear_gradient("L").resize((width * factor, height * factor))
    return Image.merge("RGB", (ramp, ramp.rotate(180), ramp.transpose(Image.Transpose.TRANSPOSE).resize(ramp.size)))


def encode_calls(decoded: MethodCalls, module: nn.Module) -> MethodCalls:
    """Make calls of the module's encoder with the pictures that its decoder drew."""
    compute = compute_with(module, decoded)
    pictures = [next(iter(compute(inputs).values())) for inputs in decoded.inputs]
    arguments = _arguments(module, "encode")
    return MethodCalls(decoded.component, "encode", arguments, {}, tuple({arguments[0]: x} for x in pictures))


def compute_with(module: nn.Module, calls: MethodCalls) -> Compute:
    """Return the method as a function from flat named tensors to its output tensors; the rest is as recorded."""

    def compute(inputs: Inputs) -> dict[str, torch.Tensor]:
        return flat_output(output_with(module, calls, inputs))

    return compute


def output_with(module: nn.Module, calls: MethodCalls, inputs: Inputs) -> Any:
    """Call the method and return its own output."""
    called = module if calls.method == "forward" else getattr(module, calls.method)
    return called(**nest({**inputs, **calls.constants}))


def flat_output(output: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of an output by flat name; those of a tuple, or a single tensor, by position."""
    whole = (output,) if isinstance(output, torch.Tensor) else output
    content = whole if isinstance(whole, Mapping) else {str(place): value for place, value in enumerate(whole)}
    plain = {
        name: {PARAMETERS: value.parameters} if isinstance(value, DiagonalGaussianDistribution) else value
        for name, value in content.items()
    }
    return {name: value for name, value in flatten(plain) if isinstance(value, torch.Tensor)}


def _arguments(module: nn.Module, method: str) -> tuple[str, ...]:
    parameters = inspect.signature(getattr(module, method)).parameters.values()
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


@contextmanager
def _listening(models: Mapping[str, nn.Module], note: Callable[[str, str, dict[str, object]], None]) -> Iterator[None]:
    """Call `note` with component, method and flat arguments of every call."""

    def noting(function: Callable[..., Any], name: str, method: str) -> Callable[..., Any]:
        signature = inspect.signature(function)
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

        @wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            given = dict(signature.bind(*args, **kwargs).arguments)
            given |= given.pop(rest, {})
            note(name, method, dict(flatten(given)))
            return function(*args, **kwargs)

        return noted

    wrapped = [
        (name, module, method) for name, module in models.items() for method in METHODS if hasattr(module, method)
    ]
    for name, module, method in wrapped:  # hooks do not see decode and encode
        setattr(module, method, noting(getattr(module, method), name, method))
    try:
        yield
    finally:
        for _, module, method in wrapped:
            delattr(module, method)


def _method_calls(module: nn.Module, name: str, method: str, seen: list[dict[str, object]]) -> MethodCalls:
    """Merge the calls of one method. Generators are left out, as a graph would draw the same in every call."""
    arguments = _arguments(module, method)
    inputs: list[Inputs] = []
    constants: list[dict[str, object]] = []
    for given in seen:
        tensors = {n: v for n, v in given.items() if isinstance(v, torch.Tensor)}
        inputs.append({n: tensors[n].detach().clone() for n in in_order(tensors, arguments)})
        others = {n: v for n, v in given.items() if n not in tensors and v is not None and not is_generator(v)}
        others.pop("return_dict", None)
        constants.append({n: as_constant(f"{n} of {name}.{method}", v) for n, v in others.items()})
    ways = {f"{', '.join(call)} and {fixed}" for call, fixed in zip(inputs, constants, strict=True)}
    if len(ways) > 1:
        raise StepFailed(
            f"{name}.{method} is called in {len(ways)} ways, but one can be compiled: {'; '.join(sorted(ways))}"
        )
    return MethodCalls(name, method, arguments, constants[0], tuple(inputs))
