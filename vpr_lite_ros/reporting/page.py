"""The report as one HTML file that needs nothing else: no network, no scripts, pictures within."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vpr_lite_ros.reporting.gallery import Picture
from vpr_lite_ros.summary import Record

TEMPLATE = "page.html"
UNKNOWN = "–"


def render(figures: Record, plots: Mapping[str, str], gallery: Mapping[str, list[Picture]]) -> str:
    """The text of the page.

    Parameters
    ----------
    figures
        What ``report.json`` holds. Every number that the page shows is looked up here, and marked
        with its path: ``<span data-figure="evaluation.precision" data-digits="3">``.
    plots
        SVG texts by name.
    gallery
        Pictures by kind.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of files, topics and frames come from strangers
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["figure"] = lambda path, digits=0: _figure(figures, path, digits)
    environment.filters["jpeg"] = lambda data: _uri("image/jpeg", data)
    environment.filters["svg"] = lambda text: _uri("image/svg+xml", text.encode())
    return environment.get_template(TEMPLATE).render(r=figures, plots=plots, gallery=gallery)


def shown(value: Any, digits: int) -> str:
    """A number as the page shows it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return UNKNOWN
    return f"{value:.{digits}f}"


def _figure(figures: Record, path: str, digits: int) -> Markup:
    value: Any = figures
    for key in path.split("."):
        value = value[key]
    return Markup('<span data-figure="{}" data-digits="{}">{}</span>').format(
        path, digits, shown(value, digits)
    )


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
