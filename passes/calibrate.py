"""Record the full-precision denoiser on its own trajectories: no data set is needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from intaglio.pipeline.artifacts.keys import MODEL, TRAJECTORY, WORKLOAD
from intaglio.pipeline.artifacts.plan import in_float_lines
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.contract.pass_base import Pass
from intaglio.pipeline.errors import RecipeError, StepFailed
from intaglio.pipeline.model.cost import ModelCost
from intaglio.pipeline.model.prepared import unquantizable

if TYPE_CHECKING:
    import torch

    from intaglio.passes.layer_ranges import LayerRanges
    from intaglio.pipeline.artifacts.trajectory import Trajectory
    from intaglio.pipeline.formats.layer import Layer
    from intaglio.pipeline.model.call_rows import Start
    from intaglio.pipeline.model.sampler import Call, Sampler
    from intaglio.pipeline.model.types import Denoise


class Calibrate(Pass):
    """Sample from noise with the float denoiser, and record every call and every layer's range at each step.

    It also records the number of rows that each layer sees in a call, and the layers that read the same input in the
    first call. Layers that no call reaches, or whose result affects no output, stay in float; the log names them.
    """

    name: ClassVar[str] = "calibrate"
    version: ClassVar[int] = 13
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({TRAJECTORY, WORKLOAD})
    random: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers")
    efforts = ({"samples": 16}, {"samples": 16}, {"samples": 16}, {"samples": 8}, {"samples": 4}, {"samples": 2})

    samples: int = Field(32, ge=1, description="trajectories from noise")
    precision: Literal["float32", "float16"] = Field(
        "float32",
        description="type of recorded samples and outputs; float16 takes half the bytes, relative errors reach 2^-11",
    )

    def forward_rows(self, model: ModelCost) -> int:
        """Return the rows of every sample at every step."""
        return model.steps * self.samples * model.rows_per_sample

    def run(self, state: State, ctx: Context) -> Outputs:
        """Run the sampler in float, and record its calls and the range of every layer's input.

        Raises RecipeError for a model that cannot be called, StepFailed for one that returns NaN or Inf.
        """
        from intaglio.passes.layer_ranges import unreached_layers
        from intaglio.pipeline.model.calls import check_inputs, denoise_with, on_device
        from intaglio.pipeline.model.layers import layer_table
        from intaglio.pipeline.model.sampler import Sampler

        checkpoint = state[MODEL]
        model = checkpoint.open()
        _check_weights(model.module)
        sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
        check_inputs(sampler)
        if ctx.processes.count > self.samples:
            raise RecipeError(
                f"calibrate: {ctx.processes.count} processes share {self.samples} samples: use fewer processes, or"
                " raise calibrate.samples"
            )
        layers = {layer.name: layer for layer in layer_table(model.module)}
        denoise = on_device(denoise_with(model.module.to(ctx.device), model), ctx.device)
        start = sampler.start(self.samples, ctx.torch_rng("calibrate")).part(ctx.processes.share(self.samples))
        calls, samples, seen = self._record(sampler, denoise, start, layers, ctx)
        own = self._trajectory(sampler, calls, samples, seen)
        whole = _joined(ctx.processes.gather(own), sampler.rows_per_sample)
        first = sampler.rows_of([0], whole.outputs.shape[1] // sampler.rows_per_sample)
        _check_repeats(denoise, whole, first)
        unreached = unreached_layers(model.module, denoise, whole, layers, first)
        workload = seen.workload(len(start.noise), unreached)
        whole = _without(whole, workload.float_reasons)
        rows, ranges = whole.outputs.shape[1], len(whole.low)
        ctx.log.info("recorded %d calls of %d rows, input ranges of %d layers", len(calls), rows, ranges)
        for line in in_float_lines(workload.float_reasons | unquantizable(model.module)):
            ctx.log.info("%s", line)
        return {TRAJECTORY: whole, WORKLOAD: workload}

    def _record(
        self, sampler: Sampler, denoise: Denoise, start: Start, layers: Mapping[str, Layer], ctx: Context
    ) -> tuple[list[Call], torch.Tensor, LayerRanges]:
        """Draw this process's samples. Returns the calls of the denoiser, the samples, and the ranges of its layers."""
        from intaglio.passes.layer_ranges import LayerRanges
        from intaglio.pipeline.model.hooks import after_calls
        from intaglio.pipeline.model.sampler import Call

        modules = {name: sampler.model.module.get_submodule(name) for name in layers}
        calls: list[Call] = []
        samples = start.noise
        seen = LayerRanges(layers, modules, ctx.processes.count)
        with ctx.progress("calibrate", len(sampler.timesteps)) as advance, after_calls(modules, seen.note):
            for call in sampler.drive(denoise, start):
                if isinstance(call, Call):
                    seen.check_float32()
                    _check_output(call, sampler, seen)
                    calls.append(_rounded(call, sampler) if self.precision == "float16" else call)
                    seen.end_of_call()
                    advance()
                else:
                    samples = call
        _check_samples(samples, sampler, len(calls))
        return calls, samples, seen

    def _trajectory(
        self, sampler: Sampler, calls: Sequence[Call], samples: torch.Tensor, seen: LayerRanges
    ) -> Trajectory:
        """Return the calls of this process as one trajectory, with the ranges of the samples and of the layers."""
        import torch

        from intaglio.pipeline.artifacts.trajectory import Trajectory
        from intaglio.pipeline.numerics.quality import SampleRange

        steps = (name for name in sampler.model.steps if name != sampler.names.sample)
        varying = [name for name in (sampler.names.sample, sampler.names.timestep, *steps) if name is not None]
        shared = dict(sampler.model.shared)
        low, high = seen.table("low", min), seen.table("high", max)
        return Trajectory(
            sampler.timesteps,
            inputs={name: torch.stack([c.inputs[name] for c in calls]) for name in varying},
            outputs=torch.stack([c.output for c in calls]),
            amax={name: torch.maximum(-low[name], high[name]) for name in low},
            output_amax=seen.outputs(),
            low=low,
            high=high,
            conditions={n: v for n, v in calls[0].inputs.items() if n not in varying and n not in shared},
            shared=shared,
            samples=SampleRange.of(samples),
            half=self.precision == "float16",
        )


