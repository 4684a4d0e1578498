"""Batches of token ids that differ in length cost two captures: one for training and one for evaluation."""

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
