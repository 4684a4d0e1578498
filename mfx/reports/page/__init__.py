"""The report of a model on one HTML page: summary, memory, drawing, chains, refusals, code.

The package lays out what explain, profile and drawing found; it runs no model. It imports the other reports' results,
and what all reports share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mfx.reports.drawing import Drawing
from mfx.reports.explain.explanation import Explanation
from mfx.reports.markup import Markup, element, joined
from mfx.reports.page import sections
from mfx.reports.page.style import STYLE
from mfx.reports.profile.result import Profile
from mfx_passes import MfxError

__all__ = ["check_file", "page_of", "write"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # nothing is loaded, nothing runs


def page_of(
    explanation: Explanation,
    drawing: Drawing,
    *,
    profile: Profile | None = None,
    why_no_profile: str = "no inputs were given.",
    code: Sequence[tuple[str, str]] = (),
    facts: Mapping[str, str] | None = None,
) -> str:
    """Return an HTML document that loads and runs nothing, readable light and dark, on a wide screen and a phone.

    Args:
        explanation: the chains and refusals of the model.
        drawing: its rewritten graph.
        profile: measurements of its training steps.
        why_no_profile: the reason why there is no profile, shown in its place.
        code: pieces of code, each with a title.
        facts: facts about how the page was made, by name.
    """
    title = f"mfx: {explanation.model}"
    head = joined(
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><link rel="icon" href="data:,">'),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    body = joined(
        element("h1", explanation.model),
        *(element("p", f"{name}: ", element("code", value), class_="dim") for name, value in (facts or {}).items()),
        sections.summary(explanation, profile),
        sections.memory(profile, why_no_profile),
        element("h2", "The rewritten graph"),
        element("figure", Markup(drawing.svg)),
        sections.chains(explanation),
        sections.rejections(explanation),
        element("h2", "The graph as code") if code else None,
        *(sections.code(about, text) for about, text in code),
    )
    page = element("html", element("head", head), element("body", element("main", body)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def check_file(path: str) -> Path:
    """Return the path of the file to write.

    Raises:
        MfxError: the path is not that of an HTML file.
    """
    file = Path(path)
    if file.suffix.lower() not in (".html", ".htm"):
        raise MfxError(f"report writes HTML; call the file {file.with_suffix('.html').name}, not {file.name}.")
    return file


def write(file: Path, page: str) -> None:
    """Write a page.

    Raises:
        MfxError: the file cannot be written.
    """
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise MfxError(f"report: {file} cannot be written: {error.strerror}.") from error
