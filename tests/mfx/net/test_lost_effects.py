"""Hooks on inner modules fire where the module is called as a whole; elsewhere there is one warning."""

import pytest
import torch
from torch import nn

import mfx
from tests.mfx.models import ConvNet, Stack, images, inputs

INNER = ["embed", "blocks.0.mix", "blocks.1.mlp", "blocks.1.mlp.act", "head", ""]


def register(module: nn.Module, seen: list[str]) -> None:
    module.register_forward_pre_hook(lambda *_: seen.append("pre"))
    module.register_forward_hook(lambda *_: seen.append("forward"))
    module.register_full_backward_pre_hook(lambda *_: seen.append("backward pre"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))


def once(seen: list[str]) -> list[str]:
    """Forward hooks inside a branch fire twice."""
    return sorted(set(seen))


@pytest.mark.filterwarnings("ignore:.*which have backward hooks, too")
@pytest.mark.parametrize("path", INNER)
@pytest.mark.parametrize("when", ["before", "after", "later"])
def test_hooks_fire(path, when):
    model, seen = Stack(), []
    if when == "before":
        register(model.get_submodule(path), seen)
    net = mfx.momentumize(model)
    if when == "later":
        net(inputs()).sum().backward()
    if when != "before":
        register(net.get_submodule(path), seen)
    net(inputs(requires_grad=True)).sum().backward()
    assert once(seen) == ["backward", "backward pre", "forward", "pre"]
    assert seen.count("forward") == (2 if path.startswith("blocks") else 1)
    assert seen.count("backward") == 1


def test_hooks_on_a_block_that_is_one_step():
    net, seen = mfx.momentumize(ConvNet()), []
    register(net.layers[1], seen)
    with pytest.warns(UserWarning, match="which have backward hooks, too") as warned:
        net(images()).sum().backward()
    assert len(warned) == 1
    assert once(seen) == ["backward", "backward pre", "forward", "pre"]


def test_hooks_see_and_change_values():
    model = Stack()
    net = mfx.momentumize(model, gamma=0.0)
    for each in (model, net):
        each.blocks[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)
        each.blocks[0].mix.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    y, expected = net(inputs()), model(inputs())
    assert torch.equal(y, expected)


def test_removed_hooks_are_gone():
    net, seen = mfx.momentumize(Stack()), []
    handle = net.blocks[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    net(inputs())
    handle.remove()
    net(inputs())
    assert seen == [1]


SPANNING = r"hooks on blocks.1 will not run: .*Put the hooks on modules inside a branch"


def test_one_warning_for_hooks_on_containers_before():
    model = Stack()
    model.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=SPANNING) as caught:
        net = mfx.momentumize(model)
    assert len(caught) == 1
    net(inputs())
    net.eval()(inputs())


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize("called", [True, False])
def test_one_warning_for_hooks_on_containers_after(kind, called):
    net = mfx.momentumize(Stack())
    if called:
        net(inputs())
    getattr(net.blocks[1], f"register_{kind}")(lambda *_: None)
    with pytest.warns(UserWarning, match=SPANNING) as caught:
        net(inputs())
    assert len(caught) == 1
    net(inputs())
    net.eval()(inputs())


def test_one_warning_for_many_containers():
    net = mfx.momentumize(Stack(depth=6))
    for block in net.blocks:
        block.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"blocks.0, blocks.1, blocks.2, blocks.3 and 2 more") as caught:
        net(inputs())
    assert len(caught) == 1


class Recorder:
    """Somebody's object with a method for a hook, and something in it that has no copy."""

    def __init__(self) -> None:
        self.seen: list[torch.Size] = []
        self.source = (i for i in range(3))

    def note(self, module, args, output) -> None:
        self.seen.append(output.shape)

    __call__ = note


@pytest.mark.parametrize("method", ["note", "__call__", "itself"])
def test_hooks_of_other_objects_stay_theirs(method):
    recorder, model = Recorder(), Stack()
    model.blocks[0].mlp.register_forward_hook(recorder if method == "itself" else getattr(recorder, method))
    mfx.momentumize(model)(inputs())
    assert recorder.seen == [(2, 8)]


class Counting(Stack):
    """A hook that is a method of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.blocks[0].mlp.register_forward_hook(self.tally)

    def tally(self, module, args, output) -> None:
        self.count += 1


def test_hooks_of_the_model_belong_to_the_net():
    model = Counting()
    net = mfx.momentumize(model)
    net(inputs())
    assert (net.count, model.count) == (1, 0)


class Noting(Stack):
    """Returns what hooks of its own, which it registers at the first call, have noted."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[torch.Tensor] = []
        self.is_ready = False

    def write_down(self, module, args, output) -> None:
        self.noted.append(output.detach().clone())

    def forward(self, x):
        if not self.is_ready:
            for block in self.blocks:
                block.mlp.register_forward_hook(self.write_down)
            self.is_ready = True
        self.noted.clear()
        y = super().forward(x)
        return y, torch.stack(self.noted) if self.noted else None


@pytest.mark.parametrize("is_called_before", [False, True])
def test_a_model_reads_what_its_own_hooks_noted(is_called_before):
    """A symbolic trace runs no hooks of inner modules, and would find nothing noted for ever."""
    model, x = Noting(), inputs()
    if is_called_before:
        model(x)
    net = mfx.momentumize(model, gamma=0.0)
    for _ in range(2):
        assert all(map(torch.equal, net(x), model(x)))
    assert mfx.explain(net).chains
    with pytest.raises(mfx.MfxError, match=r"Noting has forward hooks of its own on blocks\.0\.mlp"):
        mfx.momentumize(model, capture="symbolic")(x)
