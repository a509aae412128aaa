"""The page in HTML.

`page.html` is the whole; `node.html`, `adapter.html`, `choice.html` and `plot.html` are one of
many. They are templates with `$name` in the place of a text, in an element or in an attribute in
double quotes. Texts become HTML in `fill` and nowhere else; the script has its twin. An element's
`data-field` and `data-set` name the texts that the script puts in there later: as its text, or as
its attribute.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from r3mes_vllm.backend.dashboard.view import AdapterLine, Choice, NodeLine, View

_HERE = Path(__file__).parent
_LINES = {"node": NodeLine, "adapter": AdapterLine, "choice": Choice}
_PLOTS = [
    {"key": "requests", "title": "Requests", "unit": "a second"},
    {"key": "in_flight", "title": "Streams", "unit": "in flight"},
    {"key": "bytes", "title": "Answers", "unit": "bytes a second"},
]

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # The script can't make HTML of a text, even by mistake.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
"""`Content-Security-Policy`."""


def _template(name: str) -> Template:
    return Template((_HERE / f"{name}.html").read_text("utf-8").strip())


_PAGE = _template("page")
_PLOT = _template("plot")
_ROWS = {name: _template(name) for name in _LINES}


def render(view: View, *, files: Mapping[str, str], key_needed: bool) -> str:
    """The page that shows `view`; `files` are the URLs of its static files by name."""
    lines: dict[str, Sequence[Any]] = {
        "node": view.nodes,
        "adapter": view.adapters,
        "choice": view.choices,
    }
    texts = {
        "headline": view.headline,
        "details": view.details,
        "at": view.at,
        "notice": view.notice,
        "key_hint": "This backend wants one." if key_needed else "This backend wants none.",
        "style": files["dashboard.css"],
        "script": files["dashboard.js"],
        "icon": files["icon.svg"],
    }
    html = {
        f"{name}_rows": "".join(_row(name, line) for line in found) for name, found in lines.items()
    }
    html |= {f"{name}_template": _blank(name) for name in lines}
    html["plot_rows"] = "".join(fill(_PLOT, plot) for plot in _PLOTS)
    return fill(_PAGE, texts, html)


def fill(
    template: Template,
    texts: Mapping[str, str | list[str]],
    html: Mapping[str, str] | None = None,
) -> str:
    """`template` with `texts`, of which a list becomes the items of one, and pieces of `html`."""
    escaped = {
        name: escape(text)
        if isinstance(text, str)
        else "".join(f"<li>{escape(item)}</li>" for item in text)
        for name, text in texts.items()
    }
    return template.substitute(escaped, **(html or {}))


def _row(name: str, line: Any) -> str:
    return fill(_ROWS[name], asdict(line))


def _blank(name: str) -> str:
    return fill(_ROWS[name], {field.name: "" for field in fields(_LINES[name])})
