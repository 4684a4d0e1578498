"""Builds a model from ``package.module:callable`` and its arguments."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mfx_passes import MfxError
from mfx_passes.paths import is_inside

_MODELS = "torchvision.models"  # where a name without a module is looked for


def build(spec: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], config: Any, device: str) -> nn.Module:
    """Return the model that a callable makes.

    Args:
        spec: ``package.module:callable``, or the name of an instance of a module.
        args: arguments of the callable.
        kwargs: arguments by name.
        config: None, or values for ``callable.config_class`` (of Hugging Face models), whose instance is then the
            first argument.
        device: device for the parameters.

    Raises:
        MfxError: the callable is not found, fails, or does not return a module.
    """
    found = find(spec)
    if isinstance(found, nn.Module):
        return found.to(device)
    if not callable(found):
        raise MfxError(f"{spec} is {_described(found)}; a SPEC names what is called for a model: a class, a function.")
    with _on(device):
        if config is not None:
            args = (_config(spec, found, config), *args)
        model = _called(spec, found, args, kwargs)
    if not isinstance(model, nn.Module):
        raise MfxError(f"{spec} made {_described(model)}, not a torch.nn.Module.")
    return model.to(device)


def find(spec: str) -> Any:
    """Return the object that a SPEC names.

    Raises:
        MfxError: it is not found; the message suggests similar names.
    """
    module_name, colon, path = spec.partition(":")
    if not (colon and path and module_name):
        guess = ":".join(spec.strip(":").rsplit(".", 1)) if "." in spec else _guess(spec.strip(":"))
        raise MfxError(f"{spec!r} is not a package.module:callable. Did you mean {guess}?")
    found: Any = _module(module_name)
    where = module_name
    for name in path.split("."):
        if not hasattr(found, name):
            hint = _close(name, dir(found)) or _elsewhere(name, module_name)
            raise MfxError(f"there is no {name!r} in {where}{hint}.")
        found, where = getattr(found, name), f"{where}{':' if where == module_name else '.'}{name}"
    return found


def call_arguments(text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read arguments as between the parentheses of a call, or from a JSON object of named ones.

    >>> call_arguments("3, 'a', depth=[1, 2]")
    ((3, 'a'), {'depth': [1, 2]})
    >>> call_arguments('{"weights": null, "depth": 3}')
    ((), {'weights': None, 'depth': 3})

    Raises:
        ValueError: they cannot be read; the message says why.
    """
    if text.lstrip().startswith("{"):
        try:
            return (), dict(json.loads(text))
        except ValueError:
            pass  # perhaps a Python dictionary
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if text.lstrip().startswith("{") and isinstance(call, ast.Call) and len(call.args) == 1 and not call.keywords:
            return (), dict(ast.literal_eval(call.args[0]))
        if (
            not isinstance(call, ast.Call)
            or not isinstance(call.func, ast.Name)
            or None in [k.arg for k in call.keywords]
        ):
            raise ValueError("no plain arguments")
        values = tuple(ast.literal_eval(value) for value in call.args)
        return values, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(
            f"{text!r} cannot be read as Python literals, as in \"3, 'relu', depth=18\", nor as a JSON object"
        ) from error


def read_config(text: str) -> dict[str, Any]:
    """Read a JSON object, or a file that holds one.

    Raises:
        ValueError: it is neither; the message says why.
    """
    try:
        if not text.lstrip().startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        return dict(json.loads(text))
    except OSError as error:
        raise ValueError(f"{text!r} is neither a JSON object nor a file that can be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"not a JSON object: {error}") from error


def _module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # as python -m does
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not is_inside(name, error.name):
            raise MfxError(f"{name} cannot be imported: {error}. Install what it needs.") from error
        raise MfxError(f"there is no module {error.name!r}{_close_module(error.name)}.") from error
    except Exception as error:
        raise MfxError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def _close_module(name: str) -> str:
    parent, _, last = name.rpartition(".")
    path = getattr(sys.modules.get(parent), "__path__", ()) if parent else None
    if parent and not path:
        return f": {parent} is a module, not a package"
    return _close(last, (module.name for module in pkgutil.iter_modules(path)), f"{parent}." if parent else "")


def _close(name: str, names: Iterable[str], prefix: str = "") -> str:
    close = [prefix + found for found in _matches(name, names)]
    return f"; there is {', '.join(close)}" if close else ""


def _matches(name: str, names: Iterable[str]) -> list[str]:
    known = sorted({other for other in names if not other.startswith("_")})
    lower = {other.lower(): other for other in known}
    return [lower[found] for found in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.6)]


def _elsewhere(name: str, package: str) -> str:
    """Return a hint at a module inside a package that has a name, among those that importing it has imported."""
    having = [other for other in sys.modules if other.startswith(f"{package}.") and hasattr(sys.modules[other], name)]
    return f"; there is {min(having, key=len)}:{name}" if having else ""


def _guess(name: str) -> str:
    """Return the SPEC that a name without a module may stand for."""
    try:
        close = _matches(name, dir(import_module(_MODELS)))
    except ImportError:
        close = []
    return f"{_MODELS}:{(*close, 'resnet18')[0]}"


def _config(spec: str, found: Any, values: Mapping[str, Any]) -> Any:
    kind = getattr(found, "config_class", None)
    if kind is None:
        raise MfxError(
            f"--config is for classes with a config_class, as models of Hugging Face transformers; {spec} has none. "
            "Use --kwargs."
        )
    return _called(f"the configuration {kind.__name__}", kind, (), values)


def _called(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise MfxError(f"{name} takes other arguments: {error}. {_signature(function)}") from error
    except ValueError:
        pass  # without a signature
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise MfxError(f"{name} failed: {type(error).__name__}: {error}") from error


def _signature(function: Callable[..., Any]) -> str:
    text = str(inspect.signature(function))
    return f"It takes {text if len(text) < 400 else text[:400] + '…'}; give them with --args and --kwargs."


def _on(device: str) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise MfxError(f"--device {device}: {str(error).splitlines()[0]}") from error


def _described(value: object) -> str:
    return f"a {type(value).__name__}"
