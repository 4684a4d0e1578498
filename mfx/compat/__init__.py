"""Every private of torch that mfx uses, by subject, with the versions of torch in which it was read.

Imports torch and nothing of mfx outside this package. What this file offers is light; ``compiling``, ``dynamo``,
``given_up`` and ``inductor`` import TorchDynamo or Inductor and are imported where they are needed.
"""

from mfx.compat.accelerators import (
    HostCopy,
    accelerator,
    autocast_kinds,
    current_stream,
    devices_with_generators,
    has_float64,
    in_stream,
    is_capturing,
    is_refused_draw,
    make_ready,
    random_state_of,
    reproducible,
    set_random_state_of,
    sign_of_device,
)
from mfx.compat.aside import aside_from_caller, is_observed, without_global_hooks
from mfx.compat.autograd import (
    NO_TASK,
    OPAQUE_TAGS,
    above_autograd,
    current_task,
    keeps_graph,
    leaves_of,
    memory_of,
    when_task_ends,
)
from mfx.compat.compiled import compiled_model, is_inductor
from mfx.compat.fake_tensors import fake_mode, fake_mode_of, is_fake, new_fake_mode, runs_for_real, unlogged
from mfx.compat.fsdp import class_before_sharding, is_group, is_sharded, shards_of, share_shards
from mfx.compat.fx import autowrap_in_this_thread, dynamo_rules_kept, is_erased, search_autowrapped_in, untraced
from mfx.compat.generators import sign_of_numpy, sign_of_python
from mfx.compat.hooks import (
    call_tables,
    forward_hook_tables,
    global_call_tables,
    has_state_dict_hook,
    hook_tables,
)
from mfx.compat.modes import (
    AutocastState,
    autocast_as,
    autocast_state,
    has_modes,
    modes,
    modes_left,
    modes_observed,
    under_transform,
    without_modes,
    written_arguments,
)
from mfx.compat.parametrizations import are_weights_cached, cached_weights, weights_cached
from mfx.compat.patching import patched, patching
from mfx.compat.scripted import Table, scripted_copy, tensor_tables
from mfx.compat.transformer import plain_transformer_layers

__all__ = [
    "NO_TASK",
    "OPAQUE_TAGS",
    "AutocastState",
    "HostCopy",
    "Table",
    "above_autograd",
    "accelerator",
    "are_weights_cached",
    "aside_from_caller",
    "autocast_as",
    "autocast_kinds",
    "autocast_state",
    "autowrap_in_this_thread",
    "cached_weights",
    "call_tables",
    "class_before_sharding",
    "compiled_model",
    "current_stream",
    "current_task",
    "devices_with_generators",
    "dynamo_rules_kept",
    "fake_mode",
    "fake_mode_of",
    "forward_hook_tables",
    "global_call_tables",
    "has_float64",
    "has_modes",
    "has_state_dict_hook",
    "hook_tables",
    "in_stream",
    "is_capturing",
    "is_erased",
    "is_fake",
    "is_group",
    "is_inductor",
    "is_observed",
    "is_refused_draw",
    "is_sharded",
    "keeps_graph",
    "leaves_of",
    "make_ready",
    "memory_of",
    "modes",
    "modes_left",
    "modes_observed",
    "new_fake_mode",
    "patched",
    "patching",
    "plain_transformer_layers",
    "random_state_of",
    "reproducible",
    "runs_for_real",
    "scripted_copy",
    "search_autowrapped_in",
    "set_random_state_of",
    "shards_of",
    "share_shards",
    "sign_of_device",
    "sign_of_numpy",
    "sign_of_python",
    "tensor_tables",
    "under_transform",
    "unlogged",
    "untraced",
    "weights_cached",
    "when_task_ends",
    "without_global_hooks",
    "without_modes",
    "written_arguments",
]
