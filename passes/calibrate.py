"""Record the full-precision denoiser on its own trajectories: no data set is needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from intaglio.pipeline.artifact import AnyKey, Outputs, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.errors import RecipeError, StepFailed
from intaglio.pipeline.estimate import ModelCost
from intaglio.pipeline.keys import MODEL, TRAJECTORY, WORKLOAD
from intaglio.pipeline.pass_base import Pass

if TYPE_CHECKING:
    import torch

    from intaglio.pipeline.denoiser import Call, Sampler
    from intaglio.pipeline.trajectory import Trajectory


class Calibrate(Pass):
    """The denoiser drives its own sampler from noise; every call and every layer's range are kept, by step.

    Of the first call, also how many rows each layer sees, and which layers read the same input.
    """

    name: ClassVar[str] = "calibrate"
    version: ClassVar[int] = 5
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({TRAJECTORY, WORKLOAD})
    random: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers")

    samples: int = Field(32, ge=1, description="trajectories from noise")
    precision: Literal["float32", "float16"] = Field(
        "float32",
        description="of the recorded samples and outputs; float16 takes half the bytes and rounds by up to 2^-11",
    )

    def forward_rows(self, model: ModelCost) -> int:
        """Every sample at every step."""
        return model.steps * self.samples * model.rows_per_sample

    def run(self, state: State, ctx: Context) -> Outputs:
        import torch

        from intaglio.passes._layer_inputs import SameInputs
        from intaglio.pipeline.checkpoint import layer_table
        from intaglio.pipeline.denoiser import Call, Sampler, check_inputs, denoise_with, on_device
        from intaglio.pipeline.trajectory import Trajectory
        from intaglio.pipeline.workload import Workload

        checkpoint = state[MODEL]
        model = checkpoint.open()
        _check_weights(model.module)
        sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
        check_inputs(sampler)
        if ctx.processes.count > self.samples:
            raise RecipeError(f"calibrate: {ctx.processes.count} processes share {self.samples} samples: use fewer")
        half = self.precision == "float16"
        seen: dict[str, dict[str, float]] = {"low": {}, "high": {}, "output": {}}
        calls: list[Call] = []
        rows: dict[str, int] = {}
        readers = SameInputs()
        hooks = []
        for layer in layer_table(model.module):

            def note(
                module: torch.nn.Module,
                args: tuple[torch.Tensor, ...],
                output: torch.Tensor,
                name: str = layer.name,
                out_features: int = layer.n,
            ) -> None:
                if not calls:
                    rows[name] = rows.get(name, 0) + output.numel() // out_features
                    readers.note(name, args[0])
                low, high = (end.item() for end in args[0].detach().aminmax())
                seen["low"][name] = min(seen["low"].get(name, low), low)
                seen["high"][name] = max(seen["high"].get(name, high), high)
                if isinstance(module, torch.nn.Conv2d):
                    product = output.detach()
                    if module.bias is not None:
                        product = product - module.bias.detach().reshape(-1, 1, 1)
                    seen["output"][name] = max(seen["output"].get(name, 0.0), product.abs().amax().item())

            hooks.append(model.module.get_submodule(layer.name).register_forward_hook(note))
        ranges: list[dict[str, dict[str, float]]] = []
        with ctx.progress("calibrate", len(sampler.timesteps)) as advance:
            start = sampler.start(self.samples, ctx.torch_rng("calibrate")).part(ctx.processes.share(self.samples))
            denoise = on_device(denoise_with(model.module.to(ctx.device), model), ctx.device)
            for call in sampler.drive(denoise, start):
                if isinstance(call, Call):
                    if not call.output.isfinite().all():
                        raise StepFailed(
                            f"the model returns NaN or Inf at timestep {sampler.timesteps[call.step]:g}: "
                            f"{_origin(seen)}: mend the model, or start at another timestep"
                        )
                    calls.append(_rounded(call, sampler) if half else call)
                    ranges.append({end: dict(found) for end, found in seen.items()})
                    for found in seen.values():
                        found.clear()
                    advance()
        for hook in hooks:
            hook.remove()
        varying = [name for name in (sampler.names.sample, sampler.names.timestep) if name is not None]
        shared = dict(model.shared)
        conditions = {n: v for n, v in calls[0].inputs.items() if n not in varying and n not in shared}
        low, high, output_amax = (
            {name: torch.tensor([r[end].get(name, 0.0) for r in ranges]) for name in sorted(ranges[0][end])}
            for end in ("low", "high", "output")
        )
        own = Trajectory(
            sampler.timesteps,
            {name: torch.stack([c.inputs[name] for c in calls]) for name in varying},
            torch.stack([c.output for c in calls]),
            {name: torch.maximum(-low[name], high[name]) for name in low},
            output_amax,
            low,
            high,
            conditions,
            shared,
            half=half,
        )
        whole = _joined(ctx.processes.gather(own), sampler.rows_per_sample)
        ctx.log.info(
            "recorded %d calls of %d rows, input ranges of %d layers", len(calls), whole.outputs.shape[1], len(low)
        )
        samples = len(start.noise)
        workload = Workload({name: rows[name] / samples for name in sorted(rows)}, readers.groups)
        return {TRAJECTORY: whole, WORKLOAD: workload}


def _check_weights(module: torch.nn.Module) -> None:
    """Raises RecipeError with every tensor that has NaN or Inf."""
    problems = []
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
            bad = int(tensor.numel() - tensor.isfinite().sum())
            problems.append(f"{name}: {bad} of its {tensor.numel()} values are NaN or Inf: get the model again")
    if problems:
        raise RecipeError(*problems)


def _origin(seen: Mapping[str, Mapping[str, float]]) -> str:
    """The layer that read it first; layers are in the order of their calls."""
    for name, low in seen["low"].items():
        if not (math.isfinite(low) and math.isfinite(seen["high"][name])):
            return f"{name} is the first layer to read them"
    return "no layer reads them"


def _joined(parts: Sequence[Trajectory], halves: int) -> Trajectory:
    """What one process would have recorded of all samples."""
    import torch

    if len(parts) == 1:
        return parts[0]

    def largest(tables: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([table[name] for table in tables]).amax(0) for name in tables[0]}

    first = parts[0]
    return replace(
        first,
        inputs={name: _rows([part.inputs[name] for part in parts], 1, halves) for name in first.inputs},
        outputs=_rows([part.outputs for part in parts], 1, halves),
        conditions={name: _rows([part.conditions[name] for part in parts], 0, halves) for name in first.conditions},
        amax=largest([part.amax for part in parts]),
        output_amax=largest([part.output_amax for part in parts]),
        low={name: torch.stack([part.low[name] for part in parts]).amin(0) for name in first.low},
        high=largest([part.high for part in parts]),
    )


def _rows(parts: Sequence[torch.Tensor], axis: int, halves: int) -> torch.Tensor:
    """Rows of all processes along `axis`, in the order in which one process would have them: null rows last."""
    import torch

    pieces = [part.chunk(halves, axis) for part in parts]
    return torch.cat([piece[half] for half in range(halves) for piece in pieces], axis)


def _rounded(call: Call, sampler: Sampler) -> Call:
    """The sample and the output as numbers of float16. Raises StepFailed for those beyond its largest."""
    import torch

    largest = torch.finfo(torch.float16).max
    sample = call.inputs[sampler.names.sample]
    for what, tensor in (("sample", sample), ("output", call.output)):
        if (reached := tensor.abs().amax().item()) > largest:
            raise StepFailed(
                f"the {what} reaches {reached:g} at timestep {sampler.timesteps[call.step]:g}, and float16 ends at"
                f" {largest:g}: leave calibrate.precision at float32"
            )
    inputs = {**call.inputs, sampler.names.sample: sample.half().float()}
    return replace(call, inputs=inputs, output=call.output.half().float())
