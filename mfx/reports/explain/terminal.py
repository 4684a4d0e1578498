"""An explanation for a terminal: at most 100 columns."""

from __future__ import annotations

import textwrap
from dataclasses import replace

from mfx.reports.explain.tables import BLOCKS, Contents, RejectedGroup
from mfx.reports.table import WIDTH
from mfx.text import count, listed, shorten

_SHOWN = 3  # rejections per reason, and cuts


def text(contents: Contents, *, verbose: bool = False) -> str:
    """Return an explanation, section by section: the verdict, memory, chains, what is left alone, what could be done.

    Args:
        contents: the explanation.
        verbose: also list the sums that only look like residual steps.
    """
    sections = (
        _memory,
        _chains,
        _policies,
        _advice,
        _cuts,
        _rejections,
        _blocks,
        _unheard,
        _leaves,
        _conditions,
        _breaks,
    )
    lines = _wrapped(contents.verdict)
    for section in sections:
        if found := section(contents):
            lines += ["", *found]
    return "\n".join([*lines, *_others(contents, verbose)])


def _chains(contents: Contents) -> list[str]:
    table = contents.chains
    if not table.rows:
        return []
    if not any(row[-1] for row in table.rows):  # no shapes
        table = replace(table, head=table.head[:-1], rows=[row[:-1] for row in table.rows])
    places = [line for name, where in contents.sources for line in _wrapped(f"  {shorten(name, 44)}: {where}")]
    return [*table.lines(WIDTH), *_wrapped(contents.signs), "", "from the first step to the last:", *places]


def _memory(contents: Contents) -> list[str]:
    if contents.memory.rows:
        return contents.memory.lines(WIDTH)
    return _wrapped(f"memory could not be predicted: {contents.unpredicted}") if contents.unpredicted else []


def _policies(contents: Contents) -> list[str]:
    lines = ["kept between forward and backward:"] if contents.policies else []
    for name, policy in contents.policies:
        lines += _wrapped(f"  {shorten(name, 44)}: {policy}")
    return lines


def _advice(contents: Contents) -> list[str]:
    lines = ["what could be done:"] if contents.advice else []
    for advice in contents.advice:
        lines += _wrapped(f"  {advice}")
    return lines


def _cuts(contents: Contents) -> list[str]:
    lines = ["chains are cut before:"] if contents.cuts else []
    for cut in contents.cuts[:_SHOWN]:
        lines += _wrapped(f"  {cut}")
    return lines + ([f"  and {len(contents.cuts) - _SHOWN} more"] if len(contents.cuts) > _SHOWN else [])


def _rejections(contents: Contents) -> list[str]:
    found = contents.rejections
    return ["left as they are:", *(line for group in found for line in _group(group))] if found else []


def _blocks(contents: Contents) -> list[str]:
    if not contents.blocks:
        return []
    shown = listed([shorten(path, 60) for path in contents.blocks])
    return _wrapped(f"{BLOCKS}: {shown}")


def _others(contents: Contents, verbose: bool) -> list[str]:
    number = sum(len(group.places) for group in contents.others)
    if not number:
        return []
    about = f"{count(number, 'more sum')} only look{'s' * (number == 1)} like a residual step"
    if not verbose:
        return ["", f"{about}: mfx explain -v, or .details() of this explanation"]
    return ["", f"{about}:", *(line for group in contents.others for line in _group(group))]


def _group(group: RejectedGroup) -> list[str]:
    lines = _wrapped(f"  {len(group.places)} x {group.reason}")
    lines += [shorten(f"      {place}", WIDTH) for place in group.places[:_SHOWN]]
    lines += [f"      and {len(group.places) - _SHOWN} more"] if len(group.places) > _SHOWN else []
    return [*lines, *(_wrapped(f"      to do: {group.remedy}") if group.remedy else [])]


def _unheard(contents: Contents) -> list[str]:
    if not contents.unheard:
        return []
    shown = listed([shorten(path, 60) for path in contents.unheard])
    return _wrapped(f"hooks on these modules do not run, since sums in them are part of a chain: {shown}")


def _leaves(contents: Contents) -> list[str]:
    lines = ["called as a whole, since a trace cannot follow them:"] if contents.leaves else []
    for names, why in contents.leaves:
        lines += _wrapped(f"  {names}: {why}")
    return lines


def _conditions(contents: Contents) -> list[str]:
    lines = ["decided in each call anew, by the values of tensors:"] if contents.conditions else []
    for condition in contents.conditions:
        lines += _wrapped(f"  {condition}")
    return lines


def _breaks(contents: Contents) -> list[str]:
    lines = ["not one graph, because of these lines; behind each, momentum starts anew:"] if contents.breaks else []
    for line in contents.breaks:
        lines += _wrapped(f"  {line}")
    return lines


def _wrapped(line: str) -> list[str]:
    line = " " * (len(line) - len(line.lstrip())) + " ".join(shorten(word, WIDTH - 10) for word in line.split())
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
