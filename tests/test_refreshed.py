"""Students that learn passages which were added to their index, from the command line."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dgr_jax import update as command
from dgr_jax.config import cli, gin_files
from dgr_jax.config.mistakes import Mistake
from dgr_jax.corpora.types import Passage
from dgr_jax.experiments.common import Training
from dgr_jax.experiments.refresh import Refresh
from dgr_jax.identifiers.atomic import Atomic
from dgr_jax.losses import levels
from dgr_jax.model_dir import records
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval import kinds
from dgr_jax.retrieval.living import update
from dgr_jax.retrieval.planned import Planned
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.retrieval.simultaneous import Lexical
from dgr_jax.retrieval.sources import Sources
from dgr_jax.stages import refreshed
from dgr_jax.stages.refreshed import Begun
from dgr_jax.training.arrays import read_arrays
from dgr_jax.training.objectives import Generation
from dgr_jax.training.optimizers import Adafactor
from dgr_jax.training.refreshing import OLD, LevelGeneration
from tests.test_living import BEES, ZEBRA, kept_model

STEPS = ("--gin.REFRESH_STEPS=2", "--gin.BATCH_SIZE=8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A MODEL_DIR with passages that were added: version 1 of its index."""
    model_dir, passages = kept_model(tmp_path_factory.mktemp("refreshed"))
    update.update(update.versions(model_dir), [ZEBRA, BEES], [passages.pids[0]])
    return model_dir


@pytest.fixture
def model_dir(trained, tmp_path, monkeypatch, caplog) -> Path:
    monkeypatch.setattr(cli, "_set_up", lambda args: None)
    caplog.set_level(logging.INFO, logger="dgr_jax")
    return shutil.copytree(trained, tmp_path / "model")


def settings(model_dir: Path, **given) -> Refresh:
    training = Training(LevelGeneration(), Adafactor(), steps=2, batch_size=8)
    return Refresh(str(model_dir), training, **given)


def run(model_dir: Path, *flags: str) -> None:
    command.command([f"--model_dir={model_dir}", "--refresh", *STEPS, *flags])


def begun(model_dir: Path, **given) -> Begun:
    return Begun.of(settings(model_dir, **given))


def test_what_is_learned(model_dir):
    """Texts of the passages that were added, and of those that are there still."""
    at = begun(model_dir, replay=0.25)
    assert (at.name, at.began) == ("refreshed-1", "distill")
    slices = at.slices
    (new,) = (np.flatnonzero(slices.known == 0),)
    assert [slices.store.pids[i] for i in new] == ["zebra-1", "dance-1"]
    rates, features = {}, {}
    for name, rate, of in refreshed._examples(at):
        rates[name], features[name] = rate, of
    assert sum(rates.values()) == pytest.approx(1)
    assert sum(rate for name, rate in rates.items() if name[:3] == "old") == pytest.approx(0.25)
    rows = slices.table.rows_of_passages()
    targets = {name: of["decoder_target_tokens"] for name, of in features.items()}
    learned = {tuple(row) for name in targets if name[:3] == "new" for row in targets[name]}
    assert learned == {tuple(slices.table.tokens[rows[i]]) for i in new}
    replayed = np.concatenate([targets[name] for name in targets if name[:3] == "old"])
    owners = slices.table.passages[slices.table.lookup(replayed)]
    assert len(replayed) == 2 * 8 * 0.25, "no more are looked at than are drawn"
    assert (slices.table.lookup(replayed) >= 0).all()
    assert (slices.known[owners] == 2).all()
    every = slices.before("passages", 10**6, 0)
    stored = read_arrays(at.prepared / "arrays" / "passages")
    gone = len(stored["decoder_target_tokens"]) - len(every["decoder_target_tokens"])
    assert gone > 0, "examples of the passage that was removed are left out"
    move = refreshed.row_rates(at, at.student.model["vocab_size"])
    first = slices.vocabulary.first_code_id
    assert not move[:first].any()
    used = np.unique(slices.table.tokens[rows[slices.known > 0]])
    np.testing.assert_array_equal(move[used], np.float32(0.01))


