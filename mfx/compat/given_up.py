"""The most fragile lines of mfx: they read the local variables of a function of Dynamo's, and replace a list of its.

Look here first when another version of torch breaks something. `when_given_up` needs three things, read in torch 2.13
to 2.14 (convert_frame.py and callback.py of ``torch._dynamo``):

* ``callback_handler.end_callbacks`` is a list that Dynamo calls at the end of every compilation, with the error still
  in ``sys.exc_info()`` if there was one;
* the function that compiles is called ``_compile`` and has the variables ``compiler_fn``, ``code`` and ``one_graph``;
* ``torch.compiler.reset`` takes the callbacks away by ``clear()`` on that list.

Without them, the warning that a function runs without mfx is lost; nothing else depends on it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import CodeType

import torch
import torch._dynamo

from mfx.compat.compiling import original_backend


def when_given_up(backend: Callable[..., object], tell: Callable[[CodeType, str], None]) -> None:
    """Have ``tell`` called whenever Dynamo has been through a function for ``backend`` and will run it as it is.

    It is told the function's code and why. Dynamo itself says so only in a log that is off by default.
    """

    def look(_: object) -> None:
        error, frame = sys.exc_info()[1], sys._getframe()
        while error is not None and frame.f_back is not None:
            frame = frame.f_back
            values = frame.f_locals
            if frame.f_code.co_name == "_compile" and "compiler_fn" in values:
                made = original_backend(values["compiler_fn"])
                if not values.get("one_graph") and _is_soft(error) and getattr(made, "compiler_fn", made) is backend:
                    tell(values["code"], _reason(error))
                return

    handler = torch._dynamo.callback.callback_handler
    handler.end_callbacks = _Lasting(look, handler.end_callbacks)


class _Lasting(list[Callable[..., None]]):
    """Callbacks, of which ``torch.compiler.reset`` takes away all but the first."""

    def __init__(self, first: Callable[..., None], others: Sequence[Callable[..., None]]) -> None:
        super().__init__([first, *others])

    def clear(self) -> None:
        del self[1:]


def _is_soft(error: BaseException) -> bool:
    """True if Dynamo does not raise such an error, but runs the function as it is."""
    return isinstance(error, torch._dynamo.exc.Unsupported | torch._dynamo.exc.UserError)


def _reason(error: BaseException) -> str:
    """Return the first line of an error, and that of the error that led to it."""
    first = str(error).strip().partition("\n")[0]
    cause = error.__cause__ or error.__context__
    earlier = "" if cause is None else str(cause).strip().partition("\n")[0]
    return f"{first}: {earlier}" if earlier and earlier != first else first
