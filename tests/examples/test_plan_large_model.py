import pytest
import torch

pytest.importorskip("matplotlib")

from examples import plan_large_model


def test_it_runs_and_prints_a_table(tmp_path, capsys):
    png = tmp_path / "a.png"
    options = ["--gamma", "0.9", "--memory", "0.001", "--gpus", "4", "--png", str(png)]
    rows = plan_large_model.main(["--quick", *options])
    assert png.read_bytes().startswith(b"\x89PNG")
    assert [(row.model, row.variant) for row in rows] == [
        ("Llama", "plain"),
        ("Llama", "gamma=0.9"),
        ("ViT", "plain"),
        ("ViT", "gamma=0.9"),
    ]
    for plain, momentum in zip(rows[::2], rows[1::2], strict=True):
        assert momentum.kept < 0.5 * plain.kept
        assert momentum.peak < plain.peak
        assert 1 < momentum.flops < 4 / 3
        assert momentum.sharded == plain.sharded
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 5
    assert [line.endswith("does not fit") for line in printed.out.splitlines()[1:]] == [
        row.total > 0.001 * plan_large_model.GIB for row in rows
    ]
    assert "100%" in printed.err  # the progress bar


@pytest.mark.parametrize("number, parameters", [(0, 70.55e9), (1, 21.74e9)], ids=["Llama-70B", "ViT-22B"])
def test_the_models_have_the_published_sizes(number, parameters):
    plan = plan_large_model.plans(128, None)[number]
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
