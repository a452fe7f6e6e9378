"""Compute the figures of the report from artifacts, as plain values that a template only has to lay out."""

from intaglio.exporters.report.figures.colours import CHANNEL_COLOURS, magma_palette
from intaglio.exporters.report.figures.heat import heat_colours, heat_map
from intaglio.exporters.report.figures.layer_maps import bit_maps, gain_maps, split_name
from intaglio.exporters.report.figures.plots import curve, drawn_figure, front_figure, log_shares, strip
from intaglio.exporters.report.figures.schemes import float_rows, scheme_code, scheme_css, scheme_rows
from intaglio.exporters.report.figures.text import DASH, MINUS, amount, number, percent, short_size, size

__all__ = [
    "CHANNEL_COLOURS",
    "DASH",
    "MINUS",
    "amount",
    "bit_maps",
    "curve",
    "drawn_figure",
    "float_rows",
    "front_figure",
    "gain_maps",
    "heat_colours",
    "heat_map",
    "log_shares",
    "magma_palette",
    "number",
    "percent",
    "scheme_code",
    "scheme_css",
    "scheme_rows",
    "short_size",
    "size",
    "split_name",
    "strip",
]
