"""Code that may catch the error of an operation: a trace has to know whether there is one as it makes the node."""

from __future__ import annotations

import ast
import builtins
import linecache
from collections.abc import Sequence
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

import torch

from mfx.modules.references import is_users_class

_ANYWHERE = (RuntimeError, IndexError, ValueError, ZeroDivisionError, AssertionError)  # of sizes that do not fit
_IN_CALL = (*_ANYWHERE, TypeError)  # of arguments that do not; farther out it is for Python's own calls
_Caught = tuple[range, tuple[ast.expr | None, ...]]  # lines, and the classes of errors that are caught there


def catches_errors(frame: FrameType, *, is_innermost: bool) -> bool:
    """True if the running line is in a ``try`` or ``suppress`` that takes errors of operations on tensors.

    Args:
        frame: the frame of the line.
        is_innermost: True if it calls the operation itself.
    """
    if not _may_catch(frame.f_code):
        return False
    errors = _IN_CALL if is_innermost else _ANYWHERE
    return any(
        frame.f_lineno in lines and any(_takes(frame, expression, errors) for expression in classes)
        for lines, classes in _caught_in_file_of(frame.f_code)
    )


@lru_cache(maxsize=4096)
def _may_catch(code: CodeType) -> bool:
    return bool(getattr(code, "co_exceptiontable", True))  # Python 3.10 has none


@lru_cache(maxsize=4096)
def _caught_in_file_of(code: CodeType) -> Sequence[_Caught]:
    linecache.checkcache(code.co_filename)  # a file that was changed is loaded anew, with other code
    return _caught_in("".join(linecache.getlines(code.co_filename)))


@lru_cache(maxsize=256)
def _caught_in(source: str) -> Sequence[_Caught]:
    """Return where the code of a file catches errors, and goes on; nothing without its source."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ()
    found: list[_Caught] = []
    for statement in ast.walk(tree):
        if isinstance(statement, ast.With):
            calls = [item.context_expr for item in statement.items if isinstance(item.context_expr, ast.Call)]
            classes = [argument for call in calls if _name(call.func) == "suppress" for argument in call.args]
        else:
            handlers = getattr(statement, "handlers", ())
            classes = [handler.type for handler in handlers if not _raises_always(handler)]
        if classes:
            body: list[ast.stmt] = getattr(statement, "body", [])
            found.append((range(body[0].lineno, (body[-1].end_lineno or body[-1].lineno) + 1), tuple(classes)))
    return tuple(found)


def _takes(frame: FrameType, expression: ast.expr | None, errors: Sequence[type[Exception]]) -> bool:
    """True if what stands behind ``except`` takes one of the errors; of what is no name it is not known."""
    if isinstance(expression, ast.Tuple):
        return any(_takes(frame, part, errors) for part in expression.elts)
    found = _value(frame, expression)
    classes = found if isinstance(found, tuple) else (found,)
    return any(not isinstance(cls, type) or _is_of(cls, errors) for cls in classes)


def _is_of(cls: type, errors: Sequence[type[Exception]]) -> bool:
    """True for a class of errors or of some of them: not for the user's own, nor for memory that runs out."""
    if any(issubclass(error, cls) for error in errors):
        return True
    return issubclass(cls, tuple(errors)) and not (is_users_class(cls) or issubclass(cls, torch.OutOfMemoryError))


def _raises_always(handler: ast.ExceptHandler) -> bool:
    """True if a handler ends in a ``raise``, and nowhere else."""
    leaves = (ast.Return, ast.Break, ast.Continue, ast.Yield)
    return isinstance(handler.body[-1], ast.Raise) and not any(isinstance(part, leaves) for part in ast.walk(handler))


def _value(frame: FrameType, expression: ast.expr | None) -> Any:
    """Return what a name, or an attribute of one, stands for; None if this is not known."""
    if isinstance(expression, ast.Attribute):
        return vars(held).get(expression.attr) if hasattr(held := _value(frame, expression.value), "__dict__") else None
    name = _name(expression)
    return next((names[name] for names in (frame.f_locals, frame.f_globals, vars(builtins)) if name in names), None)


def _name(expression: ast.expr | None) -> str:
    return getattr(expression, "id", getattr(expression, "attr", ""))
