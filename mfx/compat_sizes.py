"""What TorchDynamo remembers of the sizes of earlier calls (torch 2.13 to 2.14)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch._dynamo import pgo

__all__ = ["remembering"]


@contextmanager
def remembering(history: MutableMapping[Any, Any]) -> Iterator[None]:
    """Dynamo knows of these earlier calls and of no others, and adds what it looks at.

    Its own memory is of a function, so of all models of a class alike.
    """
    states = defaultdict(pgo.CodeState, history)
    with patch.object(pgo, "_CODE_STATE", states):
        yield
    history.update(states)
