"""A small student behind an Api, without a MODEL_DIR."""

from __future__ import annotations

import threading
import zlib
from types import SimpleNamespace

import numpy as np

from dgr_jax.corpora import store
from dgr_jax.corpora.types import Passage
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.retriever import Hit, Retriever
from dgr_jax.serving.served import OpenSystem, Served
from tests import students

TITLES = ("The waggle dance", "Reed instruments", "Wolf spiders", "<script>alert(1)</script>")
PASSAGES = [
    Passage(
        f"{'bees' if i < 6 else 'music'}-{i:02d}",
        f"Text {i} of dances.",
        TITLES[i % 4],
        {"year": 1990 + i % 3} | ({"part": "wind"} if i > 8 else {}),
    )
    for i in range(12)
]


class Words:
    """A vocabulary whose tokens are the hashes of words."""

    def encode_inputs(self, texts, length):
        rows = np.zeros((len(texts), length), np.int32)
        for row, text in zip(rows, texts, strict=True):
            tokens = [3 + zlib.crc32(word.encode()) % 60 for word in text.split()][: length - 1]
            row[: len(tokens) + 1] = [*tokens, students.EOS]
        return rows

    def decode(self, tokens):
        return " ".join(f"<{token - 64}>" for token in tokens)


def retriever(folder, *, num_beams=4, depth=12):
    """One whose passages are PASSAGES."""
    kept = store.write(PASSAGES, folder)
    search = Search(num_beams=num_beams, batch_size=4, depth=depth, query_length=8)
    return Retriever(students.decoder(students.codes(len(PASSAGES)), search), Words(), kept)


class Gate:
    """A retriever that answers when it is opened."""

    def __init__(self):
        self.open, self.began, self.searched = threading.Event(), threading.Event(), []
        self.decoder = SimpleNamespace(most_passages=10, pad_to=lambda sizes: None)
        self.store = PASSAGES

    def search(self, queries, k):
        self.began.set()
        self.open.wait(5)
        self.searched += queries
        return [[Hit(1, "p", -1.0, "title", query, "", {"log_prob": -float("inf")})] * k
                for query in queries]  # fmt: skip


class OneModel(SimpleNamespace):
    """A Model that is ready, and never another."""

    def compile(self):
        self.ready = True

    def renew(self):
        return False

    def end(self):
        pass


def model(retriever, name="small", **more):
    """A model of one system, 'distill'."""
    retriever.decoder.pad_to((1, 2))
    served = Served("mark", {"distill": OpenSystem(retriever)}, "distill")
    return OneModel(name=name, served=served, ready=False, **more)
