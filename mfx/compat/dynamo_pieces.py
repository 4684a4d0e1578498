"""TorchDynamo on a function that is not one graph: a graph of each stretch between two graph breaks.

Reads the functions of Dynamo by which it converts one frame (read in torch 2.14); the call of each is wrapped, so that
nothing is run as written unseen: where Dynamo by itself only logs that it has given up, `in_pieces` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FunctionType
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo
from torch import fx
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy
from torch._dynamo.convert_frame import convert_frame_assert
from torch._dynamo.eval_frame import _optimize_catch_errors
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit
from torch._dynamo.types import ConvertFrameReturn
from torch._dynamo.variables import TensorVariable

from mfx.compat.dynamo import guard_hooks, quiet, silent_methods
from mfx.compat.dynamo_class_attributes import class_attributes_as_in_python
from mfx.compat.dynamo_containers import containers_as_in_python
from mfx.compat.dynamo_differences import check_generators
from mfx.compat.dynamo_kept_results import kept_results_refused
from mfx.compat.dynamo_loops import stretches_before_loops_kept
from mfx.compat.dynamo_unobserved import converting_unobserved, observes
from mfx.compat.fake_tensors import runs_for_real

_GRAPHS = 64  # of one stretch, with other shapes, attributes or arguments


class GivenUpError(Exception):
    """TorchDynamo finds no stretch at a function's start, so that all of it would run as written."""


class TooManyGraphsError(Exception):
    """TorchDynamo has made as many graphs of one stretch as it will."""


def in_pieces(
    function: FunctionType,
    backend: Callable[[fx.GraphModule, Any], Callable[..., Any]],
    surroundings: Callable[[], AbstractContextManager[Any]],
    tell: Callable[[str], None],
    *,
    in_mode: bool,
) -> Callable[..., Any]:
    """Return a function with the tensor work between its graph breaks replaced.

    Python code outside of mfx that it calls at a graph break is treated in the same way. Observers see what runs in
    place of a stretch, and not how it is found; where dispatch modes trace tensors without values, the function itself
    runs.

    Args:
        function: the function; graphs of it that others had made are not used.
        backend: returns what runs in place of a stretch, of its graph and example inputs.
        surroundings: a context for each compilation.
        tell: called with a line and a reason where something that is called at a graph break runs as written.
        in_mode: True if what is returned is for calls under dispatch modes, else for others.

    Raises:
        GivenUpError: by the function that is returned, before anything was run.
        TooManyGraphsError: by that function, where a stretch begins.
    """
    code = function.__code__.replace()
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    convert = convert_frame_assert(backend, one_graph=False)

    def on_frame(frame: Any, cache_entry: Any, hooks: Any, frame_state: Any, skip: int = 0) -> ConvertFrameReturn:
        is_own = frame.f_globals.get("__name__", "").startswith("mfx.")  # a module's graphs, which it runs by itself
        if is_own or observes(frame.f_code):
            return ConvertFrameReturn(_FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP), apply_to_code=False)
        try:
            with surroundings(), converting_unobserved(in_mode=in_mode), _conditions():
                converted = convert(frame, cache_entry, hooks, frame_state, skip=skip + 1)
                if converted.guarded_code is not None:
                    check_generators(converted.guarded_code.code)
                return converted
        except FailOnRecompileLimitHit as error:
            raise TooManyGraphsError(_place(frame.f_code)) from error
        except BackendCompilerFailed as error:
            raise error.inner_exception from error
        except Exception as error:  # whatever Dynamo says of code that it cannot follow
            reason = f"{_first_line(error)} ({_place(frame.f_code)})"
            if frame.f_code is code:
                raise GivenUpError(reason) from error
            tell(reason)
            return ConvertFrameReturn(apply_to_code=False)  # for others it may be another matter

    on_frame._export = True  # type: ignore[attr-defined]  # else a frame is skipped where a dispatch mode is on
    optimized = _optimize_catch_errors(on_frame, guard_hooks())(own)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not runs_for_real():
            return own(*args, **kwargs)
        with torch.compiler.set_stance("default"):
            return optimized(*args, **kwargs)

    # Where Dynamo skips what calls this (under a dispatch mode), the stance could not be set.
    return torch.compiler.disable(call)  # type: ignore[no-any-return]


def break_of(module: fx.GraphModule) -> str:
    """Return the line of the graph break at which a graph ends, and the reason; "" if the function returns there."""
    reason = getattr(module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    what = next((line for line in str(reason.reason).splitlines() if line.strip()), "a graph break").strip()
    frames = reason.user_stack
    where = f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}: {frames[-1].line}" if frames else ""
    return f"{where} ({what})" if where else what


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what Dynamo says of itself, its advice to record numbers that are read off tensors included."""
    with quiet(), patch.object(TensorVariable, "_warn_capture_scalar_outputs", staticmethod(lambda: None), create=True):
        yield


@contextmanager
def _conditions() -> Iterator[None]:
    with (
        _quiet(),
        containers_as_in_python(),
        class_attributes_as_in_python(),
        kept_results_refused(),
        stretches_before_loops_kept(),
        _config(),
    ):
        yield


def _config() -> AbstractContextManager[Any]:
    return torch._dynamo.config.patch(  # type: ignore[no-any-return]
        assume_static_by_default=True,
        automatic_dynamic_shapes=True,
        specialize_float=False,  # a number that was read off a tensor differs in each call
        skip_nnmodule_hook_guards=False,  # a hook that comes later must be seen
        ignore_logging_functions=set(silent_methods()),
        capture_scalar_outputs=False,  # such numbers end a graph
        capture_dynamic_output_shape_ops=True,
        allow_rnn=True,
        trace_numpy=False,  # torch would compute for it, whose last bits are others
        suppress_errors=False,
        recompile_limit=_GRAPHS,
        accumulated_recompile_limit=16 * _GRAPHS,
        fail_on_recompile_limit_hit=True,
    )


def _place(code: Any) -> str:
    return f"{code.co_filename}:{code.co_firstlineno}, in {code.co_name}"


def _first_line(error: Exception) -> str:
    said = next((line for line in str(error).splitlines() if line.strip()), "no message").strip()
    return f"{type(error).__name__}: {said}"
