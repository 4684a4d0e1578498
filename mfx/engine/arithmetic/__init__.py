from mfx.engine.arithmetic.base import Frozen, State
from mfx.engine.arithmetic.exact import ExactState
from mfx.engine.arithmetic.floating import FloatState
from mfx.engine.arithmetic.fused_kernels import Fused
from mfx.engine.arithmetic.kernels import IN_BLOCKS, Moves

__all__ = ["ARITHMETICS", "IN_BLOCKS", "ExactState", "FloatState", "Frozen", "Fused", "Moves", "State"]

ARITHMETICS: dict[str, type[State]] = {"exact": ExactState, "float": FloatState}
