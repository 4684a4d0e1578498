"""mfx: train deep residual networks without storing their activations.

The public names. Read ``api.py`` first, then ``ARCHITECTURE.md``: the road from a model to its gradients, the folders,
and which may import which. This file may import all of them but ``mfx.cli``.
"""

from mfx import integrations
from mfx.api import graphs, momentumize, original, to_networkx, trace
from mfx.meter import ActivationMeter
from mfx.modules.recomputing import recomputing
from mfx.momentumnet.momentum_net import MomentumNet
from mfx.momentumnet.transform import transform_to_momentumnet
from mfx.net.gammas import set_gamma
from mfx.options.gamma import BDIA
from mfx.reports.drawing import Drawing, draw
from mfx.reports.explain.explain import explain
from mfx.reports.explain.explanation import Explanation
from mfx.reports.plan import Plan, plan
from mfx.reports.profile.profile import profile
from mfx.reports.profile.result import Profile
from mfx.schedule import GammaScheduler
from mfx_passes import MfxError

__version__ = "0.1.0"

__all__ = [
    "BDIA",
    "ActivationMeter",
    "Drawing",
    "Explanation",
    "GammaScheduler",
    "MfxError",
    "MomentumNet",
    "Plan",
    "Profile",
    "draw",
    "explain",
    "graphs",
    "integrations",
    "momentumize",
    "original",
    "plan",
    "profile",
    "recomputing",
    "schedule",
    "set_gamma",
    "to_networkx",
    "trace",
    "transform_to_momentumnet",
]
