"""Models as people write them, in float64, against the recurrence v ← γ·v + (1−γ)·f(x), x ← x + v written by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mfx
from tests.models.judge import Case, judge, judged
from tests.models.step import assert_bit_equal, identity_adds, is_identity, loss_of, train_step
from tests.oracles import assert_close_grads, grads, momentum_reference

GAMMA = 0.9
STEPS = 4


def mlp(width=8):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width))


# Each has ``functions``, one per step in order; ``kind`` says what they are to the recurrence. ``before`` and ``after``
# are what the model does around its chain.


class Hand(nn.Module):
    kind = "residual"
    shape = (3, 5, 8)

    def before(self, x):
        return x

    def after(self, x):
        return x


class Loop(Hand):
    """A Python loop over a ModuleList, a conditional on a constant, layers in front and behind."""

    def __init__(self, flip=True):
        super().__init__()
        self.stem, self.head, self.flip = nn.Linear(8, 8), nn.Linear(8, 3), flip
        self.blocks = nn.ModuleList(mlp() for _ in range(STEPS))

    def forward(self, x, scale=None):
        x = self.stem(x)
        if scale is not None:
            x = x * scale
        for i, block in enumerate(self.blocks):
            if self.flip and i % 2:
                x = block(x) + x
            else:
                x = x + block(x)
        return self.head(x)

    before = property(lambda self: self.stem)
    after = property(lambda self: self.head)
    functions = property(lambda self: list(self.blocks))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Parallel(Hand):
    """x + attn(x) + mlp(x), as in GPT-J."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleList(Attention() for _ in range(STEPS))
        self.mlp = nn.ModuleList(mlp() for _ in range(STEPS))

    def forward(self, x):
        for attn, mlp in zip(self.attn, self.mlp, strict=True):
            x = x + attn(x) + mlp(x)
        return x

    @property
    def functions(self):
        return [lambda x, a=a, m=m: a(x) + m(x) for a, m in zip(self.attn, self.mlp, strict=True)]


class LayerScale(Hand):
    """x + λ·f(x), with a vector λ (CaiT) and with a scalar that begins at 0 (ReZero)."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(mlp() for _ in range(STEPS))
        self.scales = nn.ParameterList(
            [nn.Parameter(torch.rand(8) if i % 2 else torch.tensor(0.3)) for i in range(STEPS)]
        )

    def forward(self, x):
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = x + scale * block(x)
        return x

    @property
    def functions(self):
        return [lambda x, b=b, s=s: s * b(x) for b, s in zip(self.blocks, self.scales, strict=True)]


class PostNorm(Hand):
    """LayerNorm after the sum: every step is a map."""

    kind = "map"

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(mlp() for _ in range(STEPS))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(STEPS))

    def forward(self, x):
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(x + block(x))
        return x

    @property
    def functions(self):
        return [lambda x, b=b, n=n: n(x + b(x)) for b, n in zip(self.blocks, self.norms, strict=True)]


class PreActivation(nn.Module):
    """ResNet v2: norm, ReLU in place, convolution."""

    def __init__(self):
        super().__init__()
        self.bn, self.relu, self.conv = nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1)

    def branch(self, x):
        return self.conv(self.relu(self.bn(x)))

    def forward(self, x):
        out = self.branch(x)
        out += x
        return out


class PreActivationResNet(Hand):
    shape = (4, 8, 6, 6)

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(8, 8, 1), nn.Sequential(*(PreActivation() for _ in range(STEPS)))

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((2, 3))

    before = property(lambda self: self.stem)
    functions = property(lambda self: [block.branch for block in self.blocks])

    def after(self, x):
        return x.mean((2, 3))


class ActivatedSkip(Hand):
    """relu(x, inplace=True) + conv(relu(x)): what is carried on is relu(x), so relu belongs to the step."""

    kind = "map"
    shape = (4, 8, 6, 6)

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(STEPS))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(x * 1)
        for conv in self.convs:
            x = self.relu(x + conv(x))
        return x

    def before(self, x):
        return x.relu()

    @property
    def functions(self):
        return [lambda x, c=c: (x + c(x)).relu() for c in self.convs]


class Shared(Hand):
    """One block, run again and again (a recurrent depth)."""

    def __init__(self):
        super().__init__()
        self.block = mlp()

    def forward(self, x):
        for _ in range(STEPS):
            x = x + self.block(x)
        return x

    functions = property(lambda self: [self.block] * STEPS)


class Dictionaries(Hand):
    """Blocks that take keyword arguments and return dictionaries."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = mlp()

        def forward(self, hidden, *, mask=None, scale: float = 1.0):
            update = self.mlp(hidden) * scale
            return {"hidden": hidden + (update if mask is None else update * mask), "norm": update.norm()}

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(STEPS))

    def forward(self, x):
        out = {"hidden": x}
        for block in self.blocks:
            out = block(hidden=out["hidden"], scale=0.5)
        return out["hidden"]

    @property
    def functions(self):
        return [lambda x, b=b: 0.5 * b.mlp(x) for b in self.blocks]


