"""Which stages run, which are skipped, taken back or gone on with; and when data has changed."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import logging
import os
import re
import shutil
import subprocess
import sys

import pytest

import dgr_jax
from dgr_jax import shipped
from dgr_jax.corpora.beir import BeirCollection, write_beir
from dgr_jax.corpora.dpr import DprCollection
from dgr_jax.corpora.irds import IrDatasetsCollection
from dgr_jax.corpora.msmarco import MsmarcoCollection
from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.corpora.types import Passage, Qrel, Query
from dgr_jax.data.vocabulary import SentencePiece
from dgr_jax.identifiers.embeddings import FromFile
from dgr_jax.identifiers.rq import ResidualQuantization
from dgr_jax.model_dir import records, versions, writer_lock
from dgr_jax.partitioning import Mesh
from dgr_jax.settings import fingerprint
from dgr_jax.stages import inputs, measures, pipeline
from dgr_jax.teaching.teachers import RunTeacher, VectorTeacher
from tests import test_experiment

BACK = re.compile(r"(\w+): taken back from an earlier run of the same configuration")
SKIPPED = re.compile(r"(\w+): done already, from the same configuration; skipped")


class Killed(BaseException):
    """Ends a stage in the middle, as a signal does."""


class Pipeline:
    """Stages that only write that they ran, in a MODEL_DIR of its own."""

    def __init__(self, folder, caplog):
        self.experiment = dataclasses.replace(test_experiment.BASE, model_dir=str(folder / "model"))
        self.folder = folder / "model"
        self.killed_in = ""
        self._caplog = caplog

    def set(self, path, value):
        """Change one setting."""

        def replace(owner, names):
            first, *rest = names
            inner = replace(getattr(owner, first), rest) if rest else value
            return dataclasses.replace(owner, **{first: inner})

        self.experiment = replace(self.experiment, path.split("."))

    def run(self, *stages, named=()):
        """Names of the stages that ran; what was said is in `said`."""
        ran = []

        def changed(declared):
            stage = declared.name

            def make(experiment, folder):
                ran.append(stage)
                assert records.read_record(folder)["status"] == "running"
                with (folder / "output").open("a") as output:
                    output.write("half ")
                    if self.killed_in == stage:
                        raise Killed
                    output.write("whole ")

            return dataclasses.replace(declared, make=make)

        self._caplog.clear()
        with self._caplog.at_level(logging.INFO, logger="dgr_jax"):
            try:
                pipeline.run(self.experiment, stages or None, named=named, changed=changed)
            except Killed:
                ran.append("killed")
        return ran

    @property
    def said(self):
        return self._caplog.messages

    def named(self, form):
        return [found[1] for line in self.said if (found := form.fullmatch(line))]

    def output(self, stage):
        return (self.folder / stage / "output").read_text()

    def record(self, stage):
        return json.loads((self.folder / stage / "stage.json").read_text())


@pytest.fixture
def made(tmp_path, caplog):
    return Pipeline(tmp_path, caplog)


@pytest.fixture
def data(tmp_path):
    """A BEIR folder with splits train, test and other."""
    folder = tmp_path / "data"
    qrels = {split: [Qrel("q", "p", 1)] for split in ("train", "test", "other")}
    write_beir(folder, [Passage("p", "text")], [Query("q", "why")], qrels)
    return folder


@pytest.fixture
def on_data(made, data):
    made.set("collection", BeirCollection(str(data)))
    return made


ALL = list(test_experiment.BASE.stages)


def test_all_stages_run_in_order_and_are_skipped_the_second_time(made):
    assert made.run() == ALL
    assert [line for line in made.said if line.endswith("started")] == [
        f"{s}: started" for s in ALL
    ]
    assert made.run() == []
    assert made.named(SKIPPED) == ALL


def test_leftovers_of_killed_runs_are_removed_by_the_next(made, tmp_path):
    made.run()
    kept = {path for path in made.folder.rglob("*")}
    elsewhere = tmp_path / "shared"
    (made.folder / "control").rename(elsewhere)
    (made.folder / "control").symlink_to(elsewhere)  # as in a study
    for name in (
        "prepare/arrays/labelled.partial-12/rows.npy", "prepare/arrays/labelled.old-7/rows.npy",
        "prepare/trie/edges.tmp.npy", "distill/runs/.distill.test-ab.trec.99.partial",
        "distill/runs/distill.test-ab.partial.trec", "prepare/identifiers/lines.part",
        "candidates/part.partial.npz", "generate/metrics.jsonl.partial", "config.gin.partial",
        "previous/generate/model.safetensors.tmp", "control/stage.json.partial",
    ):  # fmt: skip
        (made.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (made.folder / name).write_text("half")
    assert made.run() == []  # nobody is disturbed where nothing is to do
    assert (made.folder / "config.gin.partial").is_file()
    others = made.folder / "another/arrays.partial", made.folder / "download.partial"
    for path in others:  # not of the stages
        path.parent.mkdir(exist_ok=True)
        path.write_text("of somebody")
    made.set("evaluate.measures", ("RR@5",))
    assert made.run() == ["evaluate"]
    assert all(path.exists() for path in others)
    kept |= {others[0].parent, *others}
    left = {path for path in made.folder.rglob("*") if "previous" not in path.parts} - kept
    names = ("prepare/arrays", "prepare/trie", "prepare/identifiers", "distill/runs")
    emptied = {made.folder / name for name in names}
    assert left == emptied
    assert sorted(path.name for path in elsewhere.iterdir()) == ["output", "stage.json"]
    assert not list(made.folder.rglob("*.tmp")) and len(kept) > 20


def test_the_record_of_a_finished_stage(made):
    made.run()
    record = made.record("candidates")
    names = {"status", "fingerprint", "settings", "seconds", "versions", "files_made"}
    assert record.keys() == names
    assert record["files_made"]["output"]["bytes"] == len("half whole ")
    assert record["status"] == "done"
    assert record["versions"] == versions.here()
    assert record["fingerprint"] == fingerprint(record["settings"])
    assert record["settings"]["candidates"]["search"]["num_beams"] == 100
    assert record["settings"]["generate"]["prepare"]["prepare"]["tasks"] == "quickstart"


def _edit(path):
    path.write_text("HALF whole ")


def _empty(path):
    path.write_text("")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_edit, "got other contents than the 11 bytes that were written; damaged or edited"),
        (_empty, "got 0 bytes, expected 11 as it was written; damaged or edited"),
        (lambda path: path.unlink(), "is missing, expected 11 bytes as it was written"),
    ],
)
def test_a_damaged_stage_is_made_again_from_nothing(made, damage, message):
    made.run()
    output = made.folder / "teach" / "output"
    damage(output)
    (made.folder / "teach" / "notes").write_text("of somebody")
    assert made.run() == ["teach"]
    assert f"teach: {output}: {message}; made again" in made.said
    assert made.output("teach") == "half whole "
    assert (made.folder / "teach" / "notes").read_text() == "of somebody"
    assert made.run() == []


def test_a_damaged_stage_that_is_made_again_otherwise_is_said(made):
    made.run()
    record = made.folder / "prepare" / "stage.json"
    record.write_text(record.read_text().replace('"bytes": 11', '"bytes": 12'))
    made.killed_in = "prepare"
    assert made.run("prepare") == ["prepare", "killed"]
    made.killed_in = ""
    assert made.run("prepare") == ["prepare"]
    said = "prepare: was made again with other contents than before (output), as by other versions"
    assert any(line.startswith(said) for line in made.said)
    assert any("generate, candidates, teach, distill, control, evaluate" in s for s in made.said)
    assert "files_before" not in made.record("prepare")
    for _ in range(2):  # what was cut off before is not; then the same
        _empty(made.folder / "prepare" / "output")
        made.run("prepare")
    assert not any("other contents than before" in line for line in made.said)


def test_a_damaged_stage_that_is_killed_while_it_is_made_again_goes_on(made):
    made.run()
    _empty(made.folder / "distill" / "output")
    made.killed_in = "distill"
    assert made.run() == ["distill", "killed"]
    made.killed_in = ""
    assert made.run() == ["distill"]
    assert made.run() == []


def test_a_damaged_stage_without_its_data_stays_as_it_is(on_data, data):
    on_data.run()
    output = on_data.folder / "prepare" / "output"
    _edit(output)
    shutil.rmtree(data)
    with pytest.raises(ValueError) as error:
        on_data.run()
    assert str(error.value).startswith(f"{output}: got other contents than the 11 bytes")
    assert "; prepare cannot be made again: " in str(error.value)
    assert output.read_text() == "HALF whole "


def test_a_stage_that_was_put_aside_damaged_is_made_again(made):
    made.run("prepare")
    made.set("prepare.seed", 7)
    made.run("prepare")
    _edit(made.folder / "previous" / "prepare" / "output")
    made.set("prepare.seed", 0)
    assert made.run("prepare") == ["prepare"]
    assert any(line.endswith("; made again") for line in made.said)
    assert made.output("prepare") == "half whole "


def test_a_stage_of_an_older_version_is_trusted(made):
    made.run()
    record = made.record("teach")
    del record["files_made"]
    (made.folder / "teach" / "stage.json").write_text(json.dumps(record))
    _edit(made.folder / "teach" / "output")
    assert made.run() == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_an_unreadable_record_is_said(made, content):
    made.run("prepare")
    record = made.folder / "prepare" / "stage.json"
    record.write_bytes(content)
    assert made.run("prepare") == ["prepare"]
    assert f"prepare: {record} cannot be read; made again" in made.said
    assert made.run("prepare") == []


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["prepare"], ["prepare"]),
        (["teach"], ["prepare", "generate", "candidates", "teach"]),
        (["control"], ["prepare", "generate", "control"]),
        (["generate", "prepare"], ["prepare", "generate"]),
        (["evaluate"], ALL),
    ],
)
def test_a_stage_brings_those_that_it_reads(made, asked, expected):
    assert made.run(*asked) == expected


def test_an_unknown_stage(made):
    with pytest.raises(ValueError, match="unknown stage 'genrate', expected one of .*'generate'"):
        made.run("genrate")
    assert not made.folder.exists()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("generate.batch_size", 12, "generate: got Training.batch_size=12, expected a multiple of"),
        ("distill.list_batch_size", 6, "distill: got Training.list_batch_size=6, expected a mult"),
        ("distill.microbatches", 4, "distill: got Training.list_batch_size=16, expected .* of 32"),
        ("mesh", Mesh(data=3), "mesh: got Mesh.data=3, .* expected a product of 8, the number of"),
    ],
)
def test_batches_that_devices_cannot_share_are_refused_before_work_starts(
    made, path, value, message
):
    made.set(path, value)
    with pytest.raises(ValueError, match=message):
        made.run()
    assert made.run("prepare") == ["prepare"]  # other devices may train


def test_finished_stages_ask_for_no_devices(made):
    made.run()
    made.set("mesh", Mesh(data=3))
    assert made.run() == []


def test_control_can_be_left_out(made):
    made.set("control", False)
    assert made.run() == [stage for stage in ALL if stage != "control"]
    made.set("control", True)
    assert made.run() == ["control", "evaluate"]


def test_a_changed_setting_reruns_the_stage_and_those_after_it(made):
    made.run()
    made.set("teach.lists.size", 7)
    assert made.run() == ["teach", "distill", "evaluate"]
    assert made.named(SKIPPED) == ["prepare", "generate", "candidates", "control"]
    assert "teach: settings changed (teach.lists.size); made again" in made.said
    assert "distill: settings changed (teach.teach.lists.size); made again" in made.said
    assert made.output("teach") == "half whole "


def test_settings_without_effect_rerun_nothing(made):
    made.run()
    for training in ("generate", "distill"):
        made.set(f"{training}.log_every", 1)
        made.set(f"{training}.checkpoint_every", 1)
    assert made.run() == []


def test_what_was_made_is_taken_back_with_its_settings(made):
    made.run()
    (made.folder / "teach" / "mark").write_text("first")
    made.set("teach.lists.size", 7)
    made.run()
    (made.folder / "teach" / "mark").write_text("second")
    made.set("teach.lists.size", 5)
    assert made.run() == []
    assert made.named(BACK) == ["teach", "distill", "evaluate"]
    assert (made.folder / "teach" / "mark").read_text() == "first"
    made.set("teach.lists.size", 7)
    assert made.run() == []
    assert (made.folder / "teach" / "mark").read_text() == "second"


@pytest.fixture
def swapped(made):
    """`prepare` with the seed 1, and what it was with the seed 0 put aside."""
    made.run("prepare")
    made.set("prepare.seed", 1)
    made.run("prepare")
    made.place, made.aside = made.folder / "prepare", made.folder / "previous" / "prepare"
    made.swap = made.folder / "previous" / "prepare.swap"
    return made


def seeds(made):
    """seed of prepare -> where it lies."""
    found = {f: records.read_record(f) for f in (made.place, made.aside, made.swap)}
    return {
        record["settings"]["prepare"]["seed"]: folder.relative_to(made.folder).as_posix()
        for folder, record in found.items()
        if record
    }


def run_until(made, monkeypatch, renames):
    """Runs `prepare` in a process that is killed after so many folders were renamed."""
    left, real = [renames], type(made.folder).rename

    def rename(path, target):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(made.folder), "rename", rename)
        return made.run("prepare")


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_process_killed_while_versions_change_places_loses_neither(
    swapped, monkeypatch, renames, seed
):
    swapped.set("prepare.seed", 0)
    assert run_until(swapped, monkeypatch, renames) == (["killed"] if renames < 3 else [])
    swapped.set("prepare.seed", seed)
    assert swapped.run("prepare") == []
    assert seeds(swapped) == {seed: "prepare", 1 - seed: "previous/prepare"}


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_process_killed_while_it_puts_a_version_aside_does_not_lose_it(
    swapped, monkeypatch, renames
):
    swapped.set("prepare.seed", 2)
    run_until(swapped, monkeypatch, renames)
    swapped.set("prepare.seed", 1)
    assert swapped.run("prepare") == []
    swapped.set("prepare.seed", 3)
    swapped.run("prepare")
    assert seeds(swapped) == {3: "prepare", 1: "previous/prepare"}
    assert sorted(path.name for path in swapped.aside.parent.iterdir()) == ["prepare"]


def test_what_older_versions_left_when_they_were_killed_is_put_in_its_place(swapped):
    swapped.place.rename(swapped.swap)  # what is aside was removed, in part
    (swapped.aside / "stage.json").unlink()
    assert swapped.run("prepare") == []
    assert seeds(swapped) == {1: "prepare"}
    shutil.copytree(swapped.place, swapped.swap)
    swapped.set("prepare.seed", 2)
    swapped.run("prepare")
    assert seeds(swapped) == {2: "prepare", 1: "previous/prepare"}
    shutil.copytree(swapped.place, swapped.swap)
    assert swapped.run("prepare") == []
    assert not swapped.swap.exists()


def test_only_the_latest_other_output_is_kept(made):
    for size in (5, 6, 7):
        made.set("teach.lists.size", size)
        made.run()
    made.set("teach.lists.size", 5)
    assert made.run() == ["teach", "distill", "evaluate"]
    assert sorted(path.name for path in (made.folder / "previous").iterdir()) == [
        "distill",
        "evaluate",
        "teach",
    ]


def test_a_killed_stage_goes_on_and_the_ones_before_it_are_not_repeated(made):
    made.killed_in = "candidates"
    assert made.run() == ["prepare", "generate", "candidates", "killed"]
    assert made.record("candidates")["status"] == "running"
    made.killed_in = ""
    assert made.run() == ["candidates", "teach", "distill", "control", "evaluate"]
    assert made.output("candidates") == "half half whole "
    assert "candidates: was cut off; goes on" in made.said
    assert made.record("candidates")["status"] == "done"


def test_a_killed_stage_with_other_settings_starts_again(made):
    made.killed_in = "candidates"
    made.run()
    made.killed_in = ""
    made.set("candidates.max_queries", 7)
    made.run()
    assert made.output("candidates") == "half whole "
    made.set("candidates.max_queries", 0)
    assert made.run() == ["candidates"] + ["teach", "distill", "evaluate"]
    assert made.output("candidates") == "half half whole "


def test_a_folder_without_a_readable_record_is_made_again(made):
    made.run()
    (made.folder / "teach" / "stage.json").write_text('{"status": "do')
    assert made.run() == ["teach"]
    assert made.output("teach") == "half whole "


def test_a_failing_stage_is_not_done(made, monkeypatch):
    def fails(experiment, folder):
        raise ValueError("cannot")

    changed = functools.partial(dataclasses.replace, make=fails)
    with pytest.raises(ValueError, match="cannot"):
        pipeline.run(made.experiment, ["prepare"], changed=changed)
    assert made.run("prepare") == ["prepare"]


def test_names_of_changed_settings():
    old = {"a": {"b": 1, "c": [1]}, "d": None}
    new = {"a": {"b": 2, "c": [1]}, "e": 3}
    assert records.changed_settings(old, new) == ["a.b", "e"]
    assert records.changed_settings(None, new) == [""]


# data


def test_changed_data_reruns_everything(on_data, data):
    on_data.run()
    assert on_data.run() == []
    with (data / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"_id": "p2", "text": "more"}\n')
    assert on_data.run() == ALL
    assert any("files.collection.corpus.jsonl.sha256" in line for line in on_data.said)


def test_data_of_the_same_size_is_told_apart(on_data, data):
    on_data.run()
    path = data / "queries.jsonl"
    before = path.stat()
    path.write_text(path.read_text().replace("why", "who"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert on_data.run() == ALL


def test_data_that_is_not_read_may_change(on_data, data):
    on_data.run()
    (data / "qrels" / "other.tsv").write_text("query-id\tcorpus-id\tscore\n")
    (data / "README").write_text("hello")
    for path in data.rglob("*"):
        os.utime(path, (1, 1))
    assert on_data.run() == []


def test_data_may_be_moved(on_data, data, tmp_path):
    on_data.run()
    data.rename(tmp_path / "moved")
    on_data.set("collection", BeirCollection(str(tmp_path / "moved")))
    assert on_data.run() == []


def test_a_prepared_experiment_goes_on_without_its_data(on_data, data):
    on_data.run("prepare")
    shutil.rmtree(data)
    assert on_data.run() == ALL[1:]
    assert on_data.run() == []


def test_without_its_data_it_cannot_be_prepared_otherwise(on_data, data):
    on_data.run()
    shutil.rmtree(data)
    on_data.set("prepare.query_length", 7)
    with pytest.raises(FileNotFoundError, match="corpus.jsonl"):
        on_data.run()
    on_data.set("prepare.query_length", 32)
    assert on_data.run() == []
    assert not (on_data.folder / "previous").exists()


def test_part_of_the_data_is_as_good_as_none(on_data, data):
    on_data.run("prepare")
    (data / "queries.jsonl").unlink()
    (data / "corpus.jsonl").write_text("")
    assert on_data.run("generate") == ["generate"]


def test_data_is_asked_for_before_a_cut_off_stage_goes_on(on_data, data):
    on_data.killed_in = "prepare"
    on_data.run()
    shutil.rmtree(data)
    on_data.killed_in = ""
    with pytest.raises(FileNotFoundError, match=r"queries.jsonl"):
        on_data.run()


def test_large_files_are_told_by_size_and_time(on_data, data, monkeypatch):
    monkeypatch.setattr(inputs, "LARGE", 3)
    on_data.run()
    signed = on_data.record("prepare")["settings"]["files"]["collection"]["corpus.jsonl"]
    assert signed.keys() == {"bytes", "modified"}
    assert on_data.run() == []
    os.utime(data / "corpus.jsonl", (1, 1))
    assert on_data.run() == ALL


def test_files_that_settings_name(made, tmp_path):
    model, run = tmp_path / "spiece.model", tmp_path / "run.trec"
    model.write_text("pieces")
    made.set("prepare.vocabulary", SentencePiece(path=str(model)))
    made.set("teach.teacher", RunTeacher(path=str(run)))
    with pytest.raises(FileNotFoundError, match=r"RunTeacher.path: no file at '.*run.trec'; name "):
        made.run()
    assert not made.folder.exists()
    assert made.run("generate") == ["prepare", "generate"]
    run.write_text("q Q0 p 1 1.0 x\n")
    assert made.run() == ALL[2:]
    run.write_text("q Q0 p 1 2.0 x\n")
    assert made.run() == ["teach", "distill", "evaluate"]
    model.unlink()
    assert made.run() == []
    model.write_text("other pieces")
    assert made.run() == ALL


@pytest.mark.parametrize(
    ("at", "make", "names", "stage"),
    [
        (
            "prepare.identifiers",
            lambda path: ResidualQuantization(embeddings=FromFile(path)),
            ["vectors.npy"],
            "prepare",
        ),
        ("prepare.sources.pseudo_query_path", str, ["queries.tsv"], "prepare"),
        ("teach.teacher", VectorTeacher, ["p.npy", "q.npy", "qids.txt"], "teach"),
        ("teach.teacher", RunTeacher, ["run.trec"], "teach"),
    ],
)
def test_changed_files_of_settings_are_noticed(made, tmp_path, at, make, names, stage):
    """Each of them, also where size and time of the file stay as they were."""
    files = [tmp_path / name for name in names]
    for file in files:
        file.write_text("first")
    made.set(at, make(*map(str, files)))
    made.run()
    assert made.run() == []
    for file in files:
        before = file.stat()
        file.write_text("other")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert made.run()[0] == stage
        assert made.run() == []
        file.unlink()
        assert made.run() == []
        made.set("prepare.query_length", made.experiment.prepare.query_length + 1)
        with pytest.raises(FileNotFoundError, match=f": no file at '.*{file.name}'; name another"):
            made.run()
        made.set("prepare.query_length", made.experiment.prepare.query_length - 1)
        file.write_text("other")


def test_queries_are_read_for_measures_of_answers_alone(made):
    """A collection of a library that is not here has no files, and no queries either."""

    class Elsewhere:
        def inputs(self, splits):
            return {}

        def queries(self, split):
            raise ImportError("needs the library")

    made.set("collection", Elsewhere())
    measures.check_measures(made.experiment)
    made.set("evaluate.measures", ("AnswerHits@5",))
    with pytest.raises(ImportError, match="needs the library"):
        measures.check_measures(made.experiment)


def test_measures_are_asked_for_before_anything_runs(made):
    made.set("evaluate.measures", ("RR@10", "Sucess@1"))
    with pytest.raises(ValueError, match="unknown measure 'Sucess@1'"):
        made.run()
    assert not made.folder.exists()
    assert made.run("teach") == ["prepare", "generate", "candidates", "teach"]


def test_what_collections_read(data, tmp_path):
    assert {n: p.name for n, p in BeirCollection(str(data)).inputs(["train", "test"]).items()} == {
        "corpus.jsonl": "corpus.jsonl",
        "queries.jsonl": "queries.jsonl",
        "qrels/train.tsv": "train.tsv",
        "qrels/test.tsv": "test.tsv",
    }
    assert BeirCollection(str(data)).inputs(["no"])["qrels/no.tsv"] is None
    for name in ("collection.tsv", "queries.dev.tsv", "qrels.dev.tsv"):
        (tmp_path / name).write_text("")
    with gzip.open(tmp_path / "queries.train.tsv.gz", "w"):
        pass
    found = MsmarcoCollection(str(tmp_path)).inputs(["train", "dev"])
    assert {name: path and path.name for name, path in found.items()} == {
        "collection.tsv": "collection.tsv",
        "queries.train.tsv": "queries.train.tsv.gz",
        "qrels.train.tsv": None,
        "queries.dev.tsv": "queries.dev.tsv",
        "qrels.dev.tsv": "qrels.dev.tsv",
    }
    assert DprCollection(str(tmp_path)).inputs(["train", "test"]) == {
        "psgs_w100.tsv": None,
        "biencoder-nq-train.json": None,
        "nq-test.qa.csv": None,
    }
    assert QuickstartCollection().inputs(["train"]) == {}
    assert IrDatasetsCollection("beir/scifact").inputs(["test"]) == {}


def test_a_collection_may_have_a_setting_that_is_called_files(made, tmp_path):
    (tmp_path / "collection.tsv").write_text("p\ttext\n")
    files = (("train", "queries.tsv", "qrels.tsv"), ("test", "queries.tsv", "qrels.tsv"))
    (tmp_path / "queries.tsv").write_text("q\twhy\n")
    (tmp_path / "qrels.tsv").write_text("q 0 p 1\n")
    made.set("collection", MsmarcoCollection(str(tmp_path), files=files))
    assert made.run() == ALL
    assert made.run() == []
    assert made.record("prepare")["settings"]["files"].keys() == {
        "collection", "tasks/quickstart.py"
    }  # fmt: skip
    made.set("collection", MsmarcoCollection(str(tmp_path), files=(*files, ("dev", "q", "r"))))
    assert made.run() == ALL


def test_versions_that_changed_are_said_and_nothing_runs_again(made, monkeypatch):
    made.run()
    monkeypatch.setattr(versions, "here", lambda: {"dgr_jax": "9.9", "new_library": "1"})
    assert made.run() == []
    said = (
        f"{', '.join(ALL)}: made by dgr_jax {dgr_jax.__version__} (now 9.9), and used as they are"
    )
    assert made.said[0].startswith(said)


def test_an_edited_task_file_makes_prepare_again(made, tmp_path, monkeypatch):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "quickstart.py").write_text("one")
    monkeypatch.setattr(shipped, "resources", {"tasks": tasks}.get)
    made.run("prepare")
    assert made.run("prepare") == []
    (tasks / "quickstart.py").write_text("two")
    assert made.run("prepare") == ["prepare"]
    assert any("(files.tasks/quickstart.py.sha256)" in line for line in made.said)


def test_stages_made_before_task_files_were_signed_are_not_made_again(made, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "resources", lambda name: tmp_path / "none")
    made.run()
    monkeypatch.undo()
    assert "files" not in made.record("prepare")["settings"]
    assert made.run() == []
    made.set("evaluate.measures", ("RR@5",))
    assert made.run() == ["evaluate"]
    assert "evaluate: settings changed (evaluate.measures); made again" in made.said


def test_what_is_named_must_be_there_also_when_it_was_read_already(on_data, tmp_path):
    on_data.run()
    gone = str(tmp_path / "gone")
    on_data.set("collection", BeirCollection(gone))
    assert on_data.run() == []  # data may be elsewhere by now
    with pytest.raises(FileNotFoundError, match="gone"):
        on_data.run(named={gone})


def test_a_file_that_is_named_must_be_there_also_when_it_was_read_already(made, tmp_path):
    teacher = tmp_path / "run.trec"
    teacher.write_text("q Q0 p 1 1.0 x\n")
    made.set("teach.teacher", RunTeacher(str(teacher)))
    made.run()
    teacher.unlink()
    assert made.run() == []
    with pytest.raises(FileNotFoundError, match="RunTeacher.path: no file at"):
        made.run(named={str(teacher)})


def test_a_second_writer_is_refused_and_nothing_changes(made, monkeypatch):
    made.run()
    monkeypatch.setattr(writer_lock, "PATIENCE", 0.0)
    code = (
        "import sys; from dgr_jax.model_dir import writer_lock; writer_lock.take(sys.argv[1]); "
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(made.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout.readline() == b"held\n"
        made.set("prepare.seed", 1)
        with pytest.raises(writer_lock.Locked, match=f"process {other.pid} "):
            made.run()
        assert made.record("prepare")["settings"]["prepare"]["seed"] == 0
    finally:
        other.communicate()
    assert made.run() == ALL
