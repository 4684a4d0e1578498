"""mfx: train deep residual networks without storing their activations."""

from mfx.engine import recomputing
from mfx.explain import Explanation, explain
from mfx.momentumize import graphs, momentumize, original, trace
from mfx_passes import MfxError

__all__ = ["Explanation", "MfxError", "explain", "graphs", "momentumize", "original", "recomputing", "trace"]
