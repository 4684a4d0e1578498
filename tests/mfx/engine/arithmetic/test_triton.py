"""Triton's kernels: where they serve, that they compile for GPUs without one, and their tests in the interpreter."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from mfx.engine.arithmetic import ExactState, FloatState, choice
from mfx.engine.arithmetic.choice import choose
from mfx.engine.arithmetic.gradients import UpdateGradients
from mfx.options.gamma import Gamma
from mfx_passes.errors import MfxError
from tests import sampling

pytest.importorskip("triton", reason="no part of torch's builds for CPUs; the extra 'test' asks for it")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="about kernels that are compiled, or not run"
)
KERNELS = Path(__file__).parent / "kernels"
ROOT = Path(__file__).parents[4]
X = torch.zeros(3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they run on the GPU, in this process")
def test_kernels_in_the_interpreter():
    """In a process of its own: TRITON_INTERPRET must be set before anything imports triton."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--confcutdir={KERNELS}", str(KERNELS)]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-20000:]
    assert re.search(r"\d{2} passed", run.stdout)


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    choice._refusal.cache_clear()
    yield
    choice._refusal.cache_clear()


@pytest.mark.parametrize("kernels", [None, "auto", "torch"])
@pytest.mark.parametrize("arithmetic", [ExactState, FloatState])
def test_a_cpu_has_torch(monkeypatch, kernels, arithmetic):
    monkeypatch.delenv("MFX_KERNELS", raising=False)
    if kernels:
        monkeypatch.setenv("MFX_KERNELS", kernels)
    assert choose(arithmetic, X) is arithmetic


def test_a_cpu_has_triton_in_the_interpreter_only(monkeypatch, fresh):
    monkeypatch.setenv("MFX_KERNELS", "triton")
    with pytest.raises(MfxError, match=r"interpreter only, if TRITON_INTERPRET=1.*Set MFX_KERNELS=auto"):
        choose(ExactState, X)


def test_unknown_choices_are_refused(monkeypatch):
    monkeypatch.setenv("MFX_KERNELS", "cuda")
    with pytest.raises(MfxError, match="MFX_KERNELS is 'cuda'; it may be one of 'auto', 'torch', 'triton'"):
        choose(ExactState, X)


class Elsewhere:
    """A plain tensor's stand-in on a device that this machine does not have."""

    device = torch.device("cuda", 0)


def elsewhere(monkeypatch, try_on):
    from mfx.engine.arithmetic import triton_states

    monkeypatch.setattr(choice, "compiles_for", lambda device: True)
    monkeypatch.setattr(choice, "is_single", lambda x: True)
    monkeypatch.setattr(triton_states, "try_on", try_on)
    return triton_states


def test_a_gpu_has_triton(monkeypatch, fresh):
    tried = []
    states = elsewhere(monkeypatch, tried.append)
    assert choose(ExactState, Elsewhere()) is states.TritonExactState
    assert choose(FloatState, Elsewhere()) is states.TritonFloatState
    assert tried == [Elsewhere.device]
    monkeypatch.setenv("MFX_KERNELS", "torch")
    assert choose(ExactState, Elsewhere()) is ExactState


def test_where_triton_fails_torch_serves_and_a_warning_says_so(monkeypatch, fresh):
    def fail(device):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    elsewhere(monkeypatch, fail)
    with pytest.warns(UserWarning, match="Triton fails on cuda:0 .*C compiler.*a launch for each"):
        assert choose(ExactState, Elsewhere()) is ExactState
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(ExactState, Elsewhere()) is ExactState  # said once
    monkeypatch.setenv("MFX_KERNELS", "triton")
    with pytest.raises(MfxError, match="C compiler"):
        choose(ExactState, Elsewhere())


@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_where_triton_does_not_compile(monkeypatch, fresh, kernels):
    monkeypatch.setenv("MFX_KERNELS", kernels)
    x = Elsewhere()
    x.device = torch.device("mps")
    monkeypatch.setattr(choice, "is_single", lambda x: True)
    if kernels == "auto":
        assert choose(ExactState, x) is ExactState
    else:
        with pytest.raises(MfxError, match="does not compile for mps"):
            choose(ExactState, x)


