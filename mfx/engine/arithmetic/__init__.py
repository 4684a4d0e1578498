from mfx.engine.arithmetic.base import Frozen, State
from mfx.engine.arithmetic.exact import ExactState
from mfx.engine.arithmetic.floating import FloatState

__all__ = ["ARITHMETICS", "ExactState", "FloatState", "Frozen", "State"]

ARITHMETICS: dict[str, type[State]] = {"exact": ExactState, "float": FloatState}
