"""The user's code in a trace: which line made a node, and which one a trace cannot follow."""

from __future__ import annotations

import contextlib
import linecache
import signal
import sys
import traceback
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from mfx.capture.symbolic.bytecode import raises
from mfx.capture.symbolic.refusals import UntraceableError
from mfx_passes import MfxError


def said_by(error: BaseException, model: nn.Module) -> str:
    """Return the first line of an error's message, and the line of the model's code that raised it."""
    said = (str(error).strip().splitlines() or ["no message"])[0]
    caught = getattr(error, "stack", None)
    line = user_line(traceback.extract_tb(error.__traceback__) if caught is None else caught, model)
    return f"{type(error).__name__}: {said} ({line}{'' if caught is None else ', and the error is caught'})"


def user_line(frames: traceback.StackSummary, model: nn.Module) -> str:
    """Return the innermost line that is neither torch's nor mfx's."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]), contextlib.__file__)
    theirs = [frame for frame in frames if not frame.filename.startswith(ours)]
    torchs = [
        frame for frame in frames if "/torch/nn/" in frame.filename and "/modules/module.py" not in frame.filename
    ]
    for frame in (theirs or torchs)[-1:]:
        return f"{frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}"
    return f"in the forward of {type(model).__name__}"


def user_stack(codes: dict[CodeType, dict[str, Any]], frames: list[FrameType]) -> str:
    """Return the frames of the user's model, outermost first, as a traceback prints them.

    Args:
        codes: takes the code that runs in them, with its variables.
        frames: takes the frames, innermost first.
    """
    lines = []
    frame = sys._getframe(2)
    while frame is not None:
        if _module_of(frame) == "mfx.capture.symbolic.trace" and frame.f_code.co_name != "__torch_function__":
            break  # where the trace began, not its mode
        if not _is_between(frame):
            codes[frame.f_code] = frame.f_globals
            frames.append(frame)
            lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}\n')
        frame = frame.f_back  # type: ignore[assignment]
    return "".join(reversed(lines))


def users_frame() -> FrameType:
    """Return the innermost frame of the user's model."""
    frame = sys._getframe(1)
    while _is_between(frame) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def line_of(frame: FrameType) -> str:
    """Return the line that a frame runs."""
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return f"{code.co_filename}:{frame.f_lineno}, in {code.co_name}: {line}"


def is_raised_by_user(error: BaseException) -> bool:
    """True if a ``raise`` of the user's code has raised an error, not an operation that takes no traced value."""
    frame, instruction = _origin(error)
    if frame is None or _module_of(frame).startswith(("torch.", "mfx.")):
        return False
    return raises(frame.f_code, instruction)


def is_interrupt(error: BaseException) -> bool:
    """True if an error came from outside (Ctrl-C, the handler of a signal, another thread), not from what ran.

    An error of the model's own, of whatever class, may be passed over where the model is only looked at: the call
    itself raises it again, after all that comes before it. An interrupt comes once.
    """
    if isinstance(error, UntraceableError):
        return False
    handlers = {getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()}
    if any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__)):
        return True
    return not isinstance(error, Exception) and not is_raised_by_user(error)


class ErrorsPassedOver:
    """A context that an error leaves, which a real call raises again if it is the model's; interrupts go on.

    Attributes:
        error: the error that was passed over, None without one.
    """

    error: BaseException | None = None

    def __enter__(self) -> ErrorsPassedOver:
        """Begin."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        """Return True for an error that goes no further."""
        if error is None or is_interrupt(error):
            return False
        self.error = error
        return True


def is_own_fault(error: BaseException) -> bool:
    """True if an instruction of mfx's own code has failed: neither a ``raise`` nor what the model or torch has raised.

    A trace must not take such an error for something that the model does.
    """
    frame, instruction = _origin(error)
    is_ours = frame is not None and _module_of(frame).partition(".")[0] in ("mfx", "mfx_passes")
    return frame is not None and is_ours and not raises(frame.f_code, instruction)


def is_of_model(error: BaseException) -> bool:
    """True if an error is what a model says to a trace: neither mfx's own fault nor an interrupt."""
    return not is_own_fault(error) and not is_interrupt(error)


def own_fault(error: BaseException, model: nn.Module) -> MfxError:
    """Return what to raise for an error of mfx's own."""
    frame, _ = _origin(error)
    where = "" if frame is None else f" ({line_of(frame)})"
    return MfxError(
        f"mfx has failed while it traced {type(model).__name__}: {type(error).__name__}: {error}{where}. This is an "
        "error in mfx, not in the model; please report it. capture='dynamo' does without a symbolic trace"
    )


def _origin(error: BaseException) -> tuple[FrameType | None, int]:
    """Return the frame that an error comes from, and the position in its code."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return (None, 0) if last is None else (last.tb_frame, last.tb_lasti)


def _module_of(frame: FrameType) -> str:
    name = frame.f_globals.get("__name__", "")
    return name if isinstance(name, str) else ""


def _is_between(frame: FrameType) -> bool:
    """True for frames that lie between a model's code and the tracer."""
    return _module_of(frame).startswith(
        ("torch.fx", "torch.nn.modules.module", "torch.overrides", "mfx.", "contextlib")
    )