def test_importing_mfx_does_not_import_triton():
    code = "import sys, mfx.engine.arithmetic.choice; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# --- compilation without a GPU ----------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def recorded(monkeypatch, run):
    """The kernels that ``run`` launches, with their arguments, each kind of launch once."""
    from mfx.engine.arithmetic import triton_states

    found = {}

    def record(kernel, first, *args, **constants):
        launch = [*args, first.numel()], {**constants, "BLOCK": triton_states._BLOCK}
        found[kernel, tuple(map(type_of, launch[0])), tuple(constants.values())] = (kernel, *launch)

    with monkeypatch.context() as patch:
        patch.setattr(triton_states, "_launch", record)
        run(triton_states)
    return list(found.values())


def type_of(value):
    from triton.runtime.jit import mangle_type

    return "constexpr" if value is None else mangle_type(value)


def there_and_back(state, dtype, kind, gamma, steps):
    """Every kind of launch in a chain's life; nothing is computed."""
    y = torch.empty(2**12, dtype=dtype)
    state.stream()
    state.stream()
    for _ in range(steps):
        state.advance(y, kind, gamma)
    frozen = state.freeze()
    back = frozen.thaw(frozen.tensors)
    for _ in range(steps):
        back.retreat_x()
        back.retreat_v(y, kind, gamma)


@sampling.grid(2, dtype=DTYPES, kind=["residual", "map"], arch=["cuda 80", "cuda 90", "hip gfx942"])
def test_kernels_compile_without_spills(monkeypatch, tmp_path, dtype, kind, arch):
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mfx.engine.arithmetic import triton_states

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    backend, _, number = arch.partition(" ")
    is_cuda = backend == "cuda"
    target = GPUTarget(backend, int(number) if is_cuda else number, 32 if is_cuda else 64)

    def run(states):
        x, wide = torch.empty(2**12, dtype=dtype), torch.float64 if dtype == torch.float64 else torch.float32
        for cls, gamma, steps in (
            (states.TritonExactState, Gamma(9, 10), 40),
            (states.TritonExactState, Gamma(1, 2**14), 6),  # with limbs
            (states.TritonFloatState, Gamma(9, 10), 2),
        ):
            there_and_back(cls.start(x, None, reversible=True), dtype, kind, gamma, steps)
        states.TritonExactState.start(x, x, reversible=True)
        update = UpdateGradients(kind, Gamma(9, 10), Gamma(9, 10), True, (dtype, wide, dtype), wide, True)
        with torch.no_grad():
            update_gradients = states.TritonExactState.gradients
            for gx, gv in ((x, x.to(wide)), (x, None), (None, x.to(wide))):
                update_gradients(update, gx, gv)

    launches = recorded(monkeypatch, run)
    assert len({kernel for kernel, _, _ in launches}) == 7
    for kernel, args, constants in launches:
        names = [parameter.name for parameter in kernel.params]
        types = dict.fromkeys(names, "constexpr") | dict(zip(names, map(type_of, args), strict=False))
        values = {name: constants.get(name) for name, kind in types.items() if kind == "constexpr"}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name].startswith("*")}
        source = ASTSource(kernel, types, {(names.index(name),): value for name, value in values.items()}, aligned)
        compiled = compile_kernel(source, target=target, options=triton_states.OPTIONS)
        assert_counts_in_64_bits(compiled.asm["ttir"])
        if is_cuda:
            assert_not_spilled(compiled.asm["ptx"], number)
            # Two operations of torch round twice: a product and a sum may not become one, but where torch fuses them.
            fuses = {*re.findall(r"fma\.rn\.\w+", compiled.asm["ptx"])}
            assert not fuses or kernel.fn.__name__ in ("float_advance", "float_retreat", "gradients")
        else:
            assert compiled.asm["hsaco"]


def assert_counts_in_64_bits(ttir):
    """The numbers of elements, from that of the program on, and their distances in memory: beyond 2³¹ elements, too."""
    (program,) = re.findall(r"(%\S+) = tt\.get_program_id x", ttir)
    uses = [line for line in ttir.splitlines() if re.search(rf"= .*{program}\b", line)]
    assert uses
    assert all(re.search(r"arith\.extsi .* : i32 to i64", use) for use in uses)
    offsets = re.findall(r"tt\.addptr .* : tensor<.*>, tensor<\d+xi(\d+)>", ttir)
    assert set(offsets) == {"64"}
    assert re.search(r"arith\.cmpi slt, .* : tensor<\d+xi64>", ttir)  # with the number of elements that there are


def assert_not_spilled(ptx, arch):
    import triton

    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    name = re.search(r"\.target (\w+)", ptx)[1]
    command = [str(assembler), "-v", f"--gpu-name={name}", "-o", os.devnull, "/dev/stdin"]
    said = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    assert arch in name
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"]
    assert "0 bytes stack frame" in said
