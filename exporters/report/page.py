"""Lay figures out as one HTML file that needs no other file and no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from intaglio.exporters.report import figures as figures

if TYPE_CHECKING:
    import jinja2


def render(template: str, **shown: object) -> str:
    """Return the HTML of a template in `pages`, filled with the values that it names."""
    return _environment().get_template(template).render(**shown)


def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("intaglio.exporters.report", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"dash": figures.DASH, "heat_colours": figures.heat_colours()}
    environment.filters |= {
        "amount": figures.amount,
        "code": figures.scheme_code,
        "css": figures.scheme_css,
        "number": figures.number,
        "percent": figures.percent,
        "size": figures.size,
    }
    return environment
