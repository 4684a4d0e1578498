"""Families of Hugging Face's transformers with random weights in their default settings, two layers or so of each."""

from __future__ import annotations

from tests.models.huggingface import DEPTH, FAMILIES, WIDTH, Family
from tests.zoo import huggingface_others, huggingface_text, huggingface_vision
from tests.zoo.entry import Call, Entry

NOTE = f"{DEPTH} layers of width {WIDTH}"


def entry(family: Family) -> Entry:
    def call() -> Call:
        return (), family.draw()

    return Entry("huggingface", family.name, family.build, call, NOTE, family.compiles_alike, "transformers")


_FURTHER = (*huggingface_text.FAMILIES, *huggingface_vision.FAMILIES, *huggingface_others.FAMILIES)
ENTRIES = [entry(family) for family in (*FAMILIES, *_FURTHER)]
