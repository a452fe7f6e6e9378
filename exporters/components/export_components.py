"""Export the models around the denoiser, text encoders and autoencoder, each in its own precision."""

from __future__ import annotations

import gc
import inspect
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias

from pydantic import AfterValidator, Field, JsonValue, WithJsonSchema

from intaglio.exporters.components.pictures import CallsWithPictures
from intaglio.pipeline.artifacts.graph import Graph, Interface
from intaglio.pipeline.artifacts.keys import COMPONENTS, MODEL, PIPELINE, TARGET
from intaglio.pipeline.contract.artifact import AnyKey, Outputs, State
from intaglio.pipeline.contract.context import Context
from intaglio.pipeline.errors import IntaglioError, RecipeError, StepFailed, TargetError, did_you_mean
from intaglio.pipeline.files import printable
from intaglio.pipeline.formats.known import known_schemes
from intaglio.pipeline.formats.schemes import Float
from intaglio.pipeline.formats.target import Target, load_target

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from intaglio.exporters.components.calls import MethodCalls
    from intaglio.exporters.float_graph.agreement import Expected
    from intaglio.exporters.float_graph.capture import Calls, Compute
    from intaglio.pipeline.artifacts.quantized import QuantizedLayerData
    from intaglio.pipeline.model.checkpoint import Checkpoint
    from intaglio.pipeline.model.pipeline_folder import PipelineFolder
    from intaglio.pipeline.model.types import Inputs


def _precisions() -> tuple[str, ...]:
    """List the precisions: each scheme that rounds no input and no output, and `none`."""
    schemes = known_schemes().items()
    return (*(n for n, s in schemes if isinstance(s.input, Float) and isinstance(s.output, Float)), "none")


def _known_precision(name: str) -> str:
    if name not in _precisions():
        raise ValueError(f"no precision {name!r}: components have {', '.join(_precisions())}")
    return name


Precision: TypeAlias = Annotated[
    str, AfterValidator(_known_precision), WithJsonSchema({"type": "string", "enum": list(_precisions())})
]
"""Name of a scheme with float inputs and outputs, or `none`."""

PROMPTS = ("a lighthouse on a cliff at dusk", "a bowl of fruit, oil on canvas")
"""Prompts for a pipeline if the recipe gives no call."""
PICTURES = ("image", "mask_image", "control_image")
"""Arguments for which a pipeline may need pictures."""