class Encoder(Hand):
    """nn.TransformerEncoderLayer in a loop; dropout is drawn by the layers, so none here."""

    def __init__(self, norm_first=True):
        super().__init__()
        self.norm_first, self.kind = norm_first, "residual" if norm_first else "map"
        self.layers = nn.ModuleList(self.layer() for _ in range(STEPS))

    def layer(self):
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=self.norm_first)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    @property
    def functions(self):
        return [f for layer in self.layers for f in self.steps_of(layer)]

    def steps_of(self, layer):
        attention = lambda x: layer._sa_block(x, None, None)  # noqa: E731
        if self.norm_first:
            return [lambda x: attention(layer.norm1(x)), lambda x: layer._ff_block(layer.norm2(x))]
        return [lambda x: layer.norm1(x + attention(x)), lambda x: layer.norm2(x + layer._ff_block(x))]


class TransformerEncoder(Encoder):
    """nn.TransformerEncoder itself."""

    def __init__(self):
        super().__init__(norm_first=False)
        self.encoder = nn.TransformerEncoder(self.layer(), STEPS, enable_nested_tensor=False)
        self.layers = self.encoder.layers

    def forward(self, x):
        return self.encoder(x)


class Decoder(Hand):
    """nn.TransformerDecoderLayer reads a memory beside the stream: a capture of every second step."""

    def __init__(self):
        super().__init__()
        self.memory = nn.Parameter(torch.randn(3, 4, 8))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True) for _ in range(STEPS)
        )

    def forward(self, x):
        memory = self.memory.tanh()
        for layer in self.layers:
            x = layer(x, memory)
        return x

    @property
    def functions(self):
        return [f for layer in self.layers for f in self.steps_of(layer)]

    def steps_of(self, layer):
        return [
            lambda x: layer._sa_block(layer.norm1(x), None, None),
            lambda x: layer._mha_block(layer.norm2(x), self.memory.tanh(), None, None),
            lambda x: layer._ff_block(layer.norm3(x)),
        ]


HAND_WRITTEN = [
    Loop,
    Parallel,
    LayerScale,
    PostNorm,
    PreActivationResNet,
    ActivatedSkip,
    Shared,
    Dictionaries,
    Encoder,
    lambda: Encoder(norm_first=False),
    TransformerEncoder,
    Decoder,
]
NAMES = [
    "loop",
    "parallel",
    "layer_scale",
    "post_norm",
    "pre_activation",
    "activated_skip",
    "shared",
    "dictionaries",
    "encoder",
    "encoder_post_norm",
    "nn_encoder",
    "decoder",
]

# Relative. Float: rounding of order eps in a network whose states and branches are of order 1, divided by γ a step in
# the backward pass: 2⁻⁵²·γ^(−12) = 8e-16, summed over up to 100 values an output. Exact: the floor of 40 fraction bits
# propagated by T = 12 steps, n·2⁻⁴⁰·T^1.5 = 3.4e-10, times a condition number of these networks of up to 10.
BOUNDS = {"float": 1e-12, "exact": 3.4e-9}


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
@pytest.mark.parametrize("make", HAND_WRITTEN, ids=NAMES)
def test_the_recurrence(make, arithmetic):
    torch.manual_seed(0)
    model = make().double().train()
    x = torch.randn(model.shape, dtype=torch.float64)
    net = mfx.momentumize(model, gamma=GAMMA, arithmetic=arithmetic, verify="raise")
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [len(model.functions)]

    expected = model.after(momentum_reference(model.functions, model.before(x), GAMMA, model.kind).output)
    loss_of([expected]).backward()
    theirs = grads(model)
    model.zero_grad()
    actual = net(x)
    loss_of([actual]).backward()
    actual, expected = actual.detach(), expected.detach()
    assert float((actual - expected).norm() / expected.norm()) <= BOUNDS[arithmetic]
    # A key's bias shifts all scores alike: gradient 0 but for rounding.
    assert_close_grads(grads(net), theirs, BOUNDS[arithmetic], noise=1e-3)


def test_none_and_constants_are_part_of_the_function():
    torch.manual_seed(0)
    model, x, scale = Loop(flip=False), torch.randn(3, 5, 8), torch.rand(8)
    net = mfx.momentumize(model, gamma=0.0)
    assert torch.equal(net(x), model(x))
    assert torch.equal(net(x, scale), model(x, scale))
    assert torch.equal(net(x, scale=None), model(x))
    assert torch.equal(net(scale=scale, x=x), model(x, scale))


