"""Batches of token ids that differ in length cost two captures: one for training and one for evaluation."""

import logging
import warnings
from warnings import warn

import pytest
import torch
from torch import nn

import mfx
from mfx.net import graph_table

LENGTHS = (17, 23, 31, 12, 40, 9, 29)


class Attention(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = (q @ k.transpose(1, 2)).masked_fill(mask[:, None] == 0, -1e9)
        return x + self.out(scores.softmax(-1) @ v)


class Classifier(nn.Module):
    """A transformer that takes lengths as they come; ``notes``: that sets an attribute at its first call."""

    def __init__(self, notes=False):
        super().__init__()
        self.embed, self.places = nn.Embedding(50, 8), nn.Embedding(64, 8)
        self.layers = nn.ModuleList(Attention() for _ in range(4))
        self.head, self.drop = nn.Linear(8, 3), nn.Dropout(0.1)
        self.notes, self.kind = notes, None

    def forward(self, ids, mask, labels=None):
        if self.notes and self.kind is None:
            self.kind = "several" if labels is not None and labels.dtype == torch.int64 else "one"
        x = self.drop(self.embed(ids) + self.places(torch.arange(ids.shape[1])))
        for layer in self.layers:
            x = layer(x, mask)
        scores = self.head(x.mean(1))
        return scores if labels is None else (scores, nn.functional.cross_entropy(scores, labels))


def batch(size, length):
    return {
        "ids": torch.randint(0, 50, (size, length)),
        "mask": torch.ones(size, length, dtype=torch.int64),
        "labels": torch.randint(0, 3, (size,)),
    }


@pytest.fixture
def captures(monkeypatch):
    """Collect what is captured; first of all, ``momentumize`` itself tries a trace without a call."""
    seen = []
    waiting_for = graph_table.waiting_for
    monkeypatch.setattr(graph_table, "waiting_for", lambda what: seen.append(what) or waiting_for(what))
    return seen


def train_and_evaluate(net, make, loss, step=lambda: None):
    for size, length in [*((8, length) for length in LENGTHS), (3, 25)]:
        loss(net.train()(**make(size, length))).backward()
        step()
    with torch.no_grad():
        for size, length in ((8, 19), (5, 33)):
            net.eval()(**make(size, length))
    loss(net.train()(**make(8, 22))).backward()


@pytest.mark.parametrize("notes", [False, True])
@pytest.mark.parametrize("capture", ["auto", "symbolic", "dynamo"])
def test_seven_lengths_a_last_batch_and_an_evaluation(captures, capture, notes):
    if notes and capture == "symbolic":
        pytest.skip("a trace would lose what the call notes")
    torch.manual_seed(0)
    net = mfx.momentumize(Classifier(notes), capture=capture)
    train_and_evaluate(net, batch, lambda output: output[1])
    assert captures[-2:] == [f"capturing a call of {type(net).__name__}"] * 2
    assert len(captures) <= 3


def test_a_bert_classifier(captures):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=100, num_labels=3
    )
    net = mfx.momentumize(transformers.BertForSequenceClassification(config))

    def make(size, length):
        values = batch(size, length)
        return {"input_ids": values["ids"], "attention_mask": values["mask"], "labels": values["labels"]}

    train_and_evaluate(net, make, lambda output: output.loss)
    assert captures[-2:] == [f"capturing a call of {type(net).__name__}"] * 2
    assert len(captures) <= 3