def _check_weights(module: torch.nn.Module) -> None:
    """Raise RecipeError that lists every tensor with NaN or Inf."""
    problems = []
    for name, tensor in module.state_dict(keep_vars=True).items():
        tensor = tensor.detach()  # one weight in memory at a time
        if tensor.is_floating_point() and tensor.numel() and not all(end.isfinite() for end in tensor.aminmax()):
            bad = int(tensor.numel() - tensor.isfinite().sum())
            problems.append(f"{name}: {bad} of its {tensor.numel()} values are NaN or Inf: download the model again")
    if problems:
        raise RecipeError(*problems)


def _check_samples(samples: torch.Tensor, sampler: Sampler, steps: int) -> None:
    """Raise StepFailed for samples with NaN or Inf after this many steps; every output before them was finite."""
    if not samples.isfinite().all():
        guided = "" if sampler.guidance == 1.0 else f", with guidance {sampler.guidance:g}"
        raise StepFailed(
            f"the samples have NaN or Inf after {steps} of {len(sampler.timesteps)} steps, while every output of the"
            f" model is finite: {type(sampler.model.scheduler).__name__} makes them{guided}: choose the"
            " scheduler and the steps that the model was trained for"
        )


def _check_output(call: Call, sampler: Sampler, seen: LayerRanges) -> None:
    """Raise StepFailed for a sample or an output with NaN or Inf; the message names who made them first."""
    _check_samples(call.inputs[sampler.names.sample], sampler, call.step)
    if not call.output.isfinite().all():
        raise StepFailed(
            f"the model returns NaN or Inf at timestep {sampler.timesteps[call.step]:g}: "
            f"{seen.origin}: correct the model, or start at another timestep"
        )


REPEATED = 1e-2
"""Relative L2 distance up to which two outputs count as equal: the order of sums depends on the number of rows."""


def _check_repeats(denoise: Denoise, trajectory: Trajectory, rows: Sequence[int]) -> None:
    """Raise RecipeError if the model computes some rows of its first call otherwise when they are called again.

    A graph computes each row alone, and returns the same each time.
    """
    import torch

    from intaglio.pipeline.numerics.quality import rel_l2

    call, recorded = trajectory.call(0, rows), trajectory.outputs[0][rows]
    with torch.no_grad():
        if (found := rel_l2(denoise(call), recorded)) <= REPEATED:
            return
        again = rel_l2(denoise(call), denoise(call))
    why = (
        f"two calls with the same inputs differ by {again:.1e}, relative L2: it draws random numbers or keeps a state"
        " between calls"
        if again > REPEATED
        else f"a call of {len(rows)} rows differs by {found:.1e}, relative L2, from the same rows in a call of"
        f" {trajectory.outputs.shape[1]}: its rows affect each other, or earlier calls affect later ones"
    )
    raise RecipeError(f"model: {why}: a compiled graph does neither: change the module")


def _without(trajectory: Trajectory, layers: Collection[str]) -> Trajectory:
    """Return the trajectory without the ranges of these layers."""

    def rest(table: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: values for name, values in table.items() if name not in layers}

    return replace(
        trajectory,
        amax=rest(trajectory.amax),
        output_amax=rest(trajectory.output_amax),
        low=rest(trajectory.low),
        high=rest(trajectory.high),
    )


def _joined(parts: Sequence[Trajectory], rows_per_sample: int) -> Trajectory:
    """Return the trajectory that one process would have recorded for all samples."""
    import torch

    from intaglio.pipeline.numerics.quality import SampleRange

    if len(parts) == 1:
        return parts[0]

    def largest(tables: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        names = sorted({name for table in tables for name in table})
        return {name: torch.stack([table[name] for table in tables if name in table]).amax(0) for name in names}

    first = parts[0]
    return replace(
        first,
        inputs={name: _rows([part.inputs[name] for part in parts], 1, rows_per_sample) for name in first.inputs},
        outputs=_rows([part.outputs for part in parts], 1, rows_per_sample),
        conditions={
            name: _rows([part.conditions[name] for part in parts], 0, rows_per_sample) for name in first.conditions
        },
        amax=largest([part.amax for part in parts]),
        output_amax=largest([part.output_amax for part in parts]),
        low={name: -low for name, low in largest([{n: -v for n, v in part.low.items()} for part in parts]).items()},
        high=largest([part.high for part in parts]),
        samples=SampleRange.joined([part.samples for part in parts], [part.outputs.shape[1] for part in parts]),
    )


def _rows(parts: Sequence[torch.Tensor], axis: int, rows_per_sample: int) -> torch.Tensor:
    """Join the rows of all processes along `axis`, in the order of a single process: null rows last."""
    import torch

    pieces = [part.chunk(rows_per_sample, axis) for part in parts]
    return torch.cat([piece[half] for half in range(rows_per_sample) for piece in pieces], axis)


def _rounded(call: Call, sampler: Sampler) -> Call:
    """Round the sample and the output to float16. Raises StepFailed for values beyond the range of float16."""
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
