"""The forward of a momentumized net: finds, or makes, the rewritten graph that fits a call, and runs it."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch import fx, nn

from mfx.capture.arguments import refuse_nested
from mfx.capture.captured import CaptureError, signature_of
from mfx.compiler.call_site import CallSite, register
from mfx.modules.overlay import Overlay, drop_parts
from mfx.net.agreement import check_agreement
from mfx.net.lost_effects import lost_hooks, lost_marks, of_lost_hooks, of_lost_marks
from mfx.net.routes import DynamoRoute, Run, SymbolicRoute
from mfx.net.sharded import is_sharded_somewhere, refuse_containers
from mfx.options.options import Options
from mfx.program.codegen import GraphCompiler, to_function
from mfx.program.memory_plans import NetPlans, call_key
from mfx.program.rewritten import RewrittenGraph, named_by_mode
from mfx.text import listed, without_chains


class RewrittenForward(Overlay):
    """Stands in a net's ``__dict__`` as ``forward``, in front of its class's.

    It keeps a table of rewritten graphs: one per training mode and per set of arguments that are no tensors.

    Args:
        net: the tree copy that it is the forward of.
        options: how chains are rewritten.
    """

    def __init__(self, net: nn.Module, options: Options) -> None:
        self.net = net
        self.options = options
        self.plans = NetPlans(options.budget) if options.plans else None
        self.bypassed = 0
        self.per_module = False
        self.known_chains: set[str] = set()  # of all graphs there ever were, and of the net this one is a copy of
        self.key = register(self)
        self.lock = threading.RLock()  # held while the net has other tensors than its own
        self.call_sites: list[CallSite] = []
        self.symbolic = SymbolicRoute(self)
        self.dynamo = DynamoRoute(self)
        self.active: RewrittenGraph | None = None
        self._warned: set[str] = set()

    @property
    def __signature__(self) -> inspect.Signature:
        return signature_of(self.net)

    @property
    def __name__(self) -> str:
        return "forward"

    @property
    def __code__(self) -> CodeType:
        return type(self.net).forward.__code__  # torch.export names inputs after its variables

    @property
    def is_opaque(self) -> bool:
        """Whether compiled code may call the net as one operation."""
        return not (self.is_part or self.per_module or is_sharded_somewhere(self.net))

    @property
    def all_entries(self) -> list[RewrittenGraph]:
        """Every rewritten graph there is."""
        return [*self.symbolic.entries, *self.dynamo.entries]

    def _original(self) -> Callable[..., Any]:
        return type(self.net).forward.__get__(self.net)  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the net on these arguments, by the rewritten graph that fits them."""
        if torch.compiler.is_dynamo_compiling():
            from mfx.compiler.call import call  # imports TorchDynamo, which takes a second

            return call(self, args, kwargs)
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], compiler: GraphCompiler = to_function) -> Any:
        """The same, whoever looks on, by functions that ``compiler`` makes of graphs."""
        if args and args[0] is self.net:
            args = args[1:]  # somebody (accelerate does) made a method of this, as of a function
        if self.plans is None:
            return self._run(args, kwargs, compiler)
        with self.plans.forward_pass(call_key((args, kwargs), training=self.net.training)):
            return self._run(args, kwargs, compiler)

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], compiler: GraphCompiler) -> Any:
        if self.bypassed or self.per_module:
            return self._original()(*args, **kwargs)
        try:
            entry, run = self._find(args, kwargs)
        except CaptureError as error:
            if self.options.capture != "auto" or self.options.layers or self.all_entries:
                raise
            return self._run_in_parts(error, args, kwargs)
        if not torch.compiler.is_exporting():  # that graph is not kept
            self._activate(entry)
        self._mention_hooks(entry)
        if not entry.calls:
            self._has_no_chain(entry)
            return self._original()(*args, **kwargs)
        return run(compiler)

    def _has_no_chain(self, entry: RewrittenGraph) -> None:
        if entry.captured.frame is not None:  # else it was said when the graph was made, or lost its steps
            self.warn(without_chains(self.net))

    def _run_in_parts(self, error: CaptureError, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """From now on, run the forward as it is written, and the parts it calls each by graphs of its own."""
        self.per_module = True
        try:
            result = self._original()(*args, **kwargs)
        except BaseException:
            self.per_module = False  # it may have been the call that was wrong
            raise
        if not self.is_part:
            chains = sorted(
                {chain for part in self.parts() for entry in part.all_entries for chain in entry.chain_lengths}
            )
            found = f"these chains were found: {listed(chains)}" if chains else "no chain was found"
            self.warn(
                f"{error} So the modules inside of it are rewritten each on its own, and a chain ends where its module "
                f"does; {found}."
            )
        return result

    def parts(self) -> list[RewrittenForward]:
        """The forwards of all parts of the net."""
        forwards = [module.__dict__.get("forward") for module in self.net.modules() if module is not self.net]
        return [forward for forward in forwards if isinstance(forward, RewrittenForward) and forward.is_part]

    def adopt(self, entry: RewrittenGraph) -> None:
        """Note a new graph's chains, and leave the modules that it calls as they are: a call is what it always was."""
        self.known_chains.update(entry.chain_lengths)
        drop_parts(self.net, entry.called_modules)

    def entry_for(self, *args: Any, **kwargs: Any) -> RewrittenGraph:
        """The rewritten graph that a call with these arguments runs, or would run.

        Raises:
            MfxError: the model cannot be captured for them.
        """
        return self._find(args, kwargs)[0]

    def prepare(self) -> RewrittenGraph:
        """Capture and rewrite before any call, for the net's training mode and example inputs or default arguments.

        Raises:
            CaptureError: the model cannot be captured before a call.
            MfxError: an option names a chain that the model does not have.
        """
        if self.options.example_inputs is not None:
            args, kwargs = self.options.example_call
            entry = self.entry_for(*args, **kwargs)
        elif self.options.capture != "dynamo":
            entry = self.symbolic.prepare()
        else:
            raise CaptureError(f"{type(self.net).__name__} is to be captured by TorchDynamo, which looks at a call.")
        self.options.check_chains(entry.chain_lengths)
        self._activate(entry)
        self._mention_hooks(entry)
        return entry

    def _find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[RewrittenGraph, Run]:
        refuse_nested(self.net, args, kwargs)
        if self.options.capture == "dynamo":
            return self.dynamo.find(args, kwargs)
        try:
            return self.symbolic.find(args, kwargs)
        except CaptureError as untraceable:
            if self.options.capture == "symbolic":
                raise
            try:
                return self.dynamo.find(args, kwargs)
            except CaptureError as error:
                raise CaptureError(f"{error} (Before that: {untraceable})") from error.__cause__

    def check_same_function(self, entry: RewrittenGraph) -> None:
        """Whatever mode the modules are in, the chains must be the same, or training would train another network."""
        check_agreement(self.net, entry, self.all_entries)

    def _activate(self, entry: RewrittenGraph) -> None:
        if entry is self.active:
            return
        self.active = entry
        shown = {
            "graph": entry.graph,
            "code": entry.graph.python_code("self").src,
            "print_readable": self.print_readable,
        }
        for name, value in shown.items():
            if name in self.shown or not hasattr(self.net, name):
                self.net.__dict__[name] = value
                self.shown = tuple(dict.fromkeys((*self.shown, name)))

    def print_readable(self, *args: Any, **kwargs: Any) -> str:
        """The active rewritten graph as Python code; see `torch.fx.GraphModule.print_readable`."""
        entry = self.prepare() if self.active is None else self.active
        return entry.graph_module(self.net).print_readable(*args, **kwargs)

    def graphs(self) -> dict[str, fx.GraphModule]:
        """The rewritten graphs, named after the training mode they are for; ``train#2`` for other arguments.

        Those of a net that is no one graph have the path of the module that they are of in front.
        """
        if self.per_module:
            paths = {module: path for path, module in self.net.named_modules()}
            return {f"{paths[part.net]}: {name}": g for part in self.parts() for name, g in part.graphs().items()}
        return named_by_mode((entry.mode, entry, self.net) for entry in self.all_entries)

    def _mention_hooks(self, entry: RewrittenGraph) -> None:
        hooked = lost_hooks(entry)
        refuse_containers(self.net, hooked, entry.chain_targets)
        new = [path for path in hooked if path not in self._warned]
        if new:
            self._warned.update(new)
            self.warn(of_lost_hooks(new))

    def mention_marks(self, entry: RewrittenGraph) -> None:
        """Warn of attributes that the model's forward sets and the rewritten one does not."""
        if lost := lost_marks(entry):
            self.warn(of_lost_marks(type(self.net).__name__, lost))

    def warn(self, message: str) -> None:
        """Warn, once per message."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"mfx: {message}", stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        # What Dynamo saw is not copied; and a copy made inside of mfx.original is no part of that context.
        active = self.active if self.active in self.symbolic.entries else None
        state = {name: value for name, value in self.__dict__.items() if name != "lock"}
        return {**state, "active": active, "bypassed": 0, "call_sites": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, key=register(self), lock=threading.RLock())


def forward_of(net: nn.Module) -> RewrittenForward | None:
    """The rewritten forward of a module, also if somebody wrapped it; None if the module has not been momentumized."""
    for forward in _unwrapped(net.__dict__.get("forward")):
        if isinstance(forward, RewrittenForward):
            return forward
    return None


def _unwrapped(forward: Any) -> Iterator[Any]:
    while forward is not None:
        yield forward
        forward = getattr(forward, "__wrapped__", None) or getattr(forward, "__func__", None)
