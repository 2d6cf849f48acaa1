"""The contract of identifier schemes: sizes that all plans share, and a scheme from elsewhere."""

import dataclasses
import re
import zlib
from collections import Counter

import gin
import jax
import numpy as np
import pytest

from dgr_jax import evaluate, partitioning, plan, prepare, retrieve, study, train
from dgr_jax.analysis import costs
from dgr_jax.capacity import chips, disk, planning, programs
from dgr_jax.capacity.counting import TAKEN, corpus_of
from dgr_jax.capacity.sizes import estimated_sizes, model_config, trie_bytes
from dgr_jax.config import cli, configurables, gin_files
from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.decoding import trie
from dgr_jax.experiments.generative import Prepare
from dgr_jax.identifiers.atomic import Atomic
from dgr_jax.identifiers.embeddings import TfidfSvd
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.identifiers.rq import ResidualQuantization
from dgr_jax.identifiers.scheme import CorpusSize, Material, Scheme, Sizes, TableSizes
from dgr_jax.identifiers.semantic import KMeansTree
from dgr_jax.identifiers.string import NaiveString
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.identifiers.title import Title
from dgr_jax.retrieval.generative import Search
from tests import students
from tests.conftest import TINY

SMALL = TfidfSvd(dim=8)
SCHEMES = [
    ResidualQuantization(embeddings=SMALL),
    ResidualQuantization(num_codes=2, codebook_size=8, embeddings=SMALL),
    KMeansTree(embeddings=SMALL),
    KMeansTree(branching=4, leaf_size=8, embeddings=SMALL),
    Title(),
    NaiveString(),
    NaiveString(by_position=True),
    Atomic(),
    Multiview(),
]
ids = lambda scheme: re.sub(r"embeddings=[^)]*\)(, )?", "", repr(scheme))


@dataclasses.dataclass(frozen=True)
class Backwards(Scheme):
    """A scheme from elsewhere: the number of a passage, its lowest digit first."""

    base: int = 8

    def tables(self, material):
        count, digits = len(material.store), self._digits(len(material.store))
        rows = np.arange(count)[:, None] // self.base ** np.arange(digits) % self.base
        table = IdentifierTable.from_rows(
            rows + material.first_code_id, view="backwards", num_code_tokens=self.base
        )
        return [table.require_docids()]

    def sizes(self, corpus):
        levels = (self.base,) * self._digits(corpus.passages)
        return Sizes((TableSizes(corpus.passages, levels),), codes=self.base)

    def _digits(self, count):
        return len(np.base_repr(count - 1, self.base))


@dataclasses.dataclass(frozen=True)
class Sizeless(Scheme):
    def tables(self, material):
        return []


def test_a_scheme_that_does_not_know_its_sizes_cannot_be():
    with pytest.raises(TypeError, match="abstract class Sizeless.*sizes"):
        Sizeless()
    with pytest.raises(
        ValueError, match="^Prepare.identifiers: got str, expected a scheme of identifiers .*such"
    ):
        Prepare(tasks="quickstart", identifiers="rq")


class ListStore(list):
    """Passages in memory with the face of a PassageStore."""

    pids = property(lambda self: [passage.pid for passage in self])


def pieces(text):
    """Words in pieces of four letters, of a vocabulary of 2,000."""
    return [3 + zlib.crc32(piece.encode()) % 2000 for piece in re.findall(r"\S{1,4}", text)]


@pytest.fixture(scope="module")
def passages():
    return ListStore(QuickstartCollection().passages())


@pytest.mark.parametrize("scheme", [*SCHEMES, Backwards()], ids=ids)
def test_sizes_are_those_of_the_identifiers_that_are_made(scheme, passages):
    corpus = CorpusSize(len(passages), 80, 1440, 5)
    first, vocab_size = 2048, 4096
    pairs = [(i, " ".join(p.text.split()[5 * n :][:6])) for i, p in enumerate(passages)
             for n in range(5)]  # fmt: skip
    material = Material(passages, pieces, first, marker=lambda view: 2048,
                        pseudo_queries=lambda: pairs)  # fmt: skip
    tables, sizes = scheme.tables(material), scheme.sizes(corpus)
    assert [table.view for table in tables] == [
        size.view or tables[0].view for size in sizes.tables
    ]
    for table, size in zip(tables, sizes.tables, strict=True):
        assert len(table) == pytest.approx(size.rows, rel=0.05)
        longest, mean = table.tokens.shape[1], np.mean(table.lengths)
        assert 0 <= size.length - longest <= (1 if table.num_code_tokens else 16)
        assert 0.6 < (size.mean_length or size.length) / mean < 1.6
        index = trie.build(table.tokens, table.lengths, vocab_size=vocab_size)
        held = sum(array.nbytes for _, array in index.padded().items())
        assert 0.5 < trie_bytes(size, vocab_size) / held < 2
    codes = sum(table.num_code_tokens for table in tables)
    assert 0.5 * codes <= sizes.codes <= 2.2 * codes
    if scheme.views:
        tokens = sum(len(tokens) for tokens in scheme.text_tokens(material, Counter()))
        assert 0.5 < sizes.text_tokens / tokens < 2 and sizes.span_tokens == 10


