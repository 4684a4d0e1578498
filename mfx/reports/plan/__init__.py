"""A plan before anything is bought: what fits on a device, by ordinary training, by checkpoints and by mfx.

`plan` rehearses training steps on tensors without values (``usages``) at more and more inputs (``search``), adds what a
parameter takes (`mfx.reports.training_state`), and says how long a step takes (``roofline``). ``result`` is the answer.
"""

from mfx.reports.plan.plan import plan
from mfx.reports.plan.result import Plan

__all__ = ["Plan", "plan"]
