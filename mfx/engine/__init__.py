"""One chain of residual steps: forward with momentum, backward by rebuilding its activations.

`run_chain` runs the steps (``chain``), in an arithmetic of its own (``arithmetic``), under autograd (``update``), so
that the backward pass recomputes what it needs (``recompute``), as a memory plan says (``memory``), from what lies on
the device or in host memory (``offload``). The engine handles steps as functions; it does not handle graphs. It may
import `mfx.modules`, `mfx.options`, `mfx.ledger`, `mfx.compat` and `mfx_passes`.
"""

from mfx.engine.arithmetic import ARITHMETICS, BLOCK_KERNELS, FusedKernels, Kernels
from mfx.engine.chain import run_chain
from mfx.engine.flags import read_all
from mfx.engine.memory.plan import ChainCost, ChainPlan, NetPlan, StepCost, make_plan
from mfx.engine.memory.storage import Stream, choose_storage, states_by_end, streams_of
from mfx.engine.scope import enclosing_is_recorded, measure
from mfx.engine.steps import ChainCache, ChainOutput, ChainSettings, Mark, Phase, StepFunction, mark_gradients

__all__ = [
    "ARITHMETICS",
    "BLOCK_KERNELS",
    "ChainCache",
    "ChainCost",
    "ChainOutput",
    "ChainPlan",
    "ChainSettings",
    "FusedKernels",
    "Kernels",
    "Mark",
    "NetPlan",
    "Phase",
    "StepCost",
    "StepFunction",
    "Stream",
    "choose_storage",
    "enclosing_is_recorded",
    "make_plan",
    "mark_gradients",
    "measure",
    "read_all",
    "run_chain",
    "states_by_end",
    "streams_of",
]
