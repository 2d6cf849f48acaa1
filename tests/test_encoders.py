"""Encoders of sentence-transformers as teachers and embeddings: small ones with random weights."""

from __future__ import annotations

import numpy as np
import pytest

from dgr_jax.corpora import store as stores
from dgr_jax.corpora.types import Passage
from dgr_jax.identifiers.embeddings import SentenceEncoder
from dgr_jax.teaching.sparse_teacher import SparseEncoderTeacher
from dgr_jax.teaching.teachers import BiEncoderTeacher, CrossEncoderTeacher

WHY = "needs the extra `encoders`"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
encoders = pytest.importorskip("sentence_transformers", reason=WHY)

WORDS = "bees dance honey hive masts hold sails ships why do".split()
TEXTS = {"a": "bees dance", "b": "honey hive", "c": "masts hold sails"}
QUERIES = {"q1": "why do bees dance", "q2": "ships sails"}
POOLS = {"q1": ["a", "b", "c"], "q2": ["c", "a"]}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    passages = (Passage(pid, text) for pid, text in TEXTS.items())
    return stores.write(passages, tmp_path_factory.mktemp("store") / "passages")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(kind) -> folder of a small BERT of a class of transformers, with its tokenizer."""
    folder = tmp_path_factory.mktemp("models")

    def save(kind):
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        (folder / "vocab.txt").write_text("\n".join(vocabulary))
        config = transformers.BertConfig(
            vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, num_labels=1, initializer_range=1.0,
        )  # fmt: skip
        torch.manual_seed(0)
        getattr(transformers, kind)(config).save_pretrained(folder / kind)
        tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
        tokenizer.save_pretrained(folder / kind)
        return str(folder / kind)

    return save


def ranked(teacher, store):
    return {
        qid: [(passage.pid, pytest.approx(passage.score, rel=1e-4, abs=1e-5)) for passage in places]
        for qid, places in teacher.order(QUERIES, POOLS, store)
    }


def best(scores):
    return sorted(scores.items(), key=lambda item: -item[1])


def test_a_cross_encoder_is_a_teacher(store, saved):
    folder = saved("BertForSequenceClassification")
    model = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def score(query, text):
        with torch.no_grad():
            logit = model(**tokenizer(query, text, return_tensors="pt")).logits
        return torch.sigmoid(logit).item()  # what a cross-encoder of one label gives

    expected = {
        qid: best({pid: score(QUERIES[qid], TEXTS[pid]) for pid in pids})
        for qid, pids in POOLS.items()
    }
    assert ranked(CrossEncoderTeacher(folder), store) == expected


def test_a_bi_encoder_is_a_teacher_and_gives_embeddings(store, saved):
    folder = saved("BertModel")
    model = encoders.SentenceTransformer(folder)  # the mean of all tokens
    vectors = {text: model.encode([text])[0] for text in (*TEXTS.values(), *QUERIES.values())}
    of_unit = {text: vector / np.linalg.norm(vector) for text, vector in vectors.items()}
    expected = {
        qid: best({pid: float(of_unit[QUERIES[qid]] @ of_unit[TEXTS[pid]]) for pid in pids})
        for qid, pids in POOLS.items()
    }
    assert ranked(BiEncoderTeacher(folder), store) == expected
    embedded = SentenceEncoder(folder).embed(store, seed=0)
    units = [of_unit[text] for text in TEXTS.values()]
    np.testing.assert_allclose(embedded, units, rtol=1e-3, atol=1e-5)


def test_a_sparse_encoder_is_a_teacher(store, saved):
    model = encoders.SparseEncoder(saved("BertForMaskedLM"))  # with the pooling of SPLADE
    folder = saved("BertForMaskedLM") + "-splade"
    model.save_pretrained(folder)
    queries, texts = (
        {key: model.encode([text])[0].to_dense().numpy() for key, text in of.items()}
        for of in (QUERIES, TEXTS)
    )
    assert all(0 < (vector > 0).sum() for vector in texts.values())
    expected = {
        qid: best({pid: float(queries[qid] @ texts[pid]) for pid in pids})
        for qid, pids in POOLS.items()
    }
    assert ranked(SparseEncoderTeacher(folder), store) == expected
