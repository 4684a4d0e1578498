"""Host memory for what a chain keeps between forward and backward: copies, what is moved, and how much there may be."""

from mfx.engine.offload.offload import Offload

__all__ = ["Offload"]
