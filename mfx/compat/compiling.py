"""Every private of torch.compile that mfx leans on while it compiles code around chains (torch 2.13 to 2.14)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch
import torch._dynamo
from torch import fx
from torch.utils import _pytree as pytree


def not_looked_into(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that Dynamo calls on tensors without values, and takes into its graph as it is."""
    return torch._dynamo.nonstrict_trace(torch._dynamo.disable(function))


def is_looked_at(values: Any) -> bool:
    """Whether these values are a compiler's, and no computation's."""
    return torch._guards.detect_fake_mode(pytree.tree_leaves(values)) is not None


def backend() -> Any:
    """The backend that the graph is for that is being made."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return _unwrapped(InstructionTranslator.current_tx().output.compiler_fn)


def _unwrapped(made: Any) -> Any:
    while hasattr(made, "_torchdynamo_orig_backend"):
        made = made._torchdynamo_orig_backend
    return made


def backends(*, hidden: bool = False) -> list[str]:
    """Names of the torch.compile backends there are; also of those for debugging."""
    return list(torch._dynamo.list_backends(exclude_tags=()) if hidden else torch._dynamo.list_backends())


def mode_of_compiled() -> str:
    """The mode of the module that Dynamo is compiling, ``"train"`` or ``"eval"``; ``"graph"`` for a function."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        module = InstructionTranslator.current_tx().f_locals.get("self")
    except (AttributeError, IndexError):
        return "graph"
    return ("train" if module.training else "eval") if isinstance(module, torch.nn.Module) else "graph"


def is_broken_off(module: fx.GraphModule) -> bool:
    """Whether Dynamo ended a graph because it could not go on, and not because the function returned."""
    reason = getattr(module, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def is_resumed() -> bool:
    """Whether the function that Dynamo is compiling is the rest of one, after a graph break."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        code = InstructionTranslator.current_tx().f_code
    except (AttributeError, IndexError):
        return False
    return code.co_name.startswith("torch_dynamo_resume_in_")


def recompilations_left() -> int:
    """How many more graphs Dynamo will make of the function that it is compiling."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    made = 0 if compile_id is None or compile_id.frame_compile_id is None else compile_id.frame_compile_id
    return torch._dynamo.config.recompile_limit - made - 1


def when_given_up(backend: Callable[..., Any], tell: Callable[[CodeType, str], None]) -> None:
    """Have ``tell`` called whenever Dynamo has been through a function for ``backend`` and will run it as it is.

    It is told the function's code and why. Dynamo itself says so in a log that nobody sees.
    """

    def look(_: object) -> None:
        error, frame = sys.exc_info()[1], sys._getframe()
        while error is not None and frame.f_back is not None:
            frame = frame.f_back
            values = frame.f_locals
            if frame.f_code.co_name == "_compile" and "compiler_fn" in values:
                made = _unwrapped(values["compiler_fn"])
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
    """Whether Dynamo keeps such an error to itself."""
    return isinstance(error, torch._dynamo.exc.Unsupported | torch._dynamo.exc.UserError)


def _reason(error: BaseException) -> str:
    """What an error says first, and for what reason there was another one before it."""
    first = str(error).strip().partition("\n")[0]
    cause = error.__cause__ or error.__context__
    earlier = "" if cause is None else str(cause).strip().partition("\n")[0]
    return f"{first}: {earlier}" if earlier and earlier != first else first
