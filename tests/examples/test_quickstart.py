import pytest
import torch

pytest.importorskip("vit_pytorch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples import quickstart


def test_it_runs_and_prints_a_table(tmp_path, capsys):
    png = tmp_path / "a.png"
    rows = quickstart.main(["--tiny", "--png", str(png)])
    assert png.read_bytes().startswith(b"\x89PNG")
    assert [row.variant for row in rows] == ["plain", "momentum"] * 2
    assert all(0 <= row.accuracy <= 1 and row.peak > 0 and row.seconds > 0 for row in rows)
    printed = capsys.readouterr()
    assert printed.out.count("ratio") == 2
    assert "ViT, 2 layers, momentum: 100%" in printed.err  # the progress bar


def test_momentum_takes_less_memory_where_the_model_is_deep():
    task = quickstart.Task("ViT", lambda: quickstart.vit(12), steps=1, lr=1e-3, batch=32)
    plain = quickstart.measure(task, "plain", lambda model: model)
    momentum = quickstart.measure(task, "momentum", quickstart.mfx.momentumize)
    assert momentum.peak < 0.5 * plain.peak


def test_plain_and_momentum_start_from_the_same_weights_and_see_the_same_batches():
    seen = []

    def watch(model):
        before = [p.detach().clone() for p in model.parameters()]
        model.register_forward_pre_hook(lambda _, args: seen.append((before, args[0])))
        return model

    for variant in ("plain", "momentum"):
        quickstart.measure(quickstart.TINY[1], variant, watch)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for (weights, x), (other_weights, other_x) in zip(first, second, strict=True):
        assert torch.equal(x, other_x)
        assert all(torch.equal(w, o) for w, o in zip(weights, other_weights, strict=True))


def test_the_digits_are_split_without_overlap():
    images, labels = quickstart.digits()
    assert images.shape == (1797, 1, 8, 8)
    assert labels.shape == (1797,)
    assert images.min() == 0
    assert images.max() == 1
    assert len(labels) > quickstart.TRAIN_SIZE
