"""Functions that keep their results (`functools.lru_cache`), which TorchDynamo runs as if they did not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.variables import functions

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_NO_TENSORS = frozenset({*sys.stdlib_module_names, "torch", "numpy", "einops"})  # libraries whose results are of none
_original_call: Any = functions.WrapperUserFunctionVariable.call_function


@contextmanager
def kept_results_refused() -> Iterator[None]:
    """Within this context Dynamo refuses such a function, unless arguments and result are plain (torch 2.14)."""
    with patch.object(functions.WrapperUserFunctionVariable, "call_function", _call):
        yield


def _call(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    result = _original_call(self, tx, args, kwargs)
    cache = self.wrapper_obj
    if not hasattr(cache, "cache_info") or str(cache.__module__).partition(".")[0] in _NO_TENSORS:
        return result
    given = [*self.self_args(), *args, *kwargs.values()]
    if not all(map(_is_plain, [result, *given])):
        raise TorchDynamoException(
            f"it calls {cache.__qualname__}, which keeps its results (functools.lru_cache), as TorchDynamo would not"
        )
    plain = [variable.as_python_constant() for variable in given]
    cache(*plain[: len(plain) - len(kwargs)], **dict(zip(kwargs, plain[len(plain) - len(kwargs) :], strict=True)))
    return result


def _is_plain(variable: Any) -> bool:
    if not variable.is_python_constant():
        return False
    value = variable.as_python_constant()
    return type(value) in _PLAIN or (type(value) is tuple and all(type(item) in _PLAIN for item in value))
