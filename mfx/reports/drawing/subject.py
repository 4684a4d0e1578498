"""The pictures of a model: one for each of its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mfx.net.views import View, views_of
from mfx.reports.drawing.boxes import Model, Picture, picture_of


def pictures_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Picture]:
    """Return one picture; several of a net that is rewritten module by module.

    Raises:
        MfxError: the model cannot be captured.
    """
    views = views_of(model, args, kwargs, "mfx.draw(model, path, *inputs)")
    return [_picture(view) for view in views if view.is_whole or view.calls]


def _picture(view: View) -> Picture:
    module = view.graph_module()
    modules = {**_modules(module), **_modules(view.module)}
    return picture_of(view.title, module.graph, Model(modules, view.streams, view.path))


def _modules(module: nn.Module) -> dict[str, nn.Module]:
    return dict(module.named_modules(remove_duplicate=False))
