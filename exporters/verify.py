"""Hold the deployed graph against its simulation, layer by layer and as a whole, and both against full precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from intaglio.pipeline.artifact import AnyKey, Outputs, State
from intaglio.pipeline.context import Context
from intaglio.pipeline.errors import StepFailed
from intaglio.pipeline.estimate import ModelCost
from intaglio.pipeline.keys import GRAPH, MODEL, QUANTIZED, TARGET, TRAJECTORY, VERIFICATION
from intaglio.pipeline.pass_base import Pass
from intaglio.pipeline.quant.spec import IntInput

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from intaglio.pipeline.denoiser import Denoise, Inputs
    from intaglio.pipeline.graph import Graph
    from intaglio.pipeline.quant.modules import QuantizedLayer, StepClock
    from intaglio.pipeline.verification import LayerParity, Verification


class Verify(Pass):
    """Fails when the graph in ONNX Runtime is not what was simulated.

    Two executions that are both right round a tie differently now and then, and everything after it is rounded anew; so
    layers are compared alone, on the same input, and whole models by their distance to full precision.
    """

    name: ClassVar[str] = "verify"
    version: ClassVar[int] = 4
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, TARGET, TRAJECTORY, QUANTIZED, GRAPH})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({VERIFICATION})
    random: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "onnxruntime-gpu", "onnxruntime")

    samples: int = Field(64, ge=1, description="samples drawn with each implementation, from the same noise")
    rows: int = Field(8, ge=1, description="rows of a recorded call on which layers are compared")
    layer_tolerance: float = Field(1e-4, gt=0, description="relative L2 error of a layer on the same input")
    half_tolerance: float = Field(
        2e-3,
        gt=0,
        description="the same, of a layer in float16: four roundings of 2^-11, of weight, product, sum, bias",
    )
    code_tolerance: float = Field(1e-4, gt=0, description="share of a layer's input codes that may differ, by one")
    gap_db_tolerance: float = Field(
        0.5, gt=0, description="simulated PSNR minus deployed PSNR, either way and beyond two standard errors, in dB"
    )

    def forward_rows(self, model: ModelCost) -> int:
        """Three times every sample at every step."""
        return 3 * model.steps * self.samples * model.rows_per_sample

    def run(self, state: State, ctx: Context) -> Outputs:
        from intaglio.exporters._session import graph_denoise
        from intaglio.pipeline.denoiser import Sampler, denoise_with
        from intaglio.pipeline.quant.modules import QuantizedLayer, simulate
        from intaglio.pipeline.verification import Verification

        checkpoint, trajectory, graph = state[MODEL], state[TRAJECTORY], state[GRAPH]
        model = checkpoint.open()
        fp16_bytes = float(2 * sum(p.numel() for p in model.module.parameters()))  # before scales are among them
        sampler = Sampler(model, checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
        start = sampler.start(self.samples, ctx.torch_rng("verify"))
        optimized = state[TARGET].runtime == "onnxruntime"
        deployed = graph_denoise(graph, optimize=optimized)
        samples = {}
        with ctx.progress("samples", 3) as advance:
            samples["full_precision"] = sampler.sample(denoise_with(model.module, model), start).clamp(-1, 1)
            advance()
            clock = simulate(model.module, state[QUANTIZED])
            simulated = _clocked(denoise_with(model.module, model), clock, sampler.timestep_name)
            samples["simulated"] = sampler.sample(simulated, start).clamp(-1, 1)
            advance()
            samples["deployed"] = sampler.sample(deployed, start).clamp(-1, 1)
            advance()
        bad = [name for name, images in samples.items() if not images.isfinite().all()]
        if bad:
            raise StepFailed(f"NaN or Inf in the samples: {', '.join(bad)}")

        step = len(trajectory.timesteps) // 2
        call = trajectory.call(step, slice(None, None, max(1, trajectory.outputs.shape[1] // self.rows)))
        layers = {n: m for n, m in model.module.named_modules() if isinstance(m, QuantizedLayer)}
        parity = _compare_layers(layers, graph, simulated, call, step, optimized, ctx)
        figures = _distances(samples)
        figures["parity_rel_l2"] = _rel_l2(deployed(call), simulated(call))
        figures["parity_layer_rel_l2_max"] = max((p.rel_l2 for p in parity.values()), default=0.0)
        figures["fp16_bytes"] = fp16_bytes
        ctx.log.info(
            "psnr %.2f dB deployed, %.2f dB simulated; worst layer %.1e on the same input",
            figures["psnr_db"],
            figures["psnr_simulated_db"],
            figures["parity_layer_rel_l2_max"],
        )
        result = Verification(figures, parity, samples)
        halves = state[TARGET].float_type == "float16"
        half = {n for n, m in layers.items() if halves and not isinstance(m.scheme.input, IntInput)}
        self._judge(result, half)
        return {VERIFICATION: result}

    def _judge(self, result: Verification, half: Collection[str] = ()) -> None:
        """Raise StepFailed with every layer and figure that is outside its tolerance, the first layer first.

        `half`: the layers that compute in float16.
        """
        tolerances = {name: self.half_tolerance if name in half else self.layer_tolerance for name in result.layers}
        problems = [
            f"{name}: relative L2 error {p.rel_l2:.2e} on the same input, tolerance {tolerances[name]:.0e}"
            for name, p in result.layers.items()
            if not p.rel_l2 <= tolerances[name]
        ]
        problems += [
            f"{name}: {p.codes_differing} of {p.codes} input codes differ, by at most {p.code_distance_max}"
            for name, p in result.layers.items()
            if p.codes_differing > max(1, self.code_tolerance * p.codes) or p.code_distance_max > 1
        ]
        gap, error = result.figures["fidelity_gap_db"], result.figures["fidelity_gap_error_db"]
        if not abs(gap) - 2 * error <= self.gap_db_tolerance:
            problems.append(
                f"samples: simulated and deployed PSNR differ by {gap:.2f} dB, standard error {error:.2f} dB"
                f" ({self.gap_db_tolerance} allowed)"
            )
        if problems:
            raise StepFailed(*problems)


def _clocked(denoise: Denoise, clock: StepClock, timestep_name: str) -> Denoise:
    """The simulation as a function of its inputs alone: the clock is set from the timestep."""

    def clocked(inputs: Inputs) -> torch.Tensor:
        clock.set(float(inputs[timestep_name].reshape(-1)[0]))
        return denoise(inputs)

    return clocked


def _compare_layers(
    layers: dict[str, QuantizedLayer],
    graph: Graph,
    simulated: Denoise,
    call: Inputs,
    step: int,
    optimize: bool,
    ctx: Context,
) -> dict[str, LayerParity]:
    """Every quantized layer in ONNX Runtime against the simulation, on the inputs it has there in `call`."""
    import torch

    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks = []
    for name, layer in layers.items():

        def note(_: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor, name: str = name) -> None:
            seen[name] = (args[0].detach(), output.detach())

        hooks.append(layer.register_forward_hook(note))
    with torch.no_grad():
        simulated(call)
    for hook in hooks:
        hook.remove()
    parity = {}
    with ctx.progress("layers", len(seen)) as advance, torch.no_grad():
        for name in graph.nodes:
            x, y = seen[name]
            parity[name] = _compare_layer(layers[name], graph, name, x, y, step, optimize)
            advance()
    return parity


def _compare_layer(
    layer: QuantizedLayer, graph: Graph, name: str, x: torch.Tensor, y: torch.Tensor, step: int, optimize: bool
) -> LayerParity:
    import numpy as np
    import torch

    from intaglio.exporters._layer import entry_type, run_layer
    from intaglio.pipeline.verification import LayerParity

    if entry_type(graph, name) == np.float16:
        x = x.half().float()
        y = layer(x)
    deployed, codes = run_layer(graph, name, x.numpy(), step, optimize=optimize)
    rel_l2 = _rel_l2(torch.from_numpy(deployed), y)
    if not isinstance(layer.scheme.input, IntInput) or codes is None:
        return LayerParity(rel_l2, 0, 0, 0)
    offset = 128 if codes.dtype == np.uint8 else 0
    distance = (codes.astype(np.int32) - offset - layer.input_codes(x)[0].numpy().astype(np.int32)).ravel()
    return LayerParity(rel_l2, distance.size, int(np.count_nonzero(distance)), int(np.abs(distance).max()))


def _rel_l2(y: torch.Tensor, reference: torch.Tensor) -> float:
    """|y - y_ref| / |y_ref|"""
    y, reference = y.detach(), reference.detach()
    return float((y - reference).norm() / reference.norm().clamp_min(1e-12))


def _distances(samples: dict[str, torch.Tensor]) -> dict[str, float]:
    """PSNR (range 2, images in [-1, 1]) and SQNR to full precision, in dB: the mean over samples of each one's own.

    The least of them is there too: a trajectory that parts from its reference makes one sample much worse than others.
    The gap has its standard error over the samples beside it.
    """
    reference = samples["full_precision"].flatten(1)
    mse = {n: (samples[n].flatten(1) - reference).square().mean(1).clamp_min(1e-20) for n in ("simulated", "deployed")}
    psnr = {n: 10 * (4 / error).log10() for n, error in mse.items()}
    gap = psnr["simulated"] - psnr["deployed"]
    sqnr = 10 * (reference.square().mean(1) / mse["deployed"]).log10()
    return {
        "psnr_db": float(psnr["deployed"].mean()),
        "psnr_db_min": float(psnr["deployed"].min()),
        "psnr_simulated_db": float(psnr["simulated"].mean()),
        "sqnr_db": float(sqnr.mean()),
        "fidelity_gap_db": float(gap.mean()),
        "fidelity_gap_error_db": float(gap.std() / len(gap) ** 0.5) if len(gap) > 1 else 0.0,
    }
