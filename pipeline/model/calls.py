"""Call a denoiser through its module's own arguments.

Shapes: B samples, R = rows of one call (B, or 2 B with guidance: conditional rows first, then null rows).
Inputs that the rows share have no such axis.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from intaglio.pipeline.errors import IntaglioError, RecipeError
from intaglio.pipeline.files import one_line
from intaglio.pipeline.model.call_form import CallForm, first_output
from intaglio.pipeline.model.call_rows import timesteps_of
from intaglio.pipeline.model.denoiser import DenoiserModel
from intaglio.pipeline.model.inputs import missing_inputs, unmet
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.model.step_clock import number
from intaglio.pipeline.model.types import Denoise, Inputs

if TYPE_CHECKING:
    from torch import nn

    from intaglio.pipeline.model.step_clock import StepClock


OTHER_TYPE = re.compile(r"\b(Half|BFloat16|Double|half|bfloat16|double)\b")
"""Types in messages of torch about operands of two types."""
TO_FLOAT32 = ": its weights are made float32: remove casts to other floating-point types from its forward"


def denoise_with(module: nn.Module, model: DenoiserModel, *, whole: bool = False) -> Denoise:
    """Return the denoiser as a function of flat named inputs.

    Its outputs are those that the scheduler reads (`DenoiserModel.read`), or with `whole` those of the module.
    """
    form = model.form or CallForm()

    def denoise(inputs: Inputs) -> torch.Tensor:
        sample = inputs[model.names.sample]
        output = first_output(form.call(module, inputs, model.constants, sample.shape[0]), sample.ndim)
        return output if whole else model.read(output)

    return denoise


def on_device(denoise: Denoise, device: str) -> Denoise:
    """Move inputs to the device and outputs back, so that the caller keeps all tensors on the CPU."""
    if device == "cpu":
        return denoise

    def there(inputs: Inputs) -> torch.Tensor:
        return denoise({name: value.to(device) for name, value in inputs.items()}).cpu()

    return there


def step_of(clock: StepClock, inputs: Inputs, timestep_name: str | None) -> int:
    """Return the step of the clock that is nearest to a call's timestep; a model without timesteps has one step."""
    return 0 if timestep_name is None else clock.index(number(inputs[timestep_name]))


def clocked(denoise: Denoise, clock: StepClock, timestep_name: str | None) -> Denoise:
    """Return a simulation that sets the clock by the timestep of each call."""

    def at_its_step(inputs: Inputs) -> torch.Tensor:
        with clock.at(step_of(clock, inputs, timestep_name)):
            return denoise(inputs)

    return at_its_step


def other_call(model: DenoiserModel, call: Inputs) -> dict[str, torch.Tensor] | None:
    """Return `call` at the model's other size, with as many rows and the same timestep; None without another size."""
    other = model.other
    if other is None:
        return None
    changed = dict(call)
    rows = len(call[model.names.sample])
    noise = torch.randn(rows, *other.sample_shape, generator=torch.Generator().manual_seed(0))
    changed[model.names.sample] = noise
    for name, tensor in other.conditions.items():
        if name == model.names.sample:  # what is joined to samples is noise, as they are
            continue
        changed[name] = tensor[torch.arange(rows) % len(tensor)]
        if name == model.names.timestep:
            changed[name] = timesteps_of(torch.full((rows,), number(call[name])).to(call[name].dtype), changed[name])
    return changed | dict(other.shared)


def check_inputs(sampler: Sampler) -> None:
    """Call the denoiser with one sample.

    Raises MissingInputs if an optional input is needed after all, and RecipeError if the call fails for another reason.
    On the meta device, the error that torch raises because a tensor has no values is not changed.
    """
    model = sampler.model
    start = sampler.start(1, torch.Generator().manual_seed(0))
    inputs = sampler.rows(start.noise, sampler.first_timestep, start)
    device = next((parameter.device for parameter in model.module.parameters()), inputs[model.names.sample].device)
    try:
        with torch.no_grad():
            denoise_with(model.module, model)({name: value.to(device) for name, value in inputs.items()})
    except IntaglioError:
        raise
    except Exception as e:
        if device.type == "meta" and ("meta" in str(e).lower() or isinstance(e, NotImplementedError)):
            raise
        kind, ended = type(model.module).__name__, f"{type(e).__name__}: {one_line(e)}"
        if names := unmet(e, sampler.names.absent):
            raise missing_inputs(kind, names, f" (the call ended in {ended})") from e
        called = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        advice = TO_FLOAT32 if OTHER_TYPE.search(str(e)) else ""
        raise RecipeError(f"model: {kind} cannot be called with {called}: it ended in {ended}{advice}") from e
