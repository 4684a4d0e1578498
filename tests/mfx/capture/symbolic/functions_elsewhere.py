"""Functions that a model calls in a file without modules: each asks what a trace has to answer as a call does."""

import builtins
from math import sqrt
from typing import Any

from einops import rearrange
from torch import Tensor, finfo, is_autocast_enabled, is_grad_enabled, zeros

ask_for_class = type


def _is_plain(x):
    return type(x) is Tensor


class Holder:
    def __init__(self, x: Any) -> None:
        self.x = x

    def run(self):
        return self.x * (2 if type(self.x) is Tensor else 3)


def by_type(x):
    return x * 2 if type(x) is Tensor else x * 3


def by_type_in_a_function(x):
    return x * 2 if _is_plain(x) else x * 3


def by_type_in_an_object(x):
    return Holder(x).run()


def by_type_in_a_lambda(x):
    return (lambda value: value * (2 if type(value) is Tensor else 3))(x)


def by_type_in_a_generator(x):
    return x * (2 if any(type(value) is Tensor for value in (x,)) else 3)


def by_another_name(x):
    return x * (2 if ask_for_class(x) is Tensor else 3)


def by_builtins(x):
    return x * (2 if builtins.type(x) is Tensor else 3)


def by_subclass(x):
    return x * (2 if issubclass(type(x), Tensor) else 3)


def by_getattr(x):
    return x * (2 if getattr(x, "__class__") is Tensor else 3)  # noqa: B009


def by_identity(x):
    return x * (2 if id(x) in {id(x): "known"} else 3)


def by_gradients(x):
    return x * (2 if is_grad_enabled() else 3)


def by_autocast(x):
    return x * (2 if is_autocast_enabled("cpu") else 3)


def with_sizes(x):
    return x / sqrt(x.shape[0]) + zeros(x.shape[0], 1) + finfo(x.dtype).eps


def with_einops(x):
    return rearrange(x, "b c -> c b").t() * 2


TABLE = {"key": by_type}


def by_table(x):
    return TABLE["key"](x)


FUNCTIONS = [value for name, value in list(globals().items()) if name.startswith(("by_", "with_"))]
