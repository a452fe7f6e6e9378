"""Define the forms in which a layer is rounded: a scheme, in a basis of the layer's input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

from intaglio.pipeline.formats.schemes import FLOAT, Float, LayerScheme

BasisName: TypeAlias = Literal["scaled", "rotated"]
"""Name of a basis that `sensitivity` searches: channels are scaled, or scaled and rotated in blocks."""


class Form(NamedTuple):
    """A scheme, and the name of the basis in which the layer is rounded; empty for the basis that the layer has."""

    scheme: LayerScheme
    basis: str = ""

    @property
    def label(self) -> str:
        """Name of the form, such as `w8a8_token` or `w8a8_token in scaled`."""
        return f"{self.scheme.name} in {self.basis}" if self.basis else self.scheme.name


def parts_of(scheme: LayerScheme) -> dict[str, LayerScheme]:
    """Return the scheme with only the weight rounded, and with only the input rounded."""
    weight, x = LayerScheme(weight=scheme.weight, input=Float()), LayerScheme(weight=Float(), input=scheme.input)
    return {"weight": weight, "input": x}


def forms_of(forms: Mapping[str, Form], *, parts: bool) -> dict[str, Form]:
    """Return the forms of a layer by label, except float; with `parts` also the weight alone and the input alone.

    Equal parts of two schemes are one form. Only schemes in the basis that the layer has are split into parts.
    """
    found = {label: form for label, form in forms.items() if form.scheme != FLOAT}
    for label, form in tuple(found.items()) if parts else ():
        for part, scheme in parts_of(form.scheme).items():
            alone = Form(scheme)
            if not form.basis and scheme != FLOAT and alone not in found.values():
                found[f"{label}:{part}"] = alone
    return found
