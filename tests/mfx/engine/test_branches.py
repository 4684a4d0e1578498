"""Branches that do what a recomputation cannot cope with: said, or an error."""

import warnings

import pytest
import torch

from mfx.modules.state_lock import StateLock
from mfx_passes.errors import MfxError
from tests.mfx.engine.chains import WIDTH, make_root, make_steps, run

CASES = [{"gamma": 0.9}, {"gamma": 0.9, "arithmetic": "float"}, {"gamma": 0.9, "memory_budget": 1.0}]


def halves_its_input(block, x):
    y = block(x)
    with torch.no_grad():
        x.detach().mul_(0.5)
    return y


@pytest.mark.parametrize("how", CASES, ids=str)
def test_a_branch_that_writes_into_the_stream_is_an_error(how):
    root = make_root(3)
    x = torch.randn(2, WIDTH, requires_grad=True)
    with pytest.raises(MfxError, match=r"chain blocks, step blocks\.0: the branch writes into the stream"):
        run(root, make_steps(root, call=halves_its_input), x * 1, **how)


@pytest.mark.parametrize("how", [{"gamma": 0.0}, *CASES], ids=str)
def test_accounts_between_forward_and_backward_hooks_are_warned_of_once(how):
    """As in opacus: the forward hook opens an account that the backward hook closes."""
    root, opened = make_root(3), []
    for block in root.blocks:
        block[1].register_forward_hook(lambda *_: opened.append(1))
        block[1].register_full_backward_hook(lambda *_: opened.pop() and None)
    lock = StateLock()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            run(root, make_steps(root), torch.randn(2, WIDTH), lock=lock, **how).x.sum().backward()
    if how.get("memory_budget") == 1.0:
        assert not caught
        assert not opened
    else:
        (warning,) = caught
        assert "hooks on Linear" in str(warning.message)
        assert "memory_budget=1.0" in str(warning.message)
        assert opened


@pytest.mark.parametrize("how", CASES, ids=str)
def test_hooks_around_the_forward_alone_are_no_news(how):
    root = make_root(3)
    root.blocks[0].register_forward_hook(lambda *_: None)
    root.blocks[1].register_full_backward_hook(lambda *_: None)
    run(root, make_steps(root), torch.randn(2, WIDTH), **how).x.sum().backward()
