"""The kernels of exact arithmetic as functions of a compiler are those made in blocks, bit for bit."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mfx.engine.arithmetic import BLOCK_KERNELS, ExactState, FusedKernels
from mfx.options.gamma import Gamma
from mfx.program.codegen import BackendCompiler, to_function
from tests import sampling

SHAPE = 5, 2**14 - 1  # large enough to be fused, and no multiple of a vector's width
GAMMAS = [Gamma(9, 10), Gamma(1, 64), Gamma(9999, 10000), Gamma(1, 2)]


class Counting:
    """A compiler that counts what it is asked for."""

    def __init__(self, compiler=to_function):
        self.compiler, self.graphs = compiler, 0

    def __call__(self, graph):
        self.graphs += 1
        return self.compiler(graph)


def walk(kernels, x, ys, kind, gammas):
    """Every stream there and back, and the integers at the far end and at the start."""
    state = ExactState.start(x, None, reversible=True, kernels=kernels)
    seen = [state.advance(y, kind, gamma) for y, gamma in zip(ys, gammas, strict=True)]
    frozen = state.freeze()
    seen += [tensor.clone() for tensor in frozen.tensors]
    back = frozen.thaw(frozen.tensors)
    for y, gamma in reversed(list(zip(ys, gammas, strict=True))):
        seen.append(back.retreat_x())
        back.retreat_v(y, kind, gamma)
    assert back.is_start()
    return [*seen, back.X]


def assert_alike(fused, *, dtype, kind, gammas, scale=1.0, transposed=False):
    torch.manual_seed(0)
    x, *ys = (torch.randn(SHAPE).mul_(scale).to(dtype) for _ in range(1 + len(gammas)))
    if transposed:
        x, ys[1] = x.t().contiguous().t(), ys[1].t().contiguous().t()
    expected = walk(BLOCK_KERNELS, x, ys, kind, gammas)
    actual = walk(fused, x, ys, kind, gammas)
    assert all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("scale", [1.0, 3e3, 1e-12], ids=str)
@pytest.mark.parametrize("kind", ["residual", "map"])
@sampling.sampled("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], 2)
def test_same_integers(dtype, kind, scale):
    fused = Counting()
    gammas = [GAMMAS[i % len(GAMMAS)] for i in range(9)]
    assert_alike(FusedKernels(fused), dtype=dtype, kind=kind, gammas=gammas, scale=scale)
    # One each to advance, to retreat x and v.
    assert fused.graphs == 3, "γ is part of a graph"


def test_other_layouts():
    assert_alike(FusedKernels(to_function), dtype=torch.float32, kind="map", gammas=GAMMAS, transposed=True)


def test_small_streams_are_not_worth_it():
    compiler = Counting()
    x = torch.randn(100)
    walk(FusedKernels(compiler), x, [x, x], "residual", GAMMAS[:2])
    assert compiler.graphs == 0


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # Inductor in torch 2.13
@sampling.grid(1, dtype=[torch.float32, torch.bfloat16, torch.float16, torch.float64], kind=["residual", "map"],
               scale=[1.0, 3e3])  # fmt: skip
def test_inductor(fresh, dtype, kind, scale):
    assert_alike(BackendCompiler("inductor").kernels, dtype=dtype, kind=kind, gammas=GAMMAS, scale=scale)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_one_loop_for_any_size(fresh):
    fused = BackendCompiler("inductor").kernels
    for count in (2**14 + 1, 2**18 + 3):
        x, *ys = (torch.randn(count) for _ in range(4))
        expected, actual = (walk(kernels, x, ys, "residual", GAMMAS[:3]) for kernels in (BLOCK_KERNELS, fused))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


class Looking(TorchDispatchMode):
    """Counts operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wrong", ["a subclass", "a mode"])
def test_what_is_not_memory_alone_is_not_fused(wrong):
    compiler = Counting()
    x = torch.randn(SHAPE)
    if wrong == "a subclass":
        y = x.as_subclass(type("Marked", (torch.Tensor,), {}))
        walk(FusedKernels(compiler), x, [x, y], "residual", GAMMAS[:2])
        assert compiler.graphs == 1, "only the way back of x has nothing to do with it"
    else:
        with Looking() as mode:
            walk(FusedKernels(compiler), x, [x, x], "residual", GAMMAS[:2])
        assert mode.count
        assert compiler.graphs == 0


def test_only_inductor_is_known_to_fuse():
    assert isinstance(BackendCompiler("inductor").kernels, FusedKernels)
    assert isinstance(BackendCompiler(torch._TorchCompileInductorWrapper("default", None, None)).kernels, FusedKernels)
    assert BackendCompiler("aot_eager").kernels is BLOCK_KERNELS
    assert BackendCompiler(lambda graph, inputs: graph.forward).kernels is BLOCK_KERNELS
