"""Write numbers, sizes and shares for the page."""

from __future__ import annotations

import math

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(quantity: float | None, digits: int = 3) -> str:
    """Return a number rounded to significant digits: `0.0312`, `3.1×10⁻⁷`; a dash for None, which was not measured.

    A number that is nearly 1, such as a cosine similarity, has six decimals: `0.999874`.
    """
    if quantity is None:
        return DASH
    if math.isnan(quantity):
        return "not a number"
    if math.isinf(quantity):
        return "∞" if quantity > 0 else f"{MINUS}∞"
    if quantity == 0:
        return "0"
    if 0.999 <= quantity < 1:
        return f"{quantity:.6f}"
    mantissa, exponent = f"{quantity:.{digits - 1}e}".split("e")
    power = int(exponent)
    if -4 < power < 6:
        text = f"{float(f'{mantissa}e{power}'):,.{max(digits - 1 - power, 0)}f}"
    else:
        text = f"{mantissa}{TIMES}10{str(power).translate(SUPERSCRIPT)}"
    return text.replace("-", MINUS)


def amount(quantity: float | None) -> str:
    """Return whole numbers below a million as they are, `48`, and all others as `number` does."""
    if quantity is not None and abs(quantity) < 1e6 and quantity == int(quantity):
        return f"{int(quantity):,}".replace("-", MINUS)
    return number(quantity)


def size(size_bytes: float | None) -> str:
    """Return a size in decimal units: `3.31 MB`; a dash for None, which was not measured."""
    if size_bytes is None:
        return DASH
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{number(size_bytes / factor)} {unit}"
    return f"{size_bytes:.0f} bytes"


def short_size(size_bytes: float) -> str:
    """Return a size in at most four characters: `66k`, `1.2M`."""
    power = next((p for p in (3, 2, 1) if size_bytes >= 999.5 * 1000 ** (p - 1)), 0)
    scaled = size_bytes / 1000**power
    return f"{scaled:.{int(power > 1 and scaled < 9.95)}f}{['', 'k', 'M', 'G'][power]}"


def percent(share: float) -> str:
    """Return a share as a percentage: `25.6%` for 0.256."""
    return f"{100 * share:.1f}%"
