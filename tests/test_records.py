"""Which student answers, over which identifiers, whatever was made again since it was trained."""

from __future__ import annotations

import json
import re

import pytest

from dgr_jax.model_dir import kept, records, writer_lock
from dgr_jax.models.t5_config import T5Config
from dgr_jax.retrieval import kinds
from dgr_jax.retrieval.generative import Search
from dgr_jax.settings import fingerprint


def prepare_settings(seed: int) -> dict:
    return {"collection": {"is": "BeirCollection"}, "prepare": {"is": "Prepare", "seed": seed}}


def student_settings(seed: int) -> dict:
    """The settings of distillation, which hold those of every earlier stage, nested."""
    generate = {"generate": {"steps": 5}, "prepare": prepare_settings(seed)}
    return {"distill": {"steps": 3}, "teach": {"candidates": {"generate": generate}}}


class ModelDir:
    def __init__(self, folder):
        self.folder = folder

    def write(self, stage, settings, status="done"):
        folder = self.folder / stage
        folder.mkdir(parents=True, exist_ok=True)
        mark = fingerprint(settings)
        records.write_record(folder, status=status, fingerprint=mark, settings=settings)

    def prepare(self, seed, at="prepare", **status):
        self.write(at, prepare_settings(seed), **status)

    def student(self, name, seed, **status):
        self.write(name, student_settings(seed), **status)
        model = {"t5": {}} if name == "dense" else {}
        said = json.dumps({"model": model, "search": {}})  # as version 0.1 wrote it
        (self.folder / name / records.STUDENT).write_text(said)

    def answering(self, *systems):
        answer = records.answering(self.folder, systems or kinds.best_first(self.folder))
        names = (
            path.relative_to(self.folder).as_posix() for path in (answer.student, answer.prepared)
        )
        return (*names, answer.aside)


@pytest.fixture
def made(tmp_path):
    model = ModelDir(tmp_path / "model")
    model.prepare(0)
    model.student("distill", 0)
    model.student("generate", 0)
    return model


def test_the_best_student_answers_over_what_it_was_trained_on(made):
    assert made.answering() == ("distill", "prepare", "")
    assert made.answering("generate") == ("generate", "prepare", "")


def test_a_student_answers_over_the_last_whole_version_of_its_identifiers(made):
    made.prepare(0, "previous/prepare")
    made.prepare(1)
    student, prepared, aside = made.answering()
    assert (student, prepared) == ("distill", "previous/prepare")
    assert aside == (
        "the prepare stage was made again (changed: prepare.seed) and distill was not trained on "
        "that yet; it answers over the identifiers that it knows"
    )


def test_while_prepare_is_made_again_the_last_whole_version_answers(made):
    made.prepare(0, "previous/prepare")
    made.prepare(1, status="running")
    assert made.answering()[:2] == ("distill", "previous/prepare")


def test_readers_find_a_version_that_changes_places_with_another(made):
    made.prepare(1, "previous/prepare")
    aside = made.folder / "previous"
    (made.folder / "prepare").rename(aside / "prepare.swap")
    assert made.answering()[:2] == ("distill", "previous/prepare.swap")
    (aside / "prepare").rename(made.folder / "prepare")
    assert made.answering()[:2] == ("distill", "previous/prepare.swap")


def test_while_a_student_is_trained_again_the_last_whole_version_answers(made):
    (made.folder / "previous").mkdir()
    (made.folder / "distill").rename(made.folder / "previous/distill")
    made.write("distill", student_settings(0), status="running")
    student, prepared, aside = made.answering()
    assert (student, prepared) == ("previous/distill", "prepare")
    assert aside == "distill is being made again with other settings, the version before answers"


def test_a_student_whose_identifiers_are_gone_is_refused(made):
    made.prepare(2)
    made.prepare(1, "previous/prepare")
    said = re.escape(
        f"{made.folder / 'distill'}: was trained on other identifiers than "
        f"{made.folder / 'prepare'} holds (changed: prepare.seed); python -m dgr_jax.train "
        f"--model_dir={made.folder} trains it again"
    )
    with pytest.raises(ValueError, match=f"^{said}$"):
        made.answering()


def test_a_lesser_student_that_fits_answers_before_a_better_one_that_does_not(made):
    made.prepare(1)
    made.student("generate", 1)
    assert made.answering() == (
        "generate",
        "prepare",
        "generate answers, as distill is not trained yet",
    )


def test_a_lesser_student_says_so(made):
    (made.folder / "distill" / records.STUDENT).unlink()
    assert made.answering()[2] == "generate answers, as distill is not trained yet"


