"""A training step that is run and measured, by some of the ways of a plan."""

import copy

from torch.utils.checkpoint import checkpoint

import mfx


def peak_of_a_step(model, inputs, way):
    """Return the peak of activations in a training step after the first."""
    net = copy.deepcopy(model) if way != "gamma=0.9" else mfx.momentumize(model)
    if way == "checkpoint per block":
        for block in net.blocks:
            forward = block.forward
            block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    net(inputs).backward()
    net.zero_grad()
    with mfx.ActivationMeter(exclude=[inputs, *net.parameters()]) as meter:
        net(inputs).backward()
    return meter.peak
