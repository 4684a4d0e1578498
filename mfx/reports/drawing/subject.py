"""From a model to what is shown of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from mfx.capture.captured import CaptureError
from mfx.modules.tree_copy import net_of
from mfx.net.forward import RewrittenForward, forward_of
from mfx.options.options import Options
from mfx.program.chain_call import Momentum, Stream
from mfx.program.rewritten import RewrittenGraph
from mfx.program.shapes import stream_shapes
from mfx.reports.drawing.boxes import Model, Picture, picture_of


@dataclass(frozen=True)
class Shown:
    """A rewritten graph and what it is of.

    Args:
        title: of a part that is rewritten by itself; else empty.
        net: the model or part.
        entry: the graph.
        streams: shape and dtype of the chains' states, where inputs were given, by the chains' names.
    """

    title: str
    net: nn.Module
    entry: RewrittenGraph
    streams: Mapping[str, Stream]

    @property
    def picture(self) -> Picture:
        """What to draw of it."""
        module = self.entry.graph_module(self.net)
        model = Model({**_modules(module), **_modules(self.net)}, self.streams, self.entry.within)
        return picture_of(self.title, module.graph, model)


def pictures_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Picture]:
    """One picture; several of a net that is rewritten module by module.

    Raises:
        MfxError: the model cannot be captured.
    """
    if isinstance(model, fx.GraphModule) and any(isinstance(module, Momentum) for module in model.modules()):
        return [picture_of("", model.graph, Model(_modules(model), {}))]
    return [shown.picture for shown in shown_of(model, args, kwargs)]


def shown_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Shown]:
    """The graph for these inputs, else the one that ran last, else that for default arguments; or those of the parts.

    Raises:
        MfxError: the model cannot be captured.
    """
    forward = forward_of(model)
    if forward is None:
        forward = RewrittenForward(net_of(model), Options())
    if forward.per_module:
        return _parts(forward)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mfx: ")  # mfx.explain says what they say
        entry = _entry(forward, args, kwargs)
        streams = (
            stream_shapes(forward.net, forward.__signature__, forward.options, entry, args, kwargs)
            if args or kwargs
            else {}
        )
    return [Shown("", forward.net, entry, streams)]


def _parts(whole: RewrittenForward) -> list[Shown]:
    paths = {module: path for path, module in whole.net.named_modules()}
    return [
        Shown(f"{paths[part.net]}, rewritten by itself", part.net, part.active, {})
        for part in whole.parts()
        if part.active is not None and part.active.calls
    ]


def _modules(module: nn.Module) -> dict[str, nn.Module]:
    return dict(module.named_modules(remove_duplicate=False))


def _entry(forward: RewrittenForward, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RewrittenGraph:
    if args or kwargs:
        return forward.entry_for(*args, **kwargs)
    if forward.active is not None and forward.active.holds():
        return forward.active
    try:
        return forward.prepare()
    except CaptureError as error:
        raise CaptureError(
            f"With inputs, mfx.draw(model, path, *inputs), TorchDynamo is asked, too. Without: {error}"
        ) from error
