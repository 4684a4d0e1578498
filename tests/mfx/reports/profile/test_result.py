"""A profile as text, as data, as a page's table, as a picture."""

import json
import sys

import pytest

import mfx
from mfx.reports.profile.rows import ProfileRow

GIB = 2**30


def row(name, kept, peak, seconds, flops, *notes):
    line = ((0.0, 0), (0.5, kept), (0.6, peak), (1.0, 4))
    return ProfileRow(name, kept, peak, 2 * peak, seconds, flops, line, 0.5, *notes)


@pytest.fixture
def found():
    rows = (
        row("plain", 4 * GIB, 5 * GIB, 2.5, 3_000_000_000_000),
        row("<mine>", 1024, 1536, 0.05, 4_000_000_000_000, "a & b " + "word " * 40),
    )
    return mfx.Profile("Net", "cpu", 3, rows, ("a.0",), (("checkpoint", "CheckpointError: other sizes"),))


def test_the_table_has_a_line_per_variant_with_ratios_to_the_first(found):
    lines = found.table().splitlines()
    assert lines[0] == "Net, one training step on cpu; ratios are to plain"
    header, plain, mine = lines[2:5]
    assert header.split() == ["variant", "kept", "peak", "whole", "time", "FLOPs"]
    assert " ".join(plain.split()) == "plain 4.0 GiB 1.00× 5.0 GiB 1.00× 10.0 GiB 1.00× 2.50 s 1.00× 3 TFLOP 1.00×"
    assert " ".join(mine.split()) == "<mine> 1.0 KiB 0.00× 1.5 KiB 0.00× 3.0 KiB 0.00× 50.0 ms 0.02× 4 TFLOP 1.33×"
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "checkpoint: not measured: CheckpointError: other sizes"
    assert str(found) == found.table()


def test_a_first_variant_that_keeps_nothing_has_no_ratios():
    found = mfx.Profile("Net", "cpu", 1, (row("nothing", 0, 0, 0.1, 0),))
    assert " ".join(found.table().splitlines()[3].split()) == "nothing 0 B – 0 B – 0 B – 100.0 ms 1.00× 0 FLOP –"


def test_the_largest_tensor_is_named_once_for_variants_that_share_it():
    rows = [row(name, 1, 2, 0.1, 3, "", largest) for name, largest in (("a", "5 B"), ("b", "7 B"), ("c", "5 B"))]
    lines = mfx.Profile("Net", "cpu", 1, tuple(rows)).table().splitlines()
    assert "largest at the peak (a, c): 5 B" in lines
    assert "largest at the peak (b): 7 B" in lines


def test_as_data_it_survives_json(found):
    data = json.loads(json.dumps(found.to_dict()))
    assert data == found.to_dict()
    assert [r["name"] for r in data["rows"]] == ["plain", "<mine>"]
    assert data["rows"][0]["timeline"] == [[0.0, 0], [0.5, 4 * GIB], [0.6, 5 * GIB], [1.0, 4]]
    assert data["wrapped"] == ["a.0"]
    assert data["skipped"] == [{"name": "checkpoint", "reason": "CheckpointError: other sizes"}]


def test_on_a_page_names_are_escaped(found):
    page = found._repr_html_()
    assert "&lt;mine&gt;" in page
    assert "<mine>" not in page
    assert page.count("<tr>") == 3


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_has_a_line_per_variant(found, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"profile.{suffix}"
    figure = found.plot(file)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "plain: peak 5.0 GiB",
        "<mine>: peak 1.5 KiB",
    ]
    (line,) = (line for line in axes.lines if line.get_label().startswith("plain"))
    assert list(line.get_ydata()) == [0, 4096, 5120, 4 / 2**20]
    assert file.stat().st_size > 1000
    with pytest.raises(mfx.MfxError, match=r"Profile.plot saves .* files; call the file steps.png, not .*steps.txt"):
        found.plot(tmp_path / "steps.txt")


def test_without_matplotlib_a_plot_says_what_to_install(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(mfx.MfxError, match=r"pip install 'mfx\[report\]'"):
        found.plot()


def test_the_progress_bar_is_left_out_without_tqdm(monkeypatch, capsys):
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(2, 2))
    monkeypatch.setitem(sys.modules, "tqdm", None)
    mfx.profile(model, torch.ones(2, 2), against="plain", repeats=1, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    pytest.importorskip("tqdm")
    mfx.profile(model, torch.ones(2, 2), against="plain", repeats=1, progress=True)
    assert "mfx.profile: timing" in capsys.readouterr().err
