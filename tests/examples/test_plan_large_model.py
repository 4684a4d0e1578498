import pytest
import torch

pytest.importorskip("matplotlib")

from examples import plan_large_model


def test_it_prints_plans_and_draws_them(tmp_path, capsys):
    options = ["--memory", "3MiB", "--gpus", "4", "--png", str(tmp_path / "{}.png")]
    plans = plan_large_model.main(["--quick", *options])
    assert [plan.model for plan in plans] == ["Llama", "ViT"]
    for plan in plans:
        assert (tmp_path / f"{plan.model}.png").read_bytes().startswith(b"\x89PNG")
        ways = {way.name: way for way in plan.ways}
        plain, momentum = ways["plain"], ways["gamma=0.9"]
        assert momentum.kept < 0.5 * plain.kept
        assert momentum.peak < plain.peak
        assert momentum.batch > plain.batch > 0
    printed = capsys.readouterr().out
    assert all(str(plan) in printed for plan in plans)


@pytest.mark.parametrize("number, parameters", [(0, 70.55e9), (1, 21.74e9)], ids=["Llama-70B", "ViT-22B"])
def test_the_models_have_the_published_sizes(number, parameters):
    plan = plan_large_model.large_models(128, None)[number]
    with torch.device("meta"):
        model = plan.build()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-2)


def test_rotary_positions_see_distances_only():
    torch.manual_seed(0)
    rotate = plan_large_model.Attention(16, 2, 2, 12, causal=True).rotate
    q, k = torch.randn(8).expand(1, 1, 12, 8), torch.randn(8).expand(1, 1, 12, 8)
    scores = (rotate(q) @ rotate(k).transpose(-1, -2))[0, 0]
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
