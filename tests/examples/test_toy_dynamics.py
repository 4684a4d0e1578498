import pytest
import torch
from tqdm import tqdm

pytest.importorskip("matplotlib")

from examples import toy_dynamics


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    png = tmp_path_factory.mktemp("toy") / "a.png"
    results = toy_dynamics.main(["--layers", "8", "--steps", "60", "--png", str(png)])
    assert png.read_bytes().startswith(b"\x89PNG")
    return results


def crosses(result):
    """True if the order of the points on the line changes."""
    return bool((result.states[..., 0].diff(dim=1) <= 0).any())


def test_a_resnet_keeps_the_order_of_points_and_is_no_better_than_a_constant(results):
    resnet, momentum = results["line"]["ResNet"], results["line"]["momentum net"]
    assert not crosses(resnet)
    # The best increasing fit to a decreasing function is its mean, 0; the error is then that of x⁶.
    constant = torch.linspace(-1, 1, 101).pow(6).mean().item()
    assert resnet.score >= constant * (1 - 1e-5)
    assert crosses(momentum)
    assert momentum.score < constant / 2


def test_functions_are_bounded():
    torch.manual_seed(0)
    function = toy_dynamics.Bounded(2)
    with torch.no_grad():
        function.inner.weight *= 100
    x = torch.randn(1000, 2)
    moved = (function(x[1:]) - function(x[:-1])).norm(dim=1)
    assert (moved <= toy_dynamics.LIPSCHITZ * (x[1:] - x[:-1]).norm(dim=1) + 1e-6).all()


def test_states_are_those_of_the_network(results):
    torch.manual_seed(0)
    with tqdm(disable=True) as bar:
        result = toy_dynamics.separate(0.9, 3, 1, bar)
    assert result.states.shape == (4, 400, 2)
    assert torch.equal(result.states[0], toy_dynamics.rings(400)[0])
    assert set(results["rings"]) == {"ResNet", "momentum net"}
