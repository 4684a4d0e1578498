"""Build a momentumized net from a model and checked options."""

from __future__ import annotations

import warnings

from torch import fx, nn

from mfx.capture.captured import CaptureError
from mfx.capture.named_steps import mark_block_calls
from mfx.modules.tree_copy import M, net_of, tree_copy
from mfx.net.forward import NetForward
from mfx.net.never import never_has_chains
from mfx.net.state_dict import note_gamma
from mfx.net.submodules import install_submodules
from mfx.options.options import Options
from mfx.program.rewriting import make_momentum
from mfx.text import without_chains
from mfx_passes import ChainGraphs, MfxError, MomentumPass


def build_net(model: M, options: Options) -> M:
    """Return a model rewritten as checked options say; see `momentumize`."""
    net: M = tree_copy(model) if isinstance(model, fx.GraphModule) else net_of(model)
    found = _rewrite_graph_module(net, options) if isinstance(net, fx.GraphModule) else _give_forward(net, options)
    if not found:
        warnings.warn(f"mfx: {without_chains(model, 'is returned unchanged')}", stacklevel=3)
        return model
    note_gamma(net)
    return net


def _give_forward(net: nn.Module, options: Options) -> bool:
    """Give a net the forward that runs its rewritten graphs; False if it cannot have chains in any call."""
    mark_block_calls(net, options.layers)
    forward = NetForward(net, options)
    install_submodules(forward)
    try:
        if not forward.prepare().calls and never_has_chains(net, options):
            return False
    except CaptureError:
        if options.may_change_function and (options.capture == "symbolic" or options.example_inputs is not None):
            raise  # else a call will show
    forward.install()
    return True


def _rewrite_graph_module(net: fx.GraphModule, options: Options) -> bool:
    """Rewrite a graph module in place; False if it has no chains."""
    if options.budget.share is None or options.recompute is not None:
        raise MfxError(
            "a number of bytes and recompute='all' are for a net as a whole and need the model itself; a GraphModule "
            "takes a memory_budget from 0 to 1, which then holds for each chain."
        )
    if not isinstance(options.velocity, str):
        raise MfxError("velocity modules need the model itself; a GraphModule takes velocity='zero' or 'residual'.")

    chains: list[str] = []

    def make_call(graphs: ChainGraphs) -> nn.Module:
        chains.append(graphs.name)
        return make_momentum(graphs, options)

    MomentumPass(make_call, options.selection)(net)
    options.check_chains(chains)
    return bool(chains)