def load(*flags, scheme=None):
    args, bindings = cli.parse(cli.parser("train", ""), ["--model_dir=m", *flags])
    experiment = gin_files.load_experiment(args, bindings, keep=False)
    if scheme is None:
        return experiment
    return dataclasses.replace(
        experiment, prepare=dataclasses.replace(experiment.prepare, identifiers=scheme)
    )


@pytest.mark.parametrize("passages", [240, 8_800_000])
@pytest.mark.parametrize("scheme", [*SCHEMES[:-1], Backwards()], ids=ids)
def test_all_plans_take_the_same_sizes(scheme, passages):
    experiment, corpus = load(*TINY, scheme=scheme), TAKEN._replace(passages=passages)
    sizes = estimated_sizes(experiment, corpus)
    (table,) = sizes.identifiers.tables
    lines = {(line.stage, line.what): line for line in disk.lines(experiment, corpus)}
    assert lines["prepare", f"{passages:,} identifiers"].size == passages * (4 * table.length + 16)
    topology, mesh = chips.topology("h100:1"), partitioning.Mesh(data=1)
    made = {
        name: planning.plan(name, experiment, sizes, topology, mesh, compile=False)
        for name in ("generate", "decode")
    }
    parameters = made["generate"].parts["parameters"]
    assert lines["generate", "parameters"].on_device == parameters
    assert parameters == made["decode"].parts["parameters"] > sizes.vocab_size * 16 * 4
    assert lines["prepare", "their trie"].on_device == made["decode"].parts["trie"]
    both = parameters + made["generate"].parts["optimizer"]
    for stage in ("generate", "control", "distill"):
        assert lines[stage, "2 checkpoints"].size == 2 * both
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    batch = programs.abstract_batch("generate", experiment, sizes, mesh)
    assert batch["decoder_target_tokens"].shape[1] == table.length
    flops = 6 * costs.step_flops(model_config(experiment, sizes), batch)
    assert costs.expected_flops(experiment, corpus)["generate"] == flops


def test_a_plan_of_atomic_identifiers_of_a_large_corpus():
    experiment = load("--gin_file=msmarco.gin", "--data_dir=d", scheme=Atomic())
    sizes = estimated_sizes(experiment, TAKEN)
    assert (sizes.length, sizes.vocab_size) == (1, 32_128 + 8_800_000)
    lines = list(disk.lines(experiment, TAKEN))
    (parameters,) = (line.on_device for line in lines if line.what == "parameters")
    assert 4.5e9 < parameters / 4 < 14e9
    kept = load("--gin_file=msmarco.gin", "--data_dir=d", "--gin.Training.keep_checkpoints=5")
    told = {(line.stage, line.what) for line in disk.lines(kept, TAKEN)}
    assert {(stage, "5 checkpoints") for stage in ("generate", "control", "distill")} <= told


def test_plans_know_the_passages_of_a_part():
    part = ("--gin_file=beir.gin", "--gin.COLLECTION=@Subset()", "--gin.Subset.size=5000",
            "--gin.Subset.collection=@BeirCollection()")  # fmt: skip
    corpus, origin = corpus_of(load(*part))
    assert corpus.passages == 5000 and origin.startswith("Subset.size, else as MS MARCO, as the")
    assert costs.planned_corpus(load(*part)).passages == 5000