def test_questions_of_a_file(model_dir, tmp_path):
    file = tmp_path / "questions.tsv"
    file.write_text("zebra-1\tWhat confuses flies?\nzebra-1\tWho has stripes?\nnobody\tWho?\n")
    at = begun(model_dir, pseudo_query_path=str(file), replay=0.0)
    sources = at.slices.sources(str(file))
    features = at.slices.of_passages(np.flatnonzero(at.slices.known == 0), sources)
    assert len(features["pseudo_queries"]["decoder_target_tokens"]) == 2
    lost = begun(model_dir, pseudo_query_path=str(tmp_path / "none.tsv"))
    with pytest.raises(FileNotFoundError, match=r"Refresh.pseudo_query_path: no file at .*none"):
        refreshed.pipeline.run(lost, [lost.name])


def refused(model_dir: Path, **given) -> str:
    with pytest.raises(ValueError) as error:
        refreshed._check(begun(model_dir, **given))
    return str(error.value)


def test_wrong_use_is_said_before_work_starts(model_dir):
    versions = update.versions(model_dir)
    versions.switch(0)
    assert "got no passages that distill has not learned (version 0 of the index" in refused(
        model_dir
    )
    versions.switch(1)
    refreshed._check(begun(model_dir))
    arrays = model_dir / "prepare" / "arrays"
    arrays.rename(arrays.with_name("other"))
    assert "Refresh.replay: got 0.5 without" in refused(model_dir)
    refreshed._check(begun(model_dir, replay=0.0))
    for name, value, message in [
        ("model", {"vocab_size": 128}, "writes 128 tokens, expected at least"),
        ("kind", "multiview", "is of kind 'multiview', expected 'docid'"),
    ]:
        at = begun(model_dir, replay=0.0)
        vars(at)["student"] = dataclasses.replace(at.student, **{name: value})
        with pytest.raises(ValueError, match=message):
            refreshed._check(at)


def test_a_scheme_without_levels_is_refused(model_dir, monkeypatch):
    monkeypatch.setattr(refreshed, "scheme_of", lambda *_: Atomic())
    assert "has identifiers of Atomic, expected some whose codes are other tokens at" in refused(
        model_dir
    )


def test_settings_are_checked():
    make = lambda **given: Refresh("m", Training(LevelGeneration(), Adafactor(), 1), **given)
    with pytest.raises(ValueError, match=r"^Refresh.replay: got 1.0, expected at least 0, below 1"):
        make(replay=1.0)
    with pytest.raises(ValueError, match="Training.objective: got Generation, expected LevelGener"):
        Refresh("m", Training(Generation(), Adafactor(), 1))
    flags = ("--gin_file=quickstart.gin", "--model_dir=m")
    with pytest.raises(Mistake, match="quickstart.gin is for python -m dgr_jax.train"):
        parsed = cli.flags(cli.parser("update", ""), flags)
        gin_files.load_experiment(*parsed, ("Refresh",), keep=False)


@pytest.mark.parametrize("pack", [True, False])
def test_queries_are_packed_where_they_are_to_be(model_dir, tmp_path, monkeypatch, pack):
    given: list[dict] = []
    monkeypatch.setattr(kinds, "params_of", lambda *_: None)
    monkeypatch.setattr(refreshed, "_write_examples", lambda *_: {})
    monkeypatch.setattr(refreshed, "batches", lambda *_: None)
    monkeypatch.setattr(refreshed, "train", lambda *_, **settings: given.append(settings))
    of = settings(model_dir)
    training = dataclasses.replace(of.training, pack_queries=pack)
    refreshed.make(Begun.of(dataclasses.replace(of, training=training)), tmp_path)
    assert given == [{"pack_queries": pack}]