class ExportComponents(CallsWithPictures):
    """Export a graph of each component that computes what torch does, at any number of rows.

    The precision `float` is the floating-point type of the target. Any other precision rounds the weights; the graph is
    then compared with torch on the rounded weights.
    """

    name: ClassVar[str] = "components"
    version: ClassVar[int] = 3
    requires: ClassVar[frozenset[AnyKey]] = frozenset({MODEL, PIPELINE, TARGET})
    provides: ClassVar[frozenset[AnyKey]] = frozenset({COMPONENTS})
    random: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir")

    precision: Mapping[str, Precision] = Field(
        {},
        description="precision by component: float (the default); a scheme that rounds weights only, such as w8a16 or"
        " w4a16; or none, which leaves the component out (if the pipeline cannot run without it, it is called while"
        " calls are recorded)",
    )
    targets: Mapping[str, str] = Field({}, description="target by component, if it is not the recipe's")
    image_to_image: bool = Field(False, description="also compile the encoder of the autoencoder that decodes pictures")
    groups: tuple[int, ...] = Field((64, 32, 128), description="group sizes of 4-bit weights, the preferred first")
    opset: int = Field(21, ge=21, le=22, description="ONNX opset, with the same meaning as in export-float")

    def check(self, target: Target) -> None:
        """Check the options. Raises RecipeError for an unknown target, TargetError for an opset above its limit."""
        for each in (target, *map(load_target, self.targets.values())):
            if self.opset > each.opset_max:
                raise TargetError(f"opset {self.opset}, but {each.name} reads up to {each.opset_max}")

    def run(self, state: State, ctx: Context) -> Outputs:
        """Export the components. Raises StepFailed if a graph differs from torch, RecipeError if one is not called."""
        from intaglio.exporters.components.calls import output_with
        from intaglio.pipeline.artifacts.components import Compiled, Components

        folder = state[PIPELINE]
        without = [name for name, precision in self.precision.items() if precision == "none"]
        self._check_names(folder)
        models, usual, other = self._opened(folder, state[MODEL], without, ctx)
        gc.collect()  # frees the denoiser
        written, work = ctx.scratch / "pipeline", ctx.scratch / "work"
        shutil.rmtree(written, ignore_errors=True)
        compiled: dict[str, Compiled] = {}
        with ctx.progress("components", len(usual)) as advance:
            for name, module in models.items():
                precision, integers = self.precision.get(name, "float"), {}
                target = load_target(self.targets[name]) if name in self.targets else state[TARGET]
                methods = [calls for calls in usual if calls.component == name]
                kinds = {calls.method: _class_of(output_with(module, calls, calls.inputs[0])) for calls in methods}
                if precision != "float":
                    integers = _round_weights(module, precision, target, self.groups)
                for calls in methods:
                    shutil.rmtree(work, ignore_errors=True)
                    work.mkdir()
                    graph = self._graph(module, calls, other.get(calls.name), integers, target, work)
                    place = written / name / calls.method
                    place.mkdir(parents=True)
                    graph.save(place)
                    ctx.log.info("%s in %s for %s, %.1f MB", calls.name, precision, target.name, graph.size_bytes / 1e6)
                    advance()
                compiled[name] = Compiled(target.name, kinds)
        return {COMPONENTS: Components.write(written, folder, compiled, without)}

    def _check_names(self, folder: PipelineFolder) -> None:
        """Raise RecipeError for the precision or target of a component that cannot be compiled, or is left out."""
        from torch import nn

        there, denoisers = folder.classes(), folder.denoisers
        left = [name for name in there if name not in denoisers and self.precision.get(name) != "none"]
        models = [name for name in left if issubclass(folder.component_class(name), nn.Module)]
        options: Mapping[str, Mapping[str, str]] = {"precision": self.precision, "targets": self.targets}
        problems = []
        for option, by in options.items():
            for name, value in by.items():
                if name not in there:
                    why = f"the pipeline has no such component{did_you_mean(name, there)}"
                elif name in denoisers:
                    origin = "the plan" if option == "precision" else "the recipe"
                    why = f"{origin} sets the {option.removesuffix('s')} of the denoiser: remove this entry"
                elif option == "targets" and self.precision.get(name) == "none":
                    why = f"precision.{name} leaves it out: remove one of the two entries"
                elif name not in models and value != "none":
                    why = f"it has no weights{did_you_mean(name, models)}"
                else:
                    continue
                problems.append(f"{option}.{name}: {why}")
        if not problems and not models:
            problems.append(f"precision: it leaves out every component with weights: leave out the step {self.name}")
        if problems:
            raise RecipeError(*problems)

    def _opened(
        self, folder: PipelineFolder, model: Checkpoint, without: Collection[str], ctx: Context
    ) -> tuple[dict[str, nn.Module], list[MethodCalls], dict[str, MethodCalls]]:
        """Return the models to compile, their calls in one run of the pipeline, and those in another run by method.

        Components that are left out are opened only where the pipeline cannot be called without them. Raises
        RecipeError where it cannot be called at all.
        """
        from torch import nn

        denoiser = model.open().module
        for absent in dict.fromkeys((tuple(without), ())):
            try:
                pipe = folder.open(denoiser, absent)
                models = {
                    name: module
                    for name, module in pipe.components.items()
                    if isinstance(module, nn.Module) and name not in (*folder.denoisers, *without)
                }
                return models, *self._recorded(pipe, models, model.ref.sampling_steps, ctx)
            except IntaglioError:
                raise
            except Exception as error:  # pipelines raise any exception for a missing argument
                said = printable(f"{type(error).__name__}: {' '.join(str(error).split())}")[:500]
                if not absent:
                    kind = printable(folder.index()["_class_name"])
                    lacks = f" (the folder has no {', '.join(folder.absent())})" if folder.absent() else ""
                    raise RecipeError(f"call: {kind} raised {said}{lacks}: give what it needs in `call`") from error
                ctx.log.info("the pipeline needs %s, opened here but not compiled (%s)", ", ".join(absent), said)
        raise AssertionError  # the last one returns or raises

    def _recorded(
        self, pipe: Any, models: Mapping[str, nn.Module], steps: int, ctx: Context
    ) -> tuple[list[MethodCalls], dict[str, MethodCalls]]:
        """Return the calls of all methods, and those of the other call by name of method."""
        import torch

        from intaglio.exporters.components.calls import encode_calls

        def recorded(call: Mapping[str, JsonValue]) -> list[MethodCalls]:
            with torch.no_grad():
                found = self._record(pipe, models, self.opened(call), steps, ctx)
                if self.image_to_image and not any(calls.method == "encode" for calls in found):
                    decoders = [c for c in found if c.method == "decode" and hasattr(models[c.component], "encode")]
                    found += [encode_calls(calls, models[calls.component]) for calls in decoders]
            return found

        usual = recorded(self.call)
        called = {calls.component for calls in usual}
        if idle := [name for name in models if name not in called]:
            raise RecipeError(
                *(f"{name} is never called: change `call` to use it, or leave it out: {name}: none" for name in idle)
            )
        other = {} if self.other_call is None else {c.name: c for c in recorded({**self.call, **self.other_call})}
        return usual, other

    def _record(
        self, pipe: Any, models: Mapping[str, nn.Module], call: Mapping[str, Any], steps: int, ctx: Context
    ) -> list[MethodCalls]:
        """Return the calls of one run. If the pipeline fails without pictures, it gets one, or one for each prompt."""
        from intaglio.exporters.components.calls import picture_for, record_calls

        parameters = inspect.signature(pipe.__call__).parameters
        usual = {
            "prompt": list(PROMPTS),
            "num_inference_steps": steps,
            "output_type": "pt",
            "generator": ctx.torch_rng("call"),
        }
        given = {n: v for n, v in usual.items() if n in parameters} | dict(call)
        pictures = [name for name in PICTURES if name in parameters and name not in given]
        needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if missing := [name for name in needed if name not in (*given, *pictures)]:
            raise RecipeError(f"call: {type(pipe).__name__} requires {', '.join(missing)}: give it here")
        if unknown := [name for name in given if not _takes(type(pipe).__call__, name)]:
            near = did_you_mean(unknown[0], [name for name in parameters if name != "kwargs"])
            raise RecipeError(f"call: {type(pipe).__name__} has no {printable(unknown[0])!r}{near}")
        try:
            return record_calls(pipe, models, given)
        except IntaglioError:
            raise
        except Exception:
            if not pictures:
                raise
            ctx.log.info("the call uses a default picture for %s", ", ".join(pictures))
        strength, picture = {"strength": 1.0} if "strength" in parameters else {}, picture_for(pipe)
        failed: Exception | None = None
        for drawn in (picture, [picture] * len(PROMPTS)):
            given |= {"generator": ctx.torch_rng("call")} if "generator" in usual.keys() & parameters.keys() else {}
            try:
                return record_calls(pipe, models, strength | dict.fromkeys(pictures, drawn) | given)
            except IntaglioError:
                raise
            except Exception as error:  # pipelines raise any exception for pictures of another number
                failed = failed or error
        assert failed is not None  # both attempts failed
        raise failed

    def _graph(
        self,
        module: nn.Module,
        calls: MethodCalls,
        other: MethodCalls | None,
        integers: Mapping[str, QuantizedLayerData],
        target: Target,
        work: Path,
    ) -> Graph:
        """Write one method's graph as the target executes it, and compare it with torch."""
        from intaglio.exporters.components.calls import compute_with
        from intaglio.exporters.float_graph.agreement import HALF_TOLERANCE, TOLERANCE, check_outputs, find_magnitudes
        from intaglio.exporters.float_graph.capture import Calls
        from intaglio.exporters.float_graph.torch_export import write_graph
        from intaglio.exporters.qdq.export_qdq import write_lowered
        from intaglio.pipeline.artifacts.quantized import Quantized

        compute = compute_with(module, calls)
        both = Calls(calls.inputs[0], None if other is None else other.inputs[0], calls.shared)
        expected = list(_expected(compute, calls, both))
        graph = write_graph(
            work / "model.onnx",
            module,
            compute,
            both,
            tuple(expected[0].outputs),
            opset=self.opset,
            called=calls.name,
        )
        gc.collect()  # the wrapped module is part of a reference cycle
        graph = replace(graph, interface=Interface(arguments=calls.arguments, constants=calls.constants))
        check_outputs(graph.path, expected, TOLERANCE)
        half = target.float_type == "float16"
        if not half and not integers:
            return graph
        if half:
            graph = replace(graph, amax=find_magnitudes(graph.path, _every_row(compute, calls), TOLERANCE))
        there = Quantized((), {name: data for name, data in integers.items() if name in graph.nodes})
        (work / "lowered").mkdir()
        lowered = write_lowered(work / "lowered" / "model.onnx", graph, there, target)
        check_outputs(lowered.path, expected, HALF_TOLERANCE if half else TOLERANCE)
        return lowered