class FirstCall(nn.Module):
    """Computes something else in its first call."""

    def __init__(self, first):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.embed, self.other = nn.Embedding(50, 8), nn.Embedding(50, 8)
        self.is_first, self.first = True, first

    def forward(self, ids):
        x = self.embed(ids)
        if self.is_first:
            self.is_first = False
            x = getattr(self, self.first)(x, ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x.sum(1) if ids.shape[1] else x

    def more(self, x, ids):
        return x * 2

    def another(self, x, ids):
        return self.other(ids)


@pytest.mark.parametrize("first", ["more", "another"])
def test_a_first_call_that_computes_something_else_does(first):
    torch.manual_seed(0)
    model = FirstCall(first)
    net = mfx.momentumize(model, gamma=0.0, capture="dynamo")
    for length in (5, 7):
        ids = torch.randint(0, 50, (2, length))
        expected, found = model(ids), net(ids)
        assert torch.equal(found, expected)
        assert net.is_first is model.is_first is False


class Result:
    def __init__(self, value, is_first):
        self.value, self.is_first = value, is_first


LOG = logging.getLogger("tests.first_call")
SAYS = {
    "print": lambda: print("first"),
    "log": lambda: LOG.warning("first"),
    "warning": lambda: warnings.warn("first", stacklevel=1),
    "warning by name": lambda: warn("first", stacklevel=1),
}
GIVES = {
    "flag": lambda x, first: (x, first),
    "number": lambda x, first: {"x": x, "count": 1 if first else 0},
    "number of another type": lambda x, first: (x, 1 if first else True),
    "nothing": lambda x, first: (x, None if first else x),
    "text": lambda x, first: (x, "first" if first else "later"),
    "object": lambda x, first: Result(x, first),
    "object in a list": lambda x, first: [Result(x, first)],
    "one of two tensors": lambda x, first: (x, x.tanh(), x.exp())[:: 1 if first else -1],
}


class TellingFirst(nn.Module):
    """Computes the same in its first call as later, and gives or says something else."""

    def __init__(self, gives=None, says=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.is_first, self.gives, self.says = True, gives, says

    def forward(self, x):
        first = self.is_first
        self.is_first = False
        if first and self.says is not None:
            SAYS[self.says]()
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x if self.gives is None else GIVES[self.gives](x, first)


def plain(value):
    """Return the numbers and texts in a result, tensors as lists."""
    if isinstance(value, Result):
        return plain(vars(value))
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else (type(value), value)


@pytest.mark.parametrize("gives", GIVES)
def test_a_first_call_that_returns_something_else_does(gives):
    x, model = torch.linspace(-1, 1, 16).reshape(2, 8), TellingFirst(gives)
    net = mfx.momentumize(TellingFirst(gives), gamma=0.0, capture="dynamo")
    for _ in range(3):
        assert plain(net(x)) == plain(model(x))
        assert net.is_first is False


@pytest.mark.filterwarnings("ignore:mfx", "ignore:first")
@pytest.mark.parametrize("says", SAYS)
def test_a_first_call_that_says_something_returns_what_it_returns(says):
    x, model = torch.linspace(-1, 1, 16).reshape(2, 8), TellingFirst("flag", says)
    net = mfx.momentumize(TellingFirst("flag", says), gamma=0.0, capture="dynamo")
    for _ in range(3):
        assert plain(net(x)) == plain(model(x))


@pytest.mark.filterwarnings("ignore:mfx")  # Dynamo ends a graph where a model speaks
@pytest.mark.parametrize("says", SAYS)
def test_what_a_first_call_says_is_said_once(says, capfd, caplog):
    net, x = mfx.momentumize(TellingFirst(says=says), gamma=0.0, capture="dynamo"), torch.ones(2, 8)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            net(x)
    said = (
        [str(each.message) for each in warned],
        [each.getMessage() for each in caplog.records if each.name == LOG.name],
    )
    heard = [*capfd.readouterr().out.split(), *(text for texts in said for text in texts)]
    assert heard.count("first") == 1


class Counting(nn.Module):
    """Counts its calls, and computes with the count."""

    def __init__(self):
        super().__init__()
        self.layers, self.embed = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Embedding(50, 8)
        self.calls = 0

    def forward(self, ids):
        self.calls += 1
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x * self.calls


def test_a_count_of_calls_counts_calls():
    torch.manual_seed(0)
    model = Counting()
    net = mfx.momentumize(model, gamma=0.0, capture="dynamo")
    for number, length in enumerate((5, 7, 5), 1):
        ids = torch.randint(0, 50, (2, length))
        assert torch.equal(net(ids), model(ids))
        assert net.calls == model.calls == number