def test_a_student_that_is_trained_again_answers_itself(model_dir):
    record = records.read_record(model_dir / "distill")
    systems, began = list(kinds.read_student(model_dir / "distill").systems), "distill"
    for name in ("refreshed-1", "refreshed-2"):
        folder, mark = model_dir / name, records.read_record(model_dir / began)["fingerprint"]
        folder.mkdir()
        settings = {began: records.read_record(model_dir / began)["settings"]}
        records.write_record(folder, status="done", fingerprint=name, settings=settings)
        said = json.loads((model_dir / "distill" / "student.json").read_text())
        said |= {"systems": (systems := [*systems, name]), "began": [began, mark]}
        (folder / "student.json").write_text(json.dumps(said))
        began = name
    assert kinds.refreshed(model_dir, "distill") == ("refreshed-2", "refreshed-1")
    assert kinds.refreshed(model_dir, "control") == ()
    answers = lambda: records.answering(model_dir, kinds.best_first(model_dir)).student.name
    assert answers() == "refreshed-2"
    records.write_record(model_dir / "distill", **record | {"status": "running"})
    assert answers() == "refreshed-2"
    records.write_record(model_dir / "distill", **record | {"fingerprint": "trained again"})
    assert answers() == "distill"
    assert kinds.refreshed(model_dir, "distill") == ()


@pytest.mark.slow
def test_it_answers_in_the_place_of_the_student_that_it_began_from(model_dir, caplog):
    before = Retriever.load(model_dir)
    question = ["stripes that confuse flies"]
    run(model_dir)
    folder = model_dir / "refreshed-1"
    assert kinds.read_student(folder).began[0] == "distill"
    after = before.newest()
    assert after.decoder.params is not before.decoder.params
    assert kinds.best_first(model_dir)[0] == "refreshed-1"
    same = lambda retriever: [hit.pid for hit in retriever.search(question, k=8)[0]]
    assert same(after) == same(Retriever.load(model_dir, system="refreshed-1"))
    moved = np.abs(table(after) - table(before)).max(-1)
    first = after.vocabulary.first_code_id
    assert not moved[:first].any()
    assert moved[first:].any()
    features = read_arrays(folder / "arrays" / "new-passages")
    asked = (features[f"{name}_input_tokens"] for name in ("encoder", "decoder"))
    student = kinds.read_student(model_dir / "distill")
    model = Transformer(kinds.restored(T5Config, student.model))
    logits = jax.jit(model.apply)({"params": before.decoder.params}, *asked)
    codes = begun(model_dir).codes
    expected = levels.level_log_probs(logits, np.broadcast_to(codes, (len(logits), *codes.shape)))
    np.testing.assert_allclose(features[OLD], expected, atol=1e-4)
    run(model_dir)
    assert "done already" in caplog.text
    kinds.write_untrained(model_dir, [Planned("planned", Lexical(planned=10, num_beams=5))], 8)
    assert Sources.of(model_dir, None).trained["distill"].student == folder
    versions = update.versions(model_dir)
    update.update(versions, [Passage("third", "A third passage is about glaciers.", "Third")])
    second = begun(model_dir)
    assert (second.name, second.began) == ("refreshed-2", "refreshed-1")
    assert np.bincount(second.slices.known).tolist()[:2] == [1, 2]
    run(model_dir)
    assert Sources.of(model_dir, None).trained["distill"].student.name == "refreshed-2"
    record = records.read_record(model_dir / "distill")
    records.write_record(model_dir / "distill", **record | {"fingerprint": "trained again"})
    assert Sources.of(model_dir, None).trained["distill"].student.name == "distill"


@pytest.mark.slow
def test_one_that_is_killed_leaves_the_student_before_and_goes_on(model_dir, monkeypatch, caplog):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(refreshed, "train", killed)
        run(model_dir)
    assert Sources.of(model_dir, None).answering[0].student.name == "distill"
    written = (model_dir / "refreshed-1" / "arrays" / "new-passages" / "arrays.json").stat()
    run(model_dir)
    assert "refreshed-1: was cut off; goes on" in caplog.text
    again = (model_dir / "refreshed-1" / "arrays" / "new-passages" / "arrays.json").stat()
    assert written == again
    assert Sources.of(model_dir, None).answering[0].student.name == "refreshed-1"


def table(retriever: Retriever) -> np.ndarray:
    return np.asarray(retriever.decoder.params["token_embedder"]["embedding"])