@pytest.mark.parametrize("scheme", ["rq", "Multiview"])
def test_a_plan_of_several_views(scheme, capsys, monkeypatch):
    """Of several views, lists and searches are known once there are identifiers."""
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    file = "quickstart_dgr.gin" if scheme == "Multiview" else "quickstart.gin"
    plan.command([f"--gin_file={file}", "--topology=h100:1"])
    said = capsys.readouterr().out
    assert ("distill" in said, "generate" in said) == (scheme == "rq", True)
    if scheme == "Multiview":
        assert "identifiers of 22 tokens" in said
        with pytest.raises(ValueError, match="got 'decode', expected some of generate$"):
            plan.command([f"--gin_file={file}", "--topology=h100:1", "--programs=decode"])


# One token a passage, beyond 2^17 tokens.


def test_atomic_identifiers_of_200_000_passages(tmp_path):
    """The trie has one node of all passages, which a bitmap covers."""
    count, first = 200_000, 128
    config = dataclasses.replace(students.CONFIG, vocab_size=first + count, emb_dim=8)
    rows = np.arange(first, first + count, dtype=np.int32)[:, None]
    search = Search(num_beams=5, depth=5, query_length=8, batch_size=2)
    decoder = students.decoder(rows, search, config=config)
    tokens = students.queries(2)
    passages, scores = decoder.passages(tokens)
    apply = jax.jit(students.Transformer(config).apply)
    logits = apply({"params": decoder.params}, tokens, np.zeros((2, 1), np.int32))[:, 0]
    log_probs = np.asarray(jax.nn.log_softmax(logits.astype(np.float32)))[:, first:]
    best = np.argsort(-log_probs, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(passages, best)
    np.testing.assert_allclose(scores, np.take_along_axis(log_probs, best, 1), atol=1e-4)
    odd = np.arange(count) % 2 == 1
    some = decoder.restrict(odd).passages(tokens)[0]
    best = 2 * np.argsort(-log_probs[:, 1::2], axis=1, kind="stable")[:, :5] + 1
    np.testing.assert_array_equal(some, best)
    decoder.index.save(tmp_path)
    loaded = dataclasses.replace(decoder, index=trie.load(tmp_path))
    np.testing.assert_array_equal(loaded.passages(tokens)[0], passages)
    table = TableSizes(count, (count,))
    held = sum(array.nbytes for _, array in decoder.index.padded().items())
    assert trie_bytes(table, first + count) == pytest.approx(held, rel=0.05)


# A scheme from elsewhere.


@pytest.fixture
def known(monkeypatch):
    """Gin files can name Backwards: what one line in configurables does."""
    before = configurables._components
    monkeypatch.setattr(configurables, "_components", lambda: (*before(), Backwards))
    configurables.configurables.cache_clear()
    gin_files.register()
    made = configurables.configurables()["Backwards"]
    with gin.unlock_config():
        gin.external_configurable(made, name="Backwards", module="dgr_jax")
    yield
    configurables.configurables.cache_clear()


@pytest.mark.slow
def test_a_scheme_from_elsewhere_runs_through_all_commands(known, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    unused = ("ResidualQuantization", "TfidfSvd", "Mesh.data=1", "LIST_BATCH_SIZE")
    flags = [flag for flag in TINY if not any(name in flag for name in unused)]
    flags += ["--gin.IDENTIFIERS=@Backwards()", "--gin.Backwards.base=4", "--gin.Mesh.data=8"]
    flags += ["--gin.LIST_BATCH_SIZE=8"]
    prepare.command([*flags, "--model_dir=m"])
    train.command([*flags, "--model_dir=m"])
    evaluate.command(["--model_dir=m"])
    assert "distill" in capsys.readouterr().out
    retrieve.command(["--model_dir=m", "--query=why do bees dance", "--k=3"])
    found = capsys.readouterr().out
    assert "<" in found and found.count("\n") >= 3
    train.command([*flags, "--plan"])
    assert "240 identifiers" in capsys.readouterr().out
    plan.command([*flags, "--topology=h100:1", "--mesh=1,1"])
    assert "identifiers of 4 tokens (4 codes of 4, used evenly)" in capsys.readouterr().out
    (tmp_path / "two.gin").write_text(
        "Study.gin_files = ('quickstart.gin',)\n"
        "Study.axes = {'of': {'rq': {}, 'back': {'IDENTIFIERS': '@Backwards()'}}}\n"
    )
    study.command(["--gin_file=two.gin", "--dry_run", "--model_dir=s"])
    said = capsys.readouterr().out
    assert "of=back-seed=0: prepare ?" in said and said.count(" generate 0.") == 2
    assert "? PFLOP" not in said
