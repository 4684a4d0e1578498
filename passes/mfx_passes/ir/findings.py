"""The result of looking for chains in a graph, and the options of the search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from mfx_passes.ir.nodes import enclosing_path, source_line
from mfx_passes.ir.refusals import Refusal
from mfx_passes.ir.steps import Chain

Facts = Mapping[str, object]
Grounds = tuple[Refusal, Facts]


@dataclass(frozen=True, eq=False)
class Note:
    """A remark about a residual add.

    Args:
        node: the node of the sum, in the graph as captured.
    """

    node: Node

    @property
    def reason(self) -> str:
        """The text."""
        raise NotImplementedError

    @property
    def path(self) -> str:
        """Module whose forward holds the sum, ``""`` for the root."""
        return enclosing_path(self.node)

    @property
    def source(self) -> str:
        """``file:line`` of the sum in the user's code, ``""`` if it was not recorded."""
        return source_line(self.node)

    def __str__(self) -> str:
        where = ", ".join(filter(None, (self.path and f"in {self.path}", self.source)))
        return f"{self.node.name}{f' ({where})' if where else ''}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Rejection(Note):
    """A residual add that stays as it was.

    Args:
        node: the node of the sum, in the graph as captured.
        refusal: the reason.
        facts: values for the fields of the refusal's text.
    """

    refusal: Refusal
    facts: Facts = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """The refusal's text, with the facts."""
        return self.refusal.reason.format_map(self.facts)

    @property
    def remedy(self) -> str:
        """The remedy, ``""`` if none is known."""
        return self.refusal.remedy


@dataclass(frozen=True, eq=False)
class Cut(Note):
    """A residual add that cannot go on with a chain, and begins another one or is in none.

    Args:
        node: the node of the sum, in the graph as captured.
        last: the sum that ends the chain.
        why: the reason.
    """

    last: Node
    why: str

    @property
    def reason(self) -> str:
        """The reason, with the sum that ends the chain."""
        return f"not in one chain with {self.last.name}: {self.why}"


@dataclass(frozen=True)
class Findings:
    """Chains, outermost first, and the residual adds that are in none.

    Args:
        chains: a chain inside of another's branch comes after that.
        rejections: the residual adds that stay as they were.
        cuts: the residual adds before which a chain was cut.
        reread: from states to the nodes that are read in their place since `relayout`; the values are the same.
        graph: the graph that all these nodes are in: the one that was searched, or a copy of it with the same names.
    """

    chains: list[Chain] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    reread: dict[Node, Node] = field(default_factory=dict)
    graph: Graph = field(default_factory=Graph)


@dataclass(frozen=True)
class Selection:
    """Options of the search: the residual adds that may be rewritten at all.

    Args:
        min_steps: shorter chains stay as they are.
        only: chain names, module paths (shell patterns) or step names; None allows all. What a tuple in it names is
            in chains of its own.
        skip: chain names, module paths (shell patterns) or step names to leave alone.
        refused: names of sums known not to fit, each with the reason: a text, or a refusal and its facts.
        partial: True if the graph is but a part of a model's, so that patterns may mean what is not in it.
        within: module path of the part of a model that the graph is of; chains and steps are named as in the model.
        forward_only: the graph is never differentiated, so no branch is recomputed.
        marked: only the steps that `named_steps.mark_steps` marked; all other residual adds stay as they are.
    """

    min_steps: int = 2
    only: tuple[str | tuple[str, ...], ...] | None = None
    skip: tuple[str, ...] = ()
    refused: Mapping[str, str | Grounds] = field(default_factory=dict)
    within: str = ""
    partial: bool = False
    marked: bool = False
    forward_only: bool = False

    @property
    def groups(self) -> list[tuple[str, ...]] | None:
        """The patterns of ``only``, those for the same chains together."""
        if self.only is None:
            return None
        together = tuple(entry for entry in self.only if isinstance(entry, str))
        return [together, *(entry for entry in self.only if not isinstance(entry, str))]

    @property
    def grounds(self) -> dict[str, Grounds]:
        """The refused sums, each with a refusal and its facts."""
        return {
            name: (Refusal.OTHER, {"reason": reason}) if isinstance(reason, str) else reason
            for name, reason in self.refused.items()
        }