def test_of_a_dense_retriever_the_first_student_may_be_the_best(tmp_path):
    made = ModelDir(tmp_path)
    made.prepare(0)
    made.student("dense", 0)
    assert made.answering() == ("dense", "prepare", "")
    made.write("refresh", student_settings(0), status="running")
    assert made.answering()[2] == "dense answers, as refresh is not trained yet"


def test_of_two_experiments_that_of_the_newer_prepare_stage_answers(made):
    (made.folder / "previous").mkdir()
    (made.folder / "prepare").rename(made.folder / "previous/prepare")
    made.prepare(1)
    assert made.answering()[:2] == ("distill", "previous/prepare")
    made.student("dense", 1)
    assert made.answering() == ("dense", "prepare", "")
    assert made.answering("distill")[:2] == ("distill", "previous/prepare")


def test_a_refreshed_student_that_is_lost_is_told_of(made):
    """No other file names it, so that the student before would answer without a word."""
    for name, began in (("refreshed-1", "distill"), ("refreshed-2", "refreshed-1")):
        mark = records.read_record(made.folder / began)["fingerprint"]
        made.student(name, 0)
        systems = {"refreshed-1": ("generate", "distill", name),
                   "refreshed-2": ("generate", "distill", "refreshed-1", name)}[name]  # fmt: skip
        kinds.write_student(
            made.folder / name, "docid", T5Config(), Search(), systems, (began, mark)
        )
        record = records.read_record(made.folder / name)
        records.write_record(made.folder / name, **record, files_made=kept.sign(made.folder / name))
    assert made.answering()[0] == "refreshed-2"
    (made.folder / "refreshed-1" / records.STUDENT).unlink()
    assert made.answering()[0] == "refreshed-2"
    student = made.folder / "refreshed-2" / records.STUDENT
    for content in (b"{", b""):
        student.write_bytes(content)
        assert kinds.best_first(made.folder)[0] == made.answering()[0] == "refreshed-2"
    student.unlink()
    assert made.answering()[0] == "refreshed-2"
    with pytest.raises(
        kept.Damaged, match=r"student.json: is missing.*update --model_dir=.* --ref"
    ):
        kinds.read_student(student.parent)


def test_identifiers_that_are_made_again_are_said_to_be(made):
    made.prepare(0, status="running")
    with pytest.raises(ValueError, match=r"prepare: is not whole, and .*distill was trained on it"):
        made.answering()
    made.prepare(1, status="running")
    with pytest.raises(ValueError, match="distill: was trained on other identifiers than"):
        made.answering()


def test_nothing_trained_says_who_is_at_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no trained student in .*distill/student.json"
    ) as e:
        records.answering(tmp_path, kinds.best_first(tmp_path))
    assert "being written" not in str(e.value)
    with (
        writer_lock.held(tmp_path),
        pytest.raises(FileNotFoundError, match="MODEL_DIR is being written by this process"),
    ):
        records.answering(tmp_path, kinds.best_first(tmp_path))


def test_a_change_while_it_is_read_is_seen(made):
    answer = records.answering(made.folder, kinds.best_first(made.folder))
    assert answer.unchanged
    made.prepare(0, status="running")
    assert not answer.unchanged


def test_records_before_a_file_was_signed_are_of_the_same_settings(made):
    settings = prepare_settings(0) | {"files": {"tasks/beir.py": {"bytes": 3}}}
    record = records.read_record(made.folder / "prepare")
    assert records.is_made_from(record, settings)
    assert not records.is_made_from(record, prepare_settings(1))


def test_a_student_from_before_files_were_signed_answers_over_identifiers_made_since(made):
    signed = prepare_settings(0) | {"files": {"tasks/beir.py": {"bytes": 3}}}
    made.write("prepare", signed)
    assert made.answering() == ("distill", "prepare", "")
    made.prepare(0, "previous/prepare")
    made.write("prepare", prepare_settings(1) | {"files": signed["files"]})
    assert "made again (changed: prepare.seed) and" in made.answering()[2]
    made.write("prepare", signed)
    (made.folder / "previous" / "prepare" / records.RECORD).unlink()
    other = signed | {"files": {"tasks/beir.py": {"bytes": 4}}}
    made.write("distill", {"distill": {}, "teach": {"prepare": other}})
    assert made.answering()[0] == "generate"
    made.write("distill", {"distill": {}, "teach": {"prepare": signed}})
    assert made.answering() == ("distill", "prepare", "")


def test_a_record_that_cannot_be_read_is_none(made):
    for text in ('{"status": ', "[]", "\x00\x01", "[" * 100_000):
        (made.folder / "prepare" / records.RECORD).write_text(text)
        assert records.read_record(made.folder / "prepare") == {}
    (made.folder / "prepare" / records.RECORD).write_bytes(b"\xff\xfe")
    assert records.read_record(made.folder / "prepare") == {}
