"""Steps whose skip is scaled or gated: in a chain with plain steps, or asked for; never a recurrence over time."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.ir import Refusal, Rejection, Selection, Step
from mfx_passes.ops import sums


def without_scaled(
    row: list[Step], index: GraphIndex, selection: Selection
) -> tuple[list[list[Step]], list[Rejection]]:
    """Cut a row at steps with a scaled skip that read weights of others, and leave out rows of such steps alone."""
    if not any(map(_is_scaled, row)):
        return [row], []
    rejections: list[Rejection] = []
    read = {step: _weights(step, index) for step in row}
    readers = Counter(name for names in read.values() for name in names)
    again = {
        step: name for step in row if _is_scaled(step) for name in sorted(read[step], reverse=True) if readers[name] > 1
    }
    rejections += [
        Rejection(update.add.node, Refusal.RECURRENT, {"weights": name})
        for step, name in again.items()
        for update in step.updates
    ]
    rows = [list(group) for is_again, group in groupby(row, again.__contains__) if not is_again]
    kept = []
    for part in rows:
        if selection.only is not None or not all(map(_is_scaled, part)):
            kept.append(part)
        else:
            rejections += [Rejection(update.add.node, Refusal.SCALED) for step in part for update in step.updates]
    return kept, rejections


def _is_scaled(step: Step) -> bool:
    return any(update.add.is_scaled for update in step.updates)


def _weights(step: Step, index: GraphIndex) -> set[str]:
    """Return the targets of the modules with parameters that a step calls, and of the tensors it reads but scales."""
    targets, added = set(), step.sums
    for node in step.nodes:
        module = index.modules.get(str(node.target)) if node.op == "call_module" else None
        if module is not None and any(True for _ in module.parameters()):
            targets.add(str(node.target))
        is_scale = sums.is_product(node) or node in added
        targets |= {str(source.target) for source in node.all_input_nodes if source.op == "get_attr" and not is_scale}
    return targets
