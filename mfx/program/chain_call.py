"""The momentum call: the module that a rewritten graph calls in the place of a chain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from mfx import compat
from mfx.engine import ChainCache, ChainSettings, StepFunction, Stream, run_chain, states_by_end, streams_of
from mfx.options.gamma import Gamma
from mfx.program.codegen import BackendCompiler, GraphCompiler, to_function
from mfx.program.memory_plans import ChainShare, NetPlans, is_planning, share_of
from mfx.program.scope import Scope
from mfx.program.watched_step import WatchedStep
from mfx.text import described
from mfx_passes import ChainGraphs, MfxError, paths
from mfx_passes.ir import is_momentum_call


class Momentum(nn.Module):
    """One chain of residual steps, run as momentum steps.

    It holds no parameters and no modules: those that its steps use are arguments of every call.

    Args:
        graphs: the steps.
        settings: settings of the chain. They may be replaced at any time; calls that are under way keep theirs.
        plans: plans for a chain that is called alone; None where nothing is to be planned. Inside a net, the plans of
            the net hold.

    Attributes:
        owner: path of the innermost module that owns all steps.

    Raises:
        MfxError: γ has signs of a magnitude at which the steps are not stable.
    """

    def __init__(self, graphs: ChainGraphs, settings: ChainSettings, plans: NetPlans | None = None) -> None:
        super().__init__()
        self.graphs = graphs
        self.settings = settings
        self.plans = plans
        self.owner = paths.common(path for step in graphs.steps for path in step.paths or (step.path,))
        self._check_stability(settings.gamma)
        self.streams: tuple[Stream, ...] = ()  # of the last call
        self.compiler: GraphCompiler = to_function
        self._steps: dict[GraphCompiler, tuple[StepFunction, ...]] = {}
        self._cache: ChainCache = {}

    @property
    def nests(self) -> bool:
        """True if one of its steps runs another chain."""
        return any(is_momentum_call(node) for step in self.graphs.steps for node in step.branch.nodes)

    @property
    def keeps_all(self) -> bool:
        """True if all steps keep their activations."""
        return self.settings.plan is not None and len(self.settings.plan.kept) == len(self.graphs.steps)

    @property
    def chain(self) -> str:
        """Name of the chain."""
        return self.graphs.name

    @property
    def gamma(self) -> Gamma:
        """The momentum."""
        return self.settings.gamma

    @gamma.setter
    def gamma(self, gamma: Gamma) -> None:
        self._check_stability(gamma)
        self.settings = replace(self.settings, gamma=gamma)

    def settings_on(self, root: Any) -> ChainSettings:
        """Return the settings for a call now: where γ has signs, and the owner of the steps is in evaluation, at γ = 0.

        Args:
            root: the object under whose attributes the owner is; its own flag counts where that has none.
        """
        settings = self.settings
        if not settings.gamma.has_signs or is_training(root, self.owner):
            return settings
        return replace(settings, gamma=settings.gamma.in_evaluation)

    def settings_with(self, roots: Mapping[str, Any]) -> ChainSettings:
        """Return the settings for a call now of a chain that is called alone, with these roots."""
        return self.settings_on(_Roots(roots, self)) if self.settings.gamma.has_signs else self.settings

    def _check_stability(self, gamma: Gamma) -> None:
        """Check that steps h(x) do not grow without bounds at random signs of γ.

        Of h(x) = s·x, f = (s − 1)·x; at s = 0 a step with the worse sign has eigenvalues of modulus a + √(a² + a).
        That is below 1 if a < 1/3.

        Raises:
            MfxError: they may.
        """
        mapped = [step.path for step in self.graphs.steps if "map" in step.kinds]
        if mapped and gamma.has_signs and 3 * gamma.numerator >= gamma.denominator:
            raise MfxError(
                f"chain {self.chain}: gamma=mfx.BDIA({gamma.value:g}), but it has steps h(x), where a normalisation or "
                f"an activation follows the sum (the first is {mapped[0] or 'in the root'}). With these, random signs "
                "are stable for magnitudes below 1/3 only. Use one, such as 0.25."
            )

    def forward(
        self,
        xs: Sequence[Tensor],
        captures: Sequence[Any],
        roots: Mapping[str, Any],
        v0: Any = None,
        *,
        settings: ChainSettings | None = None,
        compiler: GraphCompiler | None = None,
    ) -> Tensor | tuple[Any, ...]:
        """Run the chain.

        Args:
            xs: the state of each stream before the first step.
            captures: all other values that the steps read.
            roots: the attributes of the model under which the steps read modules and tensors.
            v0: the velocity before the first step, if a module computes it; with several streams, one of each.
            settings: those of this call, by default the module's.
            compiler: turns the steps' graphs into functions, by default the module's.

        Returns:
            The end states, the taps and the side outputs: a tuple, or the only one.

        Raises:
            MfxError: a velocity does not fit its state.
        """
        if any(x.is_nested for x in xs):
            raise MfxError(
                f"chain {self.chain}: its stream is a nested tensor, whose rows differ in size; a state is of one "
                "size. Leave the chain out with skip=, or use a padded tensor and a mask."
            )
        velocities = self._velocities(xs, v0)
        if compat.runs_for_real():
            self.streams = tuple(streams_of(xs, self._writes))
        settings = self.settings_with(roots) if settings is None else settings
        with self._share(xs, settings, roots) as share:
            return self._run(xs, captures, roots, velocities, settings, compiler, share)

    def _run(
        self,
        xs: Sequence[Tensor],
        captures: Sequence[Any],
        roots: Mapping[str, Any],
        v0: Sequence[Tensor] | None,
        settings: ChainSettings,
        compiler: GraphCompiler | None,
        share: ChainShare | None,
    ) -> Tensor | tuple[Any, ...]:
        if share is not None and share.plan is not None:
            settings = replace(settings, plan=share.plan)
        if isinstance(compiler, BackendCompiler):
            settings = replace(settings, kernels=compiler.kernels)
        result = run_chain(
            self.chain,
            self._steps_by(compiler or self.compiler),
            xs,
            tuple(captures),
            Scope({name: _with_present_settings(root, roots, compiler) for name, root in roots.items()}),
            settings,
            v0=v0,
            taps=self.graphs.taps,
            containers=self.graphs.containers,
            cache=self._cache,
            costs=None if share is None else share.costs,
            mark=None if share is None else share.mark,
        )
        outputs = (*result.xs, *result.taps, *(value for side in result.sides for value in side))
        return outputs if len(outputs) > 1 else outputs[0]

    @contextmanager
    def _share(
        self, xs: Sequence[Tensor], settings: ChainSettings, roots: Mapping[str, Any]
    ) -> Iterator[ChainShare | None]:
        """Yield the chain's share of the net's budget; of its own budget, if it is called alone."""
        is_alone = not is_planning()
        if (is_alone and self.plans is None) or not all(type(size) is int for x in xs for size in x.shape):
            yield None
            return
        gamma, arithmetic = settings.gamma, settings.arithmetic
        call = self.chain, gamma, arithmetic, tuple((tuple(x.shape), x.dtype, x.requires_grad) for x in xs)
        watched = partial(WatchedStep, modules=[root for root in roots.values() if isinstance(root, nn.Module)])
        with self.plans.forward_pass(call, watched) if is_alone and self.plans is not None else nullcontext():
            streams = streams_of(xs, self._writes)
            with share_of(call, partial(states_by_end, arithmetic, gamma, streams, self._writes)) as share:
                yield share

    @property
    def _writes(self) -> list[tuple[int, ...]]:
        return [step.writes for step in self.graphs.steps]

    def _velocities(self, xs: Sequence[Tensor], v0: Any) -> Sequence[Tensor] | None:
        if v0 is None:
            return None
        velocities = (v0,) if len(xs) == 1 else v0
        if not isinstance(velocities, list | tuple) or len(velocities) != len(xs):
            raise MfxError(
                f"the velocity module of the chain {self.chain} gave {described(v0)}; it takes the first states of "
                f"{len(xs)} streams ({', '.join(self.graphs.streams)}). Let it return a tuple of a velocity for each."
            )
        for x, velocity in zip(xs, velocities, strict=True):
            self._check_velocity(x, velocity)
        return velocities

    def _check_velocity(self, x: Tensor, v0: Any) -> None:
        fits = isinstance(v0, Tensor) and v0.shape == x.shape and v0.device == x.device and v0.is_floating_point()
        if not fits:
            got = f"{tuple(v0.shape)} {v0.dtype} on {v0.device}" if isinstance(v0, Tensor) else f"a {type(v0).__name__}"
            raise MfxError(
                f"the velocity module of the chain {self.chain} gave {got}; the state it starts from is "
                f"{tuple(x.shape)} {x.dtype} on {x.device}. Let it return a floating-point tensor of that shape, on "
                "that device."
            )

    @property
    def steps(self) -> tuple[StepFunction, ...]:
        """The steps as functions."""
        return self._steps_by(self.compiler)

    def _steps_by(self, compiler: GraphCompiler) -> tuple[StepFunction, ...]:
        if compiler not in self._steps:
            self._steps[compiler] = tuple(
                StepFunction(
                    path=step.path or f"number {number} of {len(self.graphs.steps)}",
                    kinds=step.kinds,
                    branch=compiler(step.branch),
                    original=compiler(step.original),
                    captures=step.captures,
                    targets=step.targets,
                    reads=step.reads,
                    writes=step.writes,
                )
                for number, step in enumerate(self.graphs.steps, 1)
            )
        return self._steps[compiler]

    def extra_repr(self) -> str:
        """Return the settings that ``print(net)`` shows."""
        return f"{self.chain}: {len(self.graphs.steps)} steps, gamma={self.gamma:g}, {self.settings.arithmetic.name}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiler": to_function, "_steps": {}, "_cache": {}}


def _with_present_settings(root: Any, roots: Mapping[str, Any], compiler: GraphCompiler | None) -> Any:
    """Fix the settings of a chain inside a branch, so that the recomputation runs with those of the forward pass."""
    if not isinstance(root, Momentum):
        return root
    return partial(root.forward, settings=root.settings_with(roots), compiler=compiler)


class _Roots(Scope):
    """The roots of a chain that is called alone; they are in training if any module among them is."""

    def __init__(self, roots: Mapping[str, Any], chain: Momentum) -> None:
        modules = [root for root in roots.values() if isinstance(root, nn.Module) and not isinstance(root, Momentum)]
        super().__init__({**roots, "training": any(module.training for module in modules or [chain])})


def is_training(root: Any, path: str) -> bool:
    """Return the training flag of the module at a path under ``root``, or of the last one on the way to it."""
    module = root
    for name in filter(None, path.split(".")):
        if not isinstance(inner := getattr(module, name, None), nn.Module):
            break
        module = inner
    return bool(module.training)


def holds_chain(module: nn.Module) -> bool:
    """True if a module runs a chain already, so that a trace calls it as it is."""
    return any(isinstance(child, Momentum) for child in module.children())
