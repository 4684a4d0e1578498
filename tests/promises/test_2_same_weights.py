"""A net has the model's tensors, keys, class, methods and attributes, and copies as the model does."""

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import mfx
from tests.mfx.models import Block, ConvNet, Stack, assert_reversible, images, inputs, stack_recurrence
from tests.sampling import grid, sampled

# --- the net in place of the model ------------------------------------------------------------------------------------


def picture(model: nn.Module) -> dict[str, object]:
    """Everything about a model that momentumize could disturb."""
    return {
        path: (
            type(module),
            module.training,
            list(module.__dict__),
            {k: id(v) for k, v in module.__dict__.items() if not k.startswith("_") and k != "training"},
            [(k, id(v)) for k, v in (*module._parameters.items(), *module._buffers.items(), *module._modules.items())],
            [dict(v) for k, v in module.__dict__.items() if k.endswith("_hooks")],
        )
        for path, module in model.named_modules()
    }


class WithConstant(Stack):
    def forward(self, x):
        return super().forward(x * torch.tensor([1.0, 2.0] * 4))


class WithMarks(Stack):
    calls = 0

    def forward(self, x):
        self.calls += 1
        self.seen = x
        return super().forward(x)


@pytest.mark.parametrize("build", [Stack, WithConstant])
def test_the_original_stays_as_it_was(build):
    model = build()
    model.blocks[1].eval()
    model.blocks[0].mlp.register_forward_hook(lambda *_: None)
    x, before = inputs(), picture(model)
    expected, tensors = model(x), copy.deepcopy(model.state_dict())
    net = mfx.momentumize(model)
    mfx.explain(model, x)
    mfx.graphs(net)
    net.eval()
    net(x)
    net.train()
    net(x)
    assert picture(model) == before
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(model.state_dict(), tensors, rtol=0, atol=0)


def test_class_attributes_and_methods():
    model = Stack()
    net = mfx.momentumize(model)
    assert type(net) is Stack
    assert isinstance(net, Stack)
    assert net is not model
    assert net.describe() == "3 blocks, kept"
    assert inspect.signature(net.forward) == inspect.signature(model.forward)
    assert net.forward.__name__ == "forward"


def test_modules_are_distinct_and_tensors_shared():
    model = ConvNet()
    net = mfx.momentumize(model)
    assert [p for p, _ in net.named_modules()] == [p for p, _ in model.named_modules()]
    assert [n for n, _ in net.named_children()] == [n for n, _ in model.named_children()]
    assert not set(net.modules()) & set(model.modules())
    for mine, theirs in zip((*net.parameters(), *net.buffers()), (*model.parameters(), *model.buffers()), strict=True):
        assert mine is theirs


def test_state_dict_is_the_originals_and_loads_both_ways():
    model = ConvNet()
    net = mfx.momentumize(model)
    net(images()).sum().backward()
    mine, theirs = net.state_dict(), model.state_dict()
    assert list(mine) == list(theirs)
    assert mine._metadata.keys() == theirs._metadata.keys()
    fresh, fresh_net = ConvNet(), mfx.momentumize(ConvNet())
    fresh.load_state_dict(mine, strict=True)
    fresh_net.load_state_dict(theirs, strict=True)
    assert torch.equal(fresh_net.eval()(images()), net.eval()(images()))


def test_apply_reaches_every_module_once():
    seen = []
    net = mfx.momentumize(Stack())
    net.apply(seen.append)
    assert set(map(id, seen)) == set(map(id, net.modules()))
    assert len(seen) == len(list(net.modules()))


