"""Define a target: the formats and operators that one runtime executes on one device, as data."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from intaglio.pipeline.entry_points import named_runtimes, runtime_folders
from intaglio.pipeline.errors import RecipeError, did_you_mean
from intaglio.pipeline.files import read_typed
from intaglio.pipeline.formats.inputs import Multiplied
from intaglio.pipeline.formats.known import SchemeName
from intaglio.pipeline.formats.schemes import Float, LayerScheme, RoundedWeight

OpKind: TypeAlias = Literal["linear", "conv"]
Generation: TypeAlias = Literal["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"]
"""GPU generation, as TensorRT-RTX names it."""


def schemes_of_kind(schemes: Sequence[str] | Mapping[OpKind, Sequence[str]], op: OpKind) -> Sequence[str]:
    """Return the scheme names for one kind of layer; `schemes` is one list for all kinds, or a list for each kind."""
    return schemes.get(op, ()) if isinstance(schemes, Mapping) else schemes


class Fact(BaseModel):
    """Statement that the target relies on, with its source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fact: str
    source: str


class Device(BaseModel):
    """Peak figures of a device from its data sheet, without sparsity, for `cost`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str
    compute_capability: str = Field(pattern=r"^\d+\.\d$", description="CUDA compute capability of the GPU")
    memory_gb: float = Field(gt=0, description="memory in GB that the GPU has, or shares with the CPU")
    bandwidth_gb_s: float = Field(gt=0, description="10^9 bytes per second between memory and GPU")
    fp16_tflops: float = Field(gt=0, description="10^12 float16 operations per second; a multiply-add counts as two")
    int8_tops: float = Field(gt=0, description="10^12 int8 operations per second; a multiply-add counts as two")
    fp8_tflops: float | None = Field(None, gt=0, description="10^12 FP8 operations per second; None: it has none")
    fp4_tflops: float | None = Field(None, gt=0, description="10^12 FP4 operations per second; None: it has none")
    source: str

    def rate(self, multiplied: Multiplied) -> float:
        """Return the 10^12 operations per second on such codes, or on float16 if the device cannot multiply them."""
        rates = {"int8": self.int8_tops, "fp8": self.fp8_tflops, "fp4": self.fp4_tflops}
        return rates[multiplied] or self.fp16_tflops


class Kernels(BaseModel):
    """Choice of 8-bit kernels: the session settings that make the runtime use them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    settings: Mapping[str, str] = {}