class DropPath(nn.Module):
    """Whole branches dropped per sample, in training."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(mlp() for _ in range(6))

    def forward(self, x):
        for block in self.blocks:
            y = block(x)
            if self.training:
                y = y * x.new_empty(x.shape[0], 1, 1).bernoulli_(0.7) / 0.7
            x = x + F.dropout(y, 0.1, self.training)
        return x


class Group(nn.Module):
    """Residual blocks inside a residual group (RCAN)."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.last = nn.Sequential(*inner), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.last(self.inner(x))


class ChannelAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1))
        self.weight = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(2, 8, 1)
        )

    def forward(self, x):
        y = self.body(x)
        y = y * self.weight(y).sigmoid()
        y += x
        return y


def rcan():
    groups = [Group([ChannelAttention() for _ in range(3)]) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Group(groups), nn.Conv2d(8, 3, 3, padding=1))


CASES = [
    Case("drop_path", DropPath, [(16, 5, 8)], [6]),
    Case("rcan", rcan, [(2, 3, 12, 12)], [3, 3, 3, 3], rejected=1),
    Case("decoder", Decoder, [(3, 5, 8)], [12], saves=False),
    Case("loop", Loop, [(64, 5, 8)], [4], saves=False),
    Case("pre_activation", PreActivationResNet, [(4, 8, 6, 6)], [4], saves=False),
]


@judged(CASES)
def test_hand_written(case, verdict):
    judge(case, verdict)


class DenseBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8 + 4 * i, 4) for i in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], -1)
        return x


class UNet(nn.Module):
    """Skips that are concatenated, and one that is added to what was not computed from it alone."""

    def __init__(self):
        super().__init__()
        self.down, self.deep, self.up = (
            nn.Conv2d(4, 8, 2, 2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ConvTranspose2d(8, 4, 2, 2),
        )
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.down(x)
        y = self.up(self.deep(y).relu())
        return self.last(torch.cat([x, y], 1))


@pytest.mark.parametrize("make, shape", [(DenseBlock, (2, 8)), (UNet, (2, 4, 8, 8))], ids=["dense", "unet"])
def test_concatenations_are_no_residual_adds(make, shape):
    model, x = make(), torch.randn(shape)
    with pytest.warns(UserWarning, match="no chain of residual adds"):
        assert mfx.momentumize(model) is model
    assert identity_adds(model, [x]) == 0
    assert not [r for r in mfx.explain(model, x).rejections if is_identity(r)]


class UNetOfResidualBlocks(nn.Module):
    """Chains on either side of a concatenation, each on its own."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.ModuleList(mlp(w) for _ in range(3)) for w in (8, 16))

    def forward(self, x):
        y = x
        for block in self.left:
            y = y + block(y)
        y = torch.cat([x, y], -1)
        for block in self.right:
            y = y + block(y)
        return y


def test_chains_end_at_a_concatenation():
    torch.manual_seed(0)
    model, x = UNetOfResidualBlocks(), torch.randn(4, 8)
    assert [len(chain.steps) for chain in mfx.explain(model, x).chains] == [3, 3]
    assert_bit_equal(
        train_step(mfx.momentumize(model), [x]), train_step(mfx.momentumize(model, memory_budget=1.0), [x])
    )


class Rounding(nn.Module):
    """Keeps its stream in bfloat16 between the blocks, and on the way past a branch."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for layer in self.layers[:2]:
            x = (x + layer(x)).bfloat16().float()
        for layer in self.layers[2:]:
            x = x.bfloat16().float() + layer(x)
        return x


@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
def test_at_gamma_zero_a_skip_is_rounded_as_in_the_model(capture):
    torch.manual_seed(0)
    model, x = Rounding(), torch.randn(2, 8)
    net = mfx.momentumize(model, gamma=0.0, capture=capture)
    assert_bit_equal(train_step(net, [x]), train_step(model, [x]))
    assert sum(len(chain.steps) for chain in mfx.explain(net).chains) == 4


class Caching(nn.Module):
    """Fills a tensor part by part, with keys that it returns as well: nothing but an effect leads from keys to sums."""

    def __init__(self):
        super().__init__()
        self.keys = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))

    def forward(self, x):
        returned = []
        for layer in self.keys:
            keys = layer(x)
            state = torch.empty_like(x)
            state[..., :4].copy_(keys)
            state[..., 4:].copy_(keys.tanh())
            x = x + state.sin()
            returned.append(keys)
        return x, returned


@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
def test_what_is_filled_by_parts_belongs_to_the_step(capture):
    torch.manual_seed(0)
    model, x = Caching(), torch.randn(2, 8)
    plain = train_step(model, [x])
    net = mfx.momentumize(model, gamma=0.0, capture=capture)
    assert_bit_equal(train_step(net, [x]), plain)
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [3]
    exact = train_step(mfx.momentumize(model, capture=capture, verify="raise"), [x])
    assert_bit_equal(exact, train_step(mfx.momentumize(model, capture=capture, memory_budget=1.0), [x]))
