"""A call that is not one graph, run in pieces: TorchDynamo's graphs of the stretches between its graph breaks."""

from __future__ import annotations

import dis
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from types import CodeType, FunctionType
from typing import Any

from torch import fx, nn

from mfx import compat
from mfx.capture.arguments import has_nested
from mfx.capture.captured import Captured
from mfx.compiler.holders import Holders
from mfx.modules.overlay import bare_submodules
from mfx.modules.python_state import state_of
from mfx.modules.references import References
from mfx.net.agreement import check_same_pieces
from mfx.net.call_kinds import caches_weights, kind_of
from mfx.options.options import Options
from mfx.program.assembly import Assembly
from mfx.program.codegen import to_function
from mfx.program.rewriting import rewrite_captured
from mfx.program.rewritten import RewrittenGraph
from mfx.program.scope import Scope
from mfx.text import count
from mfx_passes import MfxError
from mfx_passes.rewrite.portable_graph import copy_graph

_KINDS = 8  # of calls that are compared
_FUNCTIONS = 8  # that are kept, for other hooks and modes


class NoPiecesError(Exception):
    """A call has no pieces with chains of their own: it runs as it is written, by the graphs of its modules."""


class StretchBinding:
    """The binding of a graph of one stretch: TorchDynamo itself knows which call it serves."""

    guards_modules = True
    key = None

    def holds(self, net: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return False: no call is served by a stretch alone."""
        return False

    def function(self, graph_function: Callable[..., Any]) -> Callable[..., Any]:
        """Raise an error: a stretch is not the forward."""
        raise MfxError("a stretch between graph breaks cannot be run by itself.")


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of a forward, between graph breaks.

    Args:
        graph: its rewritten graph.
        end: the line of the graph break that ends it, and the reason; "" if the function returns there.
    """

    graph: RewrittenGraph
    end: str


def graphs_of(pieces: Iterable[Piece]) -> list[RewrittenGraph]:
    """Return the graphs of pieces."""
    return [piece.graph for piece in pieces]


def _counted(piece: Piece | None) -> list[str]:
    lengths = {} if piece is None else piece.graph.chain_lengths
    return [f"{name} ({count(length, 'step')})" for name, length in lengths.items()]


class _Running(threading.local):
    pieces: list[Piece] | None = None


class Pieces:
    """The pieces of a net's forward: for calls that are not one graph, where the forward itself may add up steps.

    A module that is called at a graph break runs graphs of its own.

    Args:
        net: the net.

    Attributes:
        ran: the pieces that the last call ran, in order.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.ran: Sequence[Piece] = ()
        self._options: Options | None = None
        self._functions: list[tuple[list[Any], Callable[..., Any]]] = []
        self._made: list[Piece] = []
        self._calls: dict[tuple[str, ...], Sequence[Piece]] = {}
        self._without: dict[tuple[str, ...], str] = {}
        self._adds_up: bool | None = None
        self._skipped: dict[str, None] = {}
        self._running = _Running()

    @property
    def graphs(self) -> list[RewrittenGraph]:
        """The graphs of all pieces that were made."""
        return [piece.graph for piece in self._made]

    @property
    def breaks(self) -> tuple[str, ...]:
        """The lines that end the pieces of the last call, with the chains that end or begin there, and why."""
        found: dict[str, list[str]] = {}
        for piece, following in zip_longest(self.ran, self.ran[1:]):
            if piece.end:
                told = found.setdefault(piece.end, [])
                told += [f"{chain} ends there" for chain in _counted(piece)]
                told += [f"{chain} begins behind it" for chain in _counted(following)]
        ends = (f"{end}: {', '.join(dict.fromkeys(told)) or 'it cuts no chain'}" for end, told in found.items())
        return (*ends, *(f"{line}: it runs as it is written" for line in self._skipped))

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Options) -> Any:
        """Run a call.

        Args:
            args: arguments of the call.
            kwargs: arguments by name.
            options: how chains are rewritten.

        Raises:
            NoPiecesError: there are none; nothing was run.
            MfxError: the call had other chains than another one, or there are too many graphs.
        """
        kind = kind_of(self.net, args, kwargs)
        if options.capture == "symbolic" or kind in self._without or has_nested(args, kwargs):
            raise NoPiecesError
        if caches_weights(self.net) or not self._may_gain(options):
            raise NoPiecesError
        self._refuse_fake_values(kind, options)
        from mfx.compat.dynamo_pieces import GivenUpError, TooManyGraphsError  # imports TorchDynamo

        self._options = options
        try:
            with self._noting() as ran:
                result = self._compiled(options)(self.net, *args, **kwargs)
        except GivenUpError as error:
            self._check(kind, ())
            self._without[kind] = str(error)
            raise NoPiecesError from error
        except TooManyGraphsError as error:
            raise MfxError(
                f"{type(self.net).__name__} is not one graph, and TorchDynamo has made as many graphs of one stretch "
                f"of it as it will ({error}): what the stretch depends on differs from call to call. Momentumize a "
                "part of the model that is one graph."
            ) from error
        self._check(kind, ran)
        self._calls = {kind: ran, **dict(list(self._calls.items())[-_KINDS:])}
        self.ran = ran
        return result

    def _refuse_fake_values(self, kind: tuple[str, ...], options: Options) -> None:
        """Refuse a call on tensors without values, which TorchDynamo does not look at, if that is another function."""
        if compat.runs_for_real() or not options.may_change_function:
            return
        if kind not in self._calls or any(graph.calls for graph in graphs_of(self._calls[kind])):
            raise MfxError(
                f"{type(self.net).__name__} is not one graph, and on tensors without values (a fake mode) TorchDynamo "
                "does not find its pieces. Call it on tensors that have values, or momentumize a part of the model "
                "that is one graph."
            )

    def _check(self, kind: tuple[str, ...], ran: Sequence[Piece]) -> None:
        for other, pieces in self._calls.items():
            alike = kind[1:] == other[1:]  # but for the training mode
            check_same_pieces(self.net, graphs_of(ran), graphs_of(pieces), alike=alike)

    def _may_gain(self, options: Options) -> bool:
        """True if there may be chains that the modules inside do not have by themselves.

        TorchDynamo drops a local variable at a graph break if it is not read behind it; who refers to its value weakly
        would find it gone.
        """
        if self._adds_up is None:
            may_add_up = isinstance(type(self.net).forward, FunctionType) and adds_up(self.net)
            self._adds_up = may_add_up and not state_of(self.net).refers_weakly
        return self._adds_up and isinstance(options.velocity, str)

    @contextmanager
    def _noting(self) -> Iterator[list[Piece]]:
        before, self._running.pieces = self._running.pieces, []
        try:
            yield self._running.pieces
        finally:
            self._running.pieces = before

    def _compiled(self, options: Options) -> Callable[..., Any]:
        """Return the forward in pieces, one for each set of hooks on all modules, and one under dispatch modes.

        Where γ has signs, also one for each of the modes that the modules have been in: TorchDynamo tells modes apart
        only where a model reads them.
        """
        from mfx.compat.dynamo_pieces import in_pieces

        in_mode = compat.in_dispatch_mode()
        conditions = [in_mode, *compat.global_hooks()]
        if options.draws_signs:
            conditions += [module.training for module in self.net.modules()]
        if (known := next((f for others, f in self._functions if others == conditions), None)) is not None:
            return known
        forward: Any = type(self.net).forward
        surroundings, tell = partial(_bare, self.net), self._skipped.setdefault
        function = in_pieces(forward, self._make, surroundings, tell, in_mode=in_mode)
        self._functions = [*self._functions[-_FUNCTIONS:], (conditions, function)]
        return function

    def _make(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Return what runs in place of a stretch."""
        from mfx.capture.dynamo.graph import tidy  # imports TorchDynamo
        from mfx.compat.dynamo_pieces import break_of

        assert self._options is not None
        held = chain(self.net.named_parameters(), self.net.named_buffers())
        known = {id(tensor): path for path, tensor in held}
        paths = [known.get(id(value)) for value in inputs]
        names = {str(id(inner)): name for name, inner in self.net.named_modules()}
        copy = _copy(module)  # Dynamo reads its own later
        modules, positions = tidy(copy, paths, lambda key, source: names.get(key))
        values = {node.name: node.meta["val"] for node in copy.graph.nodes if "val" in node.meta}
        captured = Captured(copy_graph(copy.graph), [], {}, StretchBinding(), modules, values, partial=True)
        rewritten = rewrite_captured(self.net, captured, self._options, {})
        rewritten.shapes_known = True
        self._options.decide(rewritten.updates)
        piece, holders = Piece(rewritten, break_of(module)), Holders(paths)
        self._made.append(piece)
        function = Assembly(
            rewritten.graph,
            rewritten.calls,
            to_function,
            flags=self.net,
            recompute_between=rewritten.recompute_between,
            verify=rewritten.verify,
        )

        def run(*values: Any) -> Any:
            if self._running.pieces is not None:
                self._running.pieces.append(piece)
            holder = Scope(captured.modules, holders.of(values))
            return function(holder, *(values[position] for position in positions))

        return run

    def __getstate__(self) -> dict[str, Any]:
        # What Dynamo saw cannot be copied.
        return {"net": self.net}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["net"])  # type: ignore[misc]


@contextmanager
def _bare(net: nn.Module) -> Iterator[None]:
    with compat.patching(), bare_submodules(net):
        yield


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


def adds_up(net: nn.Module) -> bool:
    """True if a model's own forward may run through a chain: it, or a function that it calls, has a loop or adds.

    Where it only calls modules one by one, no chain lies outside of them.
    """
    references, adds = References(), 0
    deque(references.add_class(type(net), ("forward",)), maxlen=0)
    for value in net.__dict__.values():
        references.add(value)
    for _, value in references.variables():
        if isinstance(value, FunctionType):
            references.add(value)
    for code in chain.from_iterable(_codes(function.__code__) for function in references.functions):
        for instruction in dis.get_instructions(code):
            if instruction.opname.startswith("JUMP_BACKWARD"):
                return True
            adds += instruction.argrepr in ("+", "+=") or instruction.argval in ("add", "add_")
    return adds > 1


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
