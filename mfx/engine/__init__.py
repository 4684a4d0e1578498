"""The momentum call: chains of residual steps whose backward pass rebuilds its activations."""

from mfx.engine.chain import run_chain
from mfx.engine.scope import recomputing
from mfx.engine.steps import ChainOutput, StepFunction

__all__ = ["ChainOutput", "StepFunction", "recomputing", "run_chain"]