class Limits(BaseModel):
    """Limits of a target. `lint` checks them; export and `assign` read some of them too.

    The source of each is in the target's `facts`.

    In the descriptions of fields, `the graph may` begins a permission, `the graph must` a requirement; every other
    description states a fact.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ir_version_max: int | None = Field(None, description="highest ONNX IR version that the runtime reads; None: any")
    unsupported: tuple[str, ...] = Field(
        (),
        description="operators that the runtime refuses. An entry is `Op`, `Op-N` (as opset N defines it),"
        " `Op.attribute` (if the attribute has an effect) or `Op.attribute=value`",
    )
    expanded: tuple[str, ...] = Field(
        (),
        description="operators, as in `unsupported`, that the runtime has no kernel for and executes as many small"
        " ones: intaglio writes GroupNormalization in faster operators",
    )
    forms: tuple[str, ...] = Field(
        (),
        description="forms of operators that the runtime refuses, or computes differently from ONNX, by their names in"
        " FORMS (exporters/lint/rules/validity.py)",
    )
    types: tuple[str, ...] = Field(
        (), description="element types of values that are not codes; empty: types are not checked"
    )
    double_as_float: bool = Field(False, description="the runtime computes float64 values in float32")
    domains: tuple[str, ...] = Field((), description="domains whose operators the runtime has, besides ONNX's own")
    reads_domains: bool = Field(
        True, description="the runtime looks at the domain of an operator; false: at its name alone"
    )
    float32_attention: bool = Field(
        True, description="the graph may have a float32 Attention whose heads are an axis of their own"
    )
    shared_attention: bool = Field(True, description="the graph may have Attention with one tensor as both q and k")
    code_types: tuple[str, ...] = Field(description="types of codes that the runtime reads correctly, such as INT8")
    symmetric: bool = Field(description="the graph must have zero points of 0 and positive scales")
    constant_scales: bool = Field(
        description="the graph must have constant scales, or a product does not run on integers"
    )
    mixed_scale_types: bool = Field(description="the graph may have a tensor and its scale in different types")
    reciprocal_scales: bool = Field(
        False, description="the runtime multiplies by 1 / scale, rounded to the scale's type, when it quantizes"
    )
    codes_only_dequantized: bool = Field(
        description="the graph must have DequantizeLinear as the only operator that reads constant codes: no Reshape,"
        " Transpose or Cast may read them"
    )
    moves_codes: bool = Field(
        True, description="the graph may have operators between QuantizeLinear and DequantizeLinear"
    )
    integer_products: Mapping[str, Literal["input", "output"]] = Field(
        description="operators that the runtime executes on codes (INT8, FP8 or FP4): `input` if quantized operands are"
        " enough, `output` if the output has to be quantized too"
    )
    one_element_scales: tuple[str, ...] = Field(
        description="products that may have an input scale of shape (1,) in place of a scalar"
    )
    int4_by_int8: tuple[OpKind, ...] = Field(
        description="kinds of layers that may multiply an 8-bit input by a 4-bit weight without groups"
    )
    same_codes: bool = Field(
        False,
        description="the graph must have codes of one type in both operands of a product, or an int8"
        " input and int4 weight",
    )
    mixed_pairs: bool = Field(
        True,
        description="the graph may have one scale in QuantizeLinear where DequantizeLinear has one for each channel",
    )
    unscaled_half_sums: bool = Field(
        False,
        description="the runtime stores the sums of a float16 product before it multiplies by the channels' scales, so"
        " they can overflow",
    )
    ragged_groups: bool = Field(
        description="the graph may have a last group of weights that is shorter than the others"
    )
    trailing_groups: bool = Field(description="the graph must have groups along the last axis or the one before it")
    int4_rank_max: int | None = Field(None, description="largest number of axes of a 4-bit weight; None: any number")
    int4_even: bool = Field(False, description="the graph must have an even size of the last axis of a 4-bit weight")
    conv_channels_multiple: int = Field(
        1,
        ge=1,
        description="the graph must have multiples of this as the numbers of input and output channels of an 8-bit"
        " convolution",
    )
    shared_zero_points: bool = Field(True, description="the graph may have one zero point for several 8-bit weights")
    moves_int8: bool = Field(
        True, description="the graph may have int8 inputs that are reshaped, sliced or transposed, from opset 21 on"
    )


def _known_runtime(name: str) -> str:
    if name not in named_runtimes():
        raise ValueError(f"no runtime {name!r} is installed{did_you_mean(name, named_runtimes())}")
    return name


class Target(BaseModel):
    """Facts about what one runtime executes on one device. Everything that is not listed counts as not supported.

    A target is an artifact: after a change, only the passes that read the target run again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    runtime: Annotated[str, AfterValidator(_known_runtime)]
    description: str
    runtime_version: tuple[int, int] | None = Field(
        None,
        description="major and minor version of the oldest runtime for which the target is valid, if the device has a"
        " preinstalled runtime",
    )
    opset_max: int = Field(ge=20, description="highest ONNX opset that the runtime reads")
    formats: Mapping[OpKind, tuple[SchemeName, ...]] = Field(
        description="schemes the runtime executes, for each kind of layer"
    )
    group_sizes: tuple[int, ...] = Field(
        description="group sizes that the target executes, in input features per scale"
    )
    activation_dtype: Literal["uint8", "int8"] = Field(description="type of 8-bit codes of activations")
    float_type: Literal["float32", "float16"] = Field(
        "float32",
        description="type of floating-point operators; those for which float16 lacks range or precision are float32",
    )
    conv_output: Literal["float", "int8"] = Field(
        "float",
        description="int8: the runtime computes a convolution on integers only if its output is rounded to 8 bits too",
    )
    conv_group_channels: int = Field(
        1,
        ge=1,
        description="input channels in a group of a convolution from which on 8-bit inputs pay: smaller groups, such as"
        " those of a depthwise convolution, are faster with float inputs",
    )
    compute_capability: str | None = Field(
        None,
        pattern=r"^\d+\.\d$",
        description="lowest CUDA compute capability of the GPUs that the target is for; None: that of its devices",
    )
    generations: tuple[Generation, ...] = Field(
        (),
        description="GPU generations for which engines are built ahead of time; empty: the builder's default",
    )
    limits: Limits
    provider: str = Field(
        "CPUExecutionProvider", description="execution provider that runs the graph, for runtimes that have several"
    )
    kernels: tuple[Kernels, ...] = Field(
        (), description="8-bit kernels that the runtime can choose, fastest first: it takes the first that are exact"
    )
    fast_code: int | None = Field(
        127,
        description="largest code of 8-bit weights that the fast kernels multiply exactly; if any code of a graph is"
        " larger, all products of the graph use slower kernels. None: it depends on the CPU",
    )
    devices: tuple[Device, ...] = ()
    facts: tuple[Fact, ...] = ()

    def lacks(self, weight: Float | RoundedWeight) -> str | None:
        """Return why the target's GPUs do not multiply such weights, or None if they do or are not known."""
        known = [self.compute_capability] if self.compute_capability else [d.compute_capability for d in self.devices]
        needed = None if isinstance(weight, Float) else weight.compute_capability
        least = min(known, key=_version, default=None)
        if needed is None or least is None or _version(least) >= _version(needed):
            return None
        return f"{weight.kind} needs compute capability {needed}, and the target's GPUs have {least}"

    def multiplies_codes(self, op: OpKind, scheme: LayerScheme) -> bool:
        """Return True if the target multiplies the codes of this scheme, in INT8, FP8 or FP4.

        Return False if it multiplies float values.
        """
        needed = self.limits.integer_products.get({"linear": "MatMul", "conv": "Conv"}[op])
        rounded = not isinstance(scheme.input, Float)
        return rounded and (needed == "input" or (needed == "output" and not isinstance(scheme.output, Float)))

    def is_fast(self, scheme: LayerScheme) -> bool:
        """Return True if the product is in float, or if the fast kernels multiply the codes of this weight exactly.

        It is also True if this depends on the CPU.
        """
        weight = scheme.weight
        if isinstance(weight, Float) or isinstance(scheme.input, Float) or self.fast_code is None:
            return True
        return weight.high <= self.fast_code

    def save(self, root: Path) -> None:
        """Write target.json."""
        (root / "target.json").write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read target.json."""
        return read_typed(root / "target.json", cls)


def _version(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def target_names() -> tuple[str, ...]:
    """Return the sorted names of the targets of all runtimes. A file whose name begins with _ is not a target."""
    return tuple(sorted(name for name in _files() if not name.startswith("_")))


@cache
def load_target(name: str) -> Target:
    """Read a target from its YAML. Raises RecipeError for an unknown name."""
    if name not in target_names():
        raise RecipeError(f"no target {name!r}{did_you_mean(name, target_names())}")
    content = _read(name)
    devices = _parse(_DEVICES)
    content["devices"] = [{"name": device, **devices[device]} for device in content.get("devices", [])]
    return Target.model_validate({"name": name, **content})


def _read(name: str) -> dict[str, Any]:
    """Return a file's content, merged over the content of the file that it `extends`."""
    content = _parse(_files()[name])
    base = content.pop("extends", None)
    return content if base is None else _over(_read(base), content)


def _over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings key by key; `key+` adds to the list of `key`; any other value replaces the old one."""
    result = dict(base)
    for key, value in changes.items():
        if key.endswith("+"):
            result[key[:-1]] = [*result[key[:-1]], *value]
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _over(result[key], value)
        else:
            result[key] = value
    return result


@cache
def _files() -> dict[str, Path]:
    """Return the YAML files in the folder `targets` beside each runtime. Raises RecipeError if two share a name."""
    found: dict[str, Path] = {}
    for file in (file for folder in runtime_folders() for file in sorted(folder.glob("targets/*.yaml"))):
        if file.stem in found:
            raise RecipeError(f"target {file.stem!r} is provided twice, by {found[file.stem]} and by {file}")
        found[file.stem] = file
    return found


def _parse(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    return content


_DEVICES = Path(__file__).with_name("devices.yaml")
