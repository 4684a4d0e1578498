"""The two arithmetics of a chain, "exact" and "float": how the numbers x and v move a step on and back.

Each is one subclass of `State`, beside autograd and without knowledge of steps or tapes. Imports `mfx.compat` and
`mfx.options` only.
"""

from mfx.engine.arithmetic.base import Frozen, State
from mfx.engine.arithmetic.exact import ExactState
from mfx.engine.arithmetic.floating import FloatState
from mfx.engine.arithmetic.fused_kernels import FusedKernels
from mfx.engine.arithmetic.kernels import BLOCK_KERNELS, Kernels

__all__ = ["ARITHMETICS", "BLOCK_KERNELS", "ExactState", "FloatState", "Frozen", "FusedKernels", "Kernels", "State"]

ARITHMETICS: dict[str, type[State]] = {state.name: state for state in (ExactState, FloatState)}
