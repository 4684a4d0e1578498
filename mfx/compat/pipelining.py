"""Stages of torch's pipeline schedules."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Stage:
    """A module that is one of several stages of a model.

    Attributes:
        module: the stage's module.
        number: from 0 on.
        count: of stages.
    """

    module: nn.Module
    number: int
    count: int


def stage_of(value: object) -> Stage | None:
    """Return what a ``torch.distributed.pipelining`` stage is; None for anything else (torch 2.11 to 2.15)."""
    stages = sys.modules.get("torch.distributed.pipelining.stage")  # imported before there can be one
    if stages is None or not isinstance(value, stages._PipelineStageBase):
        return None
    return Stage(value.submod, value.stage_index, value.num_stages)