def _takes(function: Callable[..., object], name: str) -> bool:
    """Return False for an argument that a function does not have, or that vanishes in its **kwargs.

    Most functions read a few names of them, as texts in their source, and hand none on.
    """
    parameters = inspect.signature(function).parameters
    rest = next((n for n, p in parameters.items() if p.kind is p.VAR_KEYWORD), None)
    if name in parameters and name != rest:
        return True
    if rest is None:
        return False
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # it has no source
        return True
    return source.count(f"**{rest}") > 1 or f'"{name}"' in source


def _class_of(output: Any) -> str:
    """Return the class of an output as `module:name`, or nothing for a tuple or a tensor."""
    return f"{type(output).__module__}:{type(output).__name__}" if isinstance(output, Mapping) else ""


def _expected(compute: Compute, calls: MethodCalls, both: Calls) -> Iterator[Expected]:
    """Yield torch's outputs for one row, for two rows, and at the other size."""
    yield _called(compute, f"{calls.name} at 1 row", both.with_rows(both.usual, 1))
    yield _called(compute, f"{calls.name} at 2 rows", both.with_rows(both.usual, 2))
    if both.other is not None:
        yield _called(compute, f"{calls.name} at the other size", both.other)


def _every_row(compute: Compute, calls: MethodCalls) -> Iterator[Expected]:
    """Yield torch's outputs for each recorded row alone."""
    for inputs in calls.inputs:
        for row in range(max(len(v) for n, v in inputs.items() if n not in calls.shared)):
            alone = {name: value if name in calls.shared else value[[row]] for name, value in inputs.items()}
            yield _called(compute, f"{calls.name} at 1 row", alone)