def test_parameters_that_no_graph_mentions_are_kept():
    model = Stack()
    assert mfx.momentumize(model).unused is model.unused


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_another_dtype(dtype):
    net = mfx.momentumize(Stack())
    net(inputs())
    y = net.to(dtype)(inputs(dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    tolerance = 1e-7 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(y, stack_recurrence(net, inputs(dtype=dtype), 0.9), rtol=tolerance, atol=tolerance)


def test_meta_device():
    net = mfx.momentumize(Stack()).to("meta")
    assert net(inputs(device="meta")).device.type == "meta"


def test_freezing():
    net = mfx.momentumize(Stack())
    net.blocks.requires_grad_(False)
    net.blocks[1].mlp.fc1.weight.requires_grad_(True)
    net(inputs()).sum().backward()
    with_grad = {name for name, p in net.named_parameters() if p.grad is not None}
    assert with_grad == {"embed.weight", "embed.bias", "head.weight", "head.bias", "blocks.1.mlp.fc1.weight"}


def test_inside_a_bigger_module():
    net = mfx.momentumize(Stack())
    outer = nn.Sequential(nn.Linear(8, 8), net, nn.Linear(3, 1))
    outer(inputs()).sum().backward()
    assert outer[0].weight.grad is not None
    assert torch.equal(outer[1](inputs()), net(inputs()))
    assert list(outer.state_dict())[2:-2] == [f"1.{key}" for key in net.state_dict()]


def test_a_sequential_as_root():
    net = mfx.momentumize(nn.Sequential(Block(), Block()), gamma=0.0)
    assert type(net) is nn.Sequential
    assert len(net) == 2
    assert torch.equal(net(inputs()), nn.Sequential(*net)(inputs()))


def test_nothing_holds_on_to_a_deleted_net():
    net = mfx.momentumize(Stack())
    net(inputs()).sum().backward()
    mfx.graphs(net)
    refs = [weakref.ref(module) for module in net.modules()]
    del net
    gc.collect()
    assert [ref() for ref in refs if ref() is not None] == []


def test_a_net_sets_what_forward_sets_beside_its_result():
    net = mfx.momentumize(WithMarks())
    assert not hasattr(net, "seen")
    net(inputs())
    assert net.calls == 1
    assert torch.equal(net.seen, inputs())
    with pytest.raises(mfx.MfxError, match=r"WithMarks.forward changes calls, seen beside its result"):
        mfx.momentumize(WithMarks(), capture="symbolic")


def test_a_model_that_cannot_be_copied():
    model = Stack()
    model.note = (line for line in "ab")
    with pytest.raises(mfx.MfxError, match=r"Stack cannot be copied: TypeError: .*generator.*deepcopy"):
        mfx.momentumize(model)


def test_tensors_that_are_plain_attributes_are_shared():
    model = Stack()
    model.table = torch.ones(3)
    model.tables = {"a": [torch.ones(2)]}
    model.teacher = [nn.Linear(2, 2)]
    net = mfx.momentumize(model)
    assert net.table is model.table
    assert net.tables["a"][0] is model.tables["a"][0]
    assert net.teacher[0].weight is model.teacher[0].weight


class WithSlots(Stack):
    @property
    def depth(self) -> int:
        return len(self.blocks)

    def forward(self, x):
        return super().forward(x) * self.depth


def test_properties():
    model = WithSlots()
    net = mfx.momentumize(model, gamma=0.0)
    assert net.depth == 3
    assert torch.equal(net(inputs()), model(inputs()))


# --- copies -----------------------------------------------------------------------------------------------------------


def through_torch_save(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda net: pickle.loads(pickle.dumps(net)), "save": through_torch_save}
copies = pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)


@grid(6, make_copy=COPIES, training={"train": True, "eval": False}, called={"called": True, "fresh": False})
def test_a_copy_computes_the_same_and_recomputes(make_copy, training, called):
    net = mfx.momentumize(Stack()).train(training)
    if called:
        net(inputs()).sum().backward()
    expected = net(inputs()).detach() if called else None
    copied = make_copy(net)
    expected = net(inputs()).detach() if expected is None else expected
    del net
    gc.collect()
    assert type(copied) is Stack
    assert copied.training is training
    assert torch.equal(copied(inputs()), expected)
    assert_reversible(copied, copied.blocks[0].mix, inputs())
    assert "momentum_blocks" in copied.code


@copies
def test_a_copy_is_independent(make_copy):
    net = mfx.momentumize(Stack())
    expected = net(inputs())
    copied = make_copy(net)
    assert not set(map(id, copied.parameters())) & set(map(id, net.parameters()))
    with torch.no_grad():
        for p in copied.parameters():
            p.add_(1.0)
    copied.blocks[0].mix = torch.nn.Identity()
    copied.eval()
    assert net.training
    assert torch.equal(net(inputs()), expected)
    mine = {id(module) for module in net.modules()}
    theirs = {id(module) for graph in mfx.graphs(copied).values() for module in graph.modules()}
    assert not mine & theirs


def test_a_copy_made_within_original_is_a_momentum_net():
    net = mfx.momentumize(Stack())
    expected = net(inputs())
    with mfx.original(net):
        copied = copy.deepcopy(net)
    assert torch.equal(copied(inputs()), expected)


class Line(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))

    def forward(self, x):
        for fc in self.fcs:
            x = x + 1e-3 * fc(x)
        return x


@pytest.fixture(scope="module")
def long_net():
    net = mfx.momentumize(Line(1000))
    net(torch.ones(1, 2))
    return net


@sampled("make_copy", COPIES, 1)
def test_a_thousand_blocks(make_copy, long_net):
    copied = make_copy(long_net)
    assert torch.equal(copied(torch.ones(1, 2)), long_net(torch.ones(1, 2)))
