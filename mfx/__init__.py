"""mfx: train deep residual networks without storing their activations."""

from mfx import schedule
from mfx.drawing import Drawing, draw
from mfx.engine import recomputing
from mfx.explain import Explanation, explain
from mfx.gammas import set_gamma
from mfx.momentumize import graphs, momentumize, original, trace
from mfx.momentumnet import MomentumNet
from mfx.profile import Profile, profile
from mfx.schedule import GammaScheduler
from mfx.transform import transform_to_momentumnet
from mfx_passes import MfxError

__all__ = [
    "Drawing",
    "Explanation",
    "GammaScheduler",
    "MfxError",
    "MomentumNet",
    "Profile",
    "draw",
    "explain",
    "graphs",
    "momentumize",
    "original",
    "profile",
    "recomputing",
    "schedule",
    "set_gamma",
    "trace",
    "transform_to_momentumnet",
]