def _called(compute: Compute, where: str, inputs: Inputs) -> Expected:
    """Return torch's outputs. Raises StepFailed for NaN, or for one value everywhere, such as a black picture."""
    import torch

    from intaglio.exporters.float_graph.agreement import Expected

    with torch.no_grad():
        outputs = compute(inputs)
    for name, value in outputs.items():
        if not value.is_floating_point() or value.numel() < 2:
            continue
        if not value.isfinite().all():
            raise StepFailed(f"{where}: torch itself returns {name} with NaN or Inf")
        if value.min() == value.max():
            raise StepFailed(f"{where}: torch itself returns {name} that is {float(value.min()):g} everywhere")
    return Expected(where, inputs, outputs)


def _round_weights(
    module: nn.Module, precision: str, target: Target, groups: tuple[int, ...]
) -> dict[str, QuantizedLayerData]:
    """Round weights to this scheme where the target has it, and embeddings to float16. Changes `module`."""
    import torch

    from intaglio.pipeline.artifacts.quantized import QuantizedLayerData
    from intaglio.pipeline.formats.layer import structural_schemes, unfit
    from intaglio.pipeline.formats.schemes import RoundedWeight
    from intaglio.pipeline.model.layers import layer_table
    from intaglio.pipeline.simulation.model import round_tables

    rounded = {}
    with torch.no_grad():
        for layer in layer_table(module):
            *_, scheme = structural_schemes(layer, groups, (precision,))
            form, weight = scheme.weight, module.get_submodule(layer.name).get_parameter("weight")
            if not isinstance(form, RoundedWeight) or unfit(layer, scheme, target) is not None:
                continue
            w_NK = weight.flatten(1)
            scale_NG, _ = form.fit(w_NK)
            codes = form.quantize(w_NK, scale_NG)
            weight.copy_(form.dequantize(codes, scale_NG).reshape(weight.shape))
            rounded[layer.name] = QuantizedLayerData(scheme, codes, scale_NG)
    round_tables(module)
    return rounded
