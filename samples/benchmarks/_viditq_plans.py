"""Plans of mixed W8A8 and W4A8 with the same bytes: ours, in the order of the network, modelopt's, random ones.

All have the same two schemes a layer to choose from: they differ in which layers have 4-bit weights.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from _efficientdm_peers import PEERS, Peer, quiet
from mixed_plan import narrowed
from sensitivity_speed import auto_quantize

from intaglio.passes.sensitivity.study import Batch
from intaglio.pipeline.artifacts.keys import MODEL, PLAN, TRAJECTORY
from intaglio.pipeline.artifacts.plan import QuantPlan
from intaglio.pipeline.contract.recipe import Step
from intaglio.pipeline.formats.schemes import FLOAT
from intaglio.pipeline.model.sampler import Sampler
from intaglio.pipeline.runs.runner import CompiledTarget

WIDE = ["w8a8_token", "w8a8_step"]
NARROW = ["w4a8_token", "w4a8_step"]
FORMATS = (PEERS["W8A8"]["INT8, inputs by token"], PEERS["W4A8"]["INT4 blocks, INT8 inputs by token"])
"""Formats of modelopt for WIDE and for NARROW."""
BUCKETS, ROWS = 5, 8
"""Buckets and rows of the calls on which modelopt scores layers: as many as our sensitivity has."""
BISECTIONS = 12


def uniform(schemes: Sequence[str]) -> Step:
    return Step(uses="uniform", options={"schemes": list(schemes)})


def given(plan: QuantPlan) -> tuple[Step, Step]:
    """Steps that make this plan."""
    narrow = [layer.name for layer in plan.layers if plan.schemes[layer.name].weight_bits == 4]
    return uniform(WIDE), Step(uses="./benchmarks/_given_plan.py:GivenPlan", options={"narrow": narrow})


@dataclass(frozen=True)
class Ends:
    """The plans between which all others are: every layer in W8A8, and every layer that can be in W4A8."""

    wide: QuantPlan
    narrow: QuantPlan

    @classmethod
    def of(cls, compiled: Callable[..., CompiledTarget]) -> "Ends":
        return cls(compiled(uniform(WIDE))[PLAN], compiled(uniform([*NARROW, *WIDE]))[PLAN])

    @property
    def float_bytes(self) -> int:
        """All layers in fp16."""
        return sum(layer.size_bytes(FLOAT) for layer in self.wide.layers)

    def analysis(self) -> tuple[Step, ...]:
        """Sensitivity in the schemes that are used, and in the bases that suit the narrow ones."""
        sensitivity = Step(uses="sensitivity", options={"schemes": self._used(NARROW + WIDE)})
        return uniform([*NARROW, *WIDE]), Step(uses="balance", name="bases"), sensitivity

    def assigned(self, limit_bytes: int) -> Step:
        """Our plan."""
        used = self._used(WIDE + NARROW)
        schemes = {op: [s for s in used if s.endswith(end)] for op, end in (("linear", "_token"), ("conv", "_step"))}
        return Step(
            uses="assign", options={"budget": {"size": (limit_bytes + 0.5) / self.float_bytes}, "schemes": schemes}
        )

    def _used(self, names: Sequence[str]) -> list[str]:
        used = {scheme.name for plan in (self.wide, self.narrow) for scheme in plan.schemes.values()}
        return [name for name in names if name in used]

    def four_bits(self, names: Sequence[str]) -> QuantPlan:
        """These layers at 4 bits."""
        return self.wide.replace({name: self.narrow.schemes[name] for name in names})

    def fitted(self, names: Sequence[str], limit_bytes: int) -> QuantPlan:
        """Layers at 4 bits in this order until it fits."""
        return narrowed(self.wide, {name: self.narrow.schemes[name] for name in names}, limit_bytes)

    @property
    def choice(self) -> list[str]:
        """Layers that can be at 4 bits, in the order of the network."""
        return [layer.name for layer in self.wide.layers if self.narrow.schemes[layer.name].weight_bits == 4]

    def in_order(self, limit_bytes: int) -> QuantPlan:
        """From the beginning of the network."""
        return self.fitted(self.choice, limit_bytes)

    def random(self, count: int, limit_bytes: int) -> Iterator[QuantPlan]:
        rng = np.random.default_rng(0)
        for _ in range(count):
            yield self.fitted([self.choice[i] for i in rng.permutation(len(self.choice))], limit_bytes)


def auto_quantized(done: CompiledTarget, ends: Ends, limit_bytes: int) -> list[str]:
    """Layers to which modelopt's `auto_quantize` gives 4 bits under the largest `effective_bits` that fits.

    By the KL divergence of its outputs: by gradient it does not run on a CPU.
    """
    import modelopt.torch.quantization as mtq

    checkpoint, trajectory = done[MODEL], done[TRAJECTORY]
    sampler = Sampler(checkpoint.open(), checkpoint.ref.sampling_steps, checkpoint.ref.guidance)
    batch = Batch.of(sampler, trajectory, ROWS)
    count = len(trajectory.timesteps)
    calls = [batch.inputs(int(count * (i + 0.5) / BUCKETS)) for i in range(BUCKETS)]
    state = auto_quantize(checkpoint, calls, [_format(peer) for peer in FORMATS], "kl_div")

    def chosen(bits: float) -> list[str]:
        with quiet(), warnings.catch_warnings(action="ignore"):  # of how to calibrate what is not used here
            entries = mtq.get_auto_quantize_config(state, {"effective_bits": bits})["quant_cfg"]
        four_bit = {_layer(entry) for entry in entries if _bits(entry) == 4}
        return [name for name in ends.choice if name in four_bit]

    low, high = 4.0, 16.0  # it may leave layers in float, which are W8A8 here
    best = chosen(low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        names = chosen(middle)
        if ends.four_bits(names).size_bytes <= limit_bytes:
            low, best = middle, names
        else:
            high = middle
    return best


def _format(peer: Peer) -> dict[str, Any]:
    """For all layers as for linear ones, then for convolutions: `get_auto_quantize_config` only sees the former."""
    linear_weight, linear_input, conv_weight, conv_input, algorithm = peer
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for kind, weight, x in ((None, linear_weight, linear_input), ("nn.Conv2d", conv_weight, conv_input)):
        for name, quantizer in (("weight", weight), ("input", x)):
            cfg = dict(quantizer or {})
            entries.append({"quantizer_name": f"*{name}_quantizer", "parent_class": kind, "cfg": cfg})
    return {"quant_cfg": entries, "algorithm": algorithm}


def _layer(entry: Any) -> str:
    return str(entry["quantizer_name"]).removesuffix(".weight_quantizer")


def _bits(entry: Any) -> int | None:
    weight = str(entry["quantizer_name"]).endswith(".weight_quantizer")
    return (entry.get("cfg") or {}).get("num_bits") if weight else None
