import pytest
import torch
from torch import nn

pytest.importorskip("vit_pytorch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import mfx
from examples import own_pass


def test_it_runs(tmp_path, capsys):
    png = tmp_path / "a.png"
    curves = own_pass.main(["--depth", "2", "--steps", "2", "--png", str(png)])
    assert png.read_bytes().startswith(b"\x89PNG")
    assert [len(curve) for curve in curves.values()] == [4, 4, 4]
    assert capsys.readouterr().out.startswith("before training")


def test_every_residual_step_is_found_and_the_function_stays():
    model = own_pass.vit(3).eval()
    x = torch.randn(2, 1, 8, 8)
    paths = [step.path for chain in mfx.explain(model).chains for step in chain.steps]
    assert list(own_pass.shares(model, x)) == paths
    measured = own_pass.with_modules(model, lambda step, _: own_pass.Measured(step.path))
    assert torch.equal(measured(x), model(x))


def test_what_is_measured_is_the_branch():
    class Twice(nn.Module):
        def forward(self, x):
            return x + 2 * x.tanh()

    x = torch.ones(1, 2, 3)
    graph = own_pass.with_modules(nn.Sequential(Twice(), Twice()), lambda step, _: own_pass.Measured(step.path))
    graph(x)
    first, second = (module.share for module in graph.modules() if isinstance(module, own_pass.Measured))
    assert first == pytest.approx(2 * torch.ones(()).tanh().item())
    assert second < first


def test_a_dropped_branch_leaves_the_stream_as_it_is():
    dropped = own_pass.Dropped(1 - 1e-9).train()
    f, x = torch.randn(2, 8, 4, 3)
    assert dropped(f, x).count_nonzero() == 0
    assert torch.equal(dropped.eval()(f, x), f)
    torch.manual_seed(0)
    kept = own_pass.Dropped(0.5)(f, x)
    assert all(torch.equal(row, 2 * given) or not row.any() for row, given in zip(kept, f, strict=True))
