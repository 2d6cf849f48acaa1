"""Lists of files with sizes and hashes: what they notice, what is read again, what is cleared."""

from __future__ import annotations

import hashlib
import json
import logging
import os

import pytest

from dgr_jax.model_dir import kept
from dgr_jax.model_dir.kept import Damaged

CONTENT = b"the contents of a file"


@pytest.fixture
def model_dir(tmp_path, monkeypatch):
    """A MODEL_DIR with a stage that is done: a file, one in a folder, and a checkpoint."""
    monkeypatch.setattr(kept, "_JUST_CHANGED", 0)
    stage = tmp_path / "model" / "generate"
    for name in (
        "student.json", "arrays/tokens.npy", "metrics.jsonl", "runs/a.trec", "tensorboard/events",
        "checkpoints/3/params/data", "checkpoints/6/params/data", "tfds/records", "x.npy.partial",
        "stage.json.partial", "checkpoints/2.damaged/params/data",
    ):  # fmt: skip
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_bytes(CONTENT)
    for step in ("3", "6"):
        kept.write_manifest(stage / "checkpoints" / step)
    done(stage)
    return tmp_path / "model"


def done(stage):
    record = {"status": "done", kept.KEY: kept.sign(stage)}
    (stage / "stage.json").write_text(json.dumps(record))


def flip(path):
    """Gives a file other contents of the same size."""
    path.write_bytes(b"THE" + path.read_bytes()[3:])


def read_contents(monkeypatch):
    """The names of files whose contents are read from now on."""
    names, digest = [], kept._digest
    monkeypatch.setattr(kept, "_digest", lambda path: names.append(path.name) or digest(path))
    return names


def test_what_a_list_names(model_dir):
    assert list(kept.sign(model_dir / "generate")) == [
        "arrays/tokens.npy",
        "checkpoints/3/files_made.json",
        "checkpoints/6/files_made.json",
        "metrics.jsonl",
        "student.json",
    ]
    listed = json.loads((model_dir / "generate/checkpoints/3/files_made.json").read_text())
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert listed == {"files_made": {"params/data": {"bytes": 22, "sha256": sha256}}}
    assert kept.listed_in(model_dir / "generate/checkpoints") == [
        "3/files_made.json",
        "6/files_made.json",
    ]


def _cut(path):
    path.write_bytes(CONTENT[:5])


DAMAGES = [
    (_cut, "got 5 bytes, expected 22 as it was written; damaged or edited"),
    (flip, "got other contents than the 22 bytes that were written; damaged or edited"),
    (lambda path: path.unlink(), "is missing, expected 22 bytes as it was written"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
@pytest.mark.parametrize("name", ["student.json", "arrays/tokens.npy", "checkpoints/6/params/data"])
def test_damage_is_said_with_the_command_that_mends_it(model_dir, name, damage, message):
    path = model_dir / "generate" / name
    assert kept.opened(path) == path
    damage(path)
    again = f"{path}: {message}. `python -m dgr_jax.train --model_dir={model_dir}` makes it again"
    for look in (kept.opened, kept.whole):
        with pytest.raises(Damaged) as error:
            look(path if look is kept.opened else model_dir / "generate")
        assert str(error.value) == again
        assert error.value.what == f"{path}: {message}"
    kept.opened(model_dir / "generate" / "metrics.jsonl")  # the others are as they were


def test_the_command_of_pseudo_queries(model_dir):
    (model_dir / "config.gin").write_bytes(b"PseudoQueries.model_dir = %MODEL_DIR\n\xff")
    flip(model_dir / "generate/student.json")
    with pytest.raises(Damaged, match=r"`python -m dgr_jax\.pseudo_queries --model_dir=.*` makes"):
        kept.opened(model_dir / "generate/student.json")


def test_a_stage_without_a_list_must_be_removed_to_be_made_again(model_dir):
    stage = model_dir / "generate"
    (stage / "stage.json").write_text('{"status": "done"}')
    with pytest.raises(Damaged) as error:
        kept.read_json(stage / "student.json")
    assert str(error.value).endswith(
        f"; truncated or damaged. Remove {stage}, then `python -m dgr_jax.train "
        f"--model_dir={model_dir}` makes it again"
    )


def test_files_without_a_list_are_opened_as_they_are(model_dir, tmp_path):
    for name in ("generate/runs/a.trec", "generate/tfds/records", "config.gin", "old/file"):
        kept.opened(model_dir / name)  # what is not there is for its reader to say
    assert not kept.is_listed(model_dir / "generate/runs/a.trec")
    (model_dir / "generate/stage.json").write_text('{"status": "done"}')  # older than lists
    (model_dir / "generate/student.json").unlink()
    kept.opened(model_dir / "generate/student.json")
    kept.whole(model_dir / "generate")
    foreign = tmp_path / "foreign"
    (foreign / "inner").mkdir(parents=True)
    for name, text in [("stage.json", "[1]"), ("stage.json", "{"), ("manifest.json", "[]")]:
        (foreign / name).write_text(text)
        kept.opened(foreign / "inner" / "file")


def test_contents_are_read_once(model_dir, monkeypatch):
    names = read_contents(monkeypatch)
    stage = model_dir / "generate"
    for _ in range(2):
        kept.opened(stage / "student.json")
        kept.opened(stage / "checkpoints/6/params/data")
    assert names == ["student.json", "data"]
    os.utime(stage / "student.json")
    kept.opened(stage / "student.json")
    assert names == ["student.json", "data", "student.json"]
    before = (stage / "student.json").stat()
    flip(stage / "student.json")
    os.utime(stage / "student.json", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(Damaged, match="other contents"):  # its status has changed
        kept.opened(stage / "student.json")


def test_a_file_that_changed_a_moment_ago_is_read_again(model_dir, monkeypatch):
    monkeypatch.setattr(kept, "_JUST_CHANGED", 10**12)
    names = read_contents(monkeypatch)
    for _ in range(2):
        kept.opened(model_dir / "generate/student.json")
    assert names == ["student.json"] * 2


@pytest.mark.parametrize("spoiled", ["", "{", '{"generate/large.npy": [1]}', "[]"])
def test_what_was_read_is_remembered_for_the_next_process(model_dir, monkeypatch, spoiled):
    stage = model_dir / "generate"
    (stage / "large.npy").write_bytes(bytes(kept.LARGE))
    done(stage)
    kept.whole(stage)
    remembered = json.loads((model_dir / "checked.json").read_text())
    assert list(remembered) == ["generate/large.npy"]  # small files are read again

    def another_process():
        monkeypatch.setattr(kept, "_looks", {})
        monkeypatch.setattr(kept, "_remembered", set())
        return read_contents(monkeypatch)

    names = another_process()
    kept.opened(stage / "large.npy")
    assert names == []
    flip(stage / "large.npy")
    with pytest.raises(Damaged, match="other contents"):
        kept.opened(stage / "large.npy")
    (stage / "large.npy").write_bytes(bytes(kept.LARGE))
    if spoiled:
        (model_dir / "checked.json").write_text(spoiled)
    names = another_process()
    kept.opened(stage / "large.npy")
    assert names == ["large.npy"]
    assert list(json.loads((model_dir / "checked.json").read_text())) == ["generate/large.npy"]


def test_a_look_that_takes_long_is_said(model_dir, monkeypatch, caplog):
    monkeypatch.setattr(kept, "HUGE", 22)
    with caplog.at_level(logging.INFO, logger="dgr_jax"):
        kept.opened(model_dir / "generate/student.json")
        kept.opened(model_dir / "generate/student.json")
    path = model_dir / "generate/student.json"
    assert caplog.messages == [f"{path}: 0.0 GB are compared with what was written"]


def test_a_model_dir_that_cannot_be_written_is_read_without_a_memory(model_dir, monkeypatch):
    (model_dir / "generate/large.npy").write_bytes(bytes(kept.LARGE))
    done(model_dir / "generate")

    def refuses(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(kept, "_write_json", refuses)
    kept.whole(model_dir / "generate")
    assert not (model_dir / "checked.json").exists()


def test_other_processes_leave_contents_to_the_first(model_dir, monkeypatch):
    monkeypatch.setitem(kept._process, "reads contents", True)
    kept.leave_contents_to_others()
    names = read_contents(monkeypatch)
    flip(model_dir / "generate/student.json")
    kept.opened(model_dir / "generate/student.json")
    _cut(model_dir / "generate/metrics.jsonl")
    with pytest.raises(Damaged, match="got 5 bytes, expected 22"):
        kept.opened(model_dir / "generate/metrics.jsonl")
    assert names == []


@pytest.mark.parametrize("name", ["../../mine.txt", "/tmp/mine.txt", "a/../../../mine.txt"])
def test_a_list_names_nothing_outside_its_folder(model_dir, tmp_path, name):
    (tmp_path / "mine.txt").write_text("mine")
    stage = model_dir / "generate"
    record = json.loads((stage / "stage.json").read_text())
    record["files_made"][name] = {"bytes": 1, "sha256": ""}
    (stage / "stage.json").write_text(json.dumps(record))
    kept.whole(stage)
    kept.clear(stage)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    step = stage / "checkpoints/6"
    (step / "files_made.json").write_text(json.dumps({"files_made": {name: {"bytes": 1}}}))
    with pytest.raises(Damaged, match=r"files_made\.json: cannot be read"):
        kept.whole(step)


def test_a_damaged_list_is_damage(model_dir):
    manifest = model_dir / "generate/checkpoints/6/files_made.json"
    good = manifest.read_bytes()
    for spoiled in (b"", good[:20], b'{"files_mode": {}}', b'{"files_made": [1]}', b"\xff"):
        manifest.write_bytes(spoiled)
        with pytest.raises(Damaged, match=r"files_made\.json: "):
            kept.whole(manifest.parent)
    manifest.unlink()
    with pytest.raises(Damaged, match=r"files_made\.json: is missing"):
        kept.whole(manifest.parent)
    manifest.write_bytes(good)
    kept.whole(manifest.parent)


def test_a_new_file_takes_its_name_with_its_hash(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    for name in ("a.trec", "b.trec"):
        (folder / "written").write_bytes(name.encode())
        kept.adopt(folder / "written", folder / name)
    assert kept.is_listed(folder / "a.trec") and kept.is_listed(folder / "b.trec")
    (folder / "files_made.json").write_text("{")
    with pytest.raises(Damaged, match=r"files_made\.json: cannot be read"):
        kept.is_listed(folder / "a.trec")
    (folder / "written").write_bytes(b"again")
    kept.adopt(folder / "written", folder / "a.trec")
    assert kept.is_listed(folder / "a.trec")


def test_clearing_leaves_whole_checkpoints_and_what_others_put_there(model_dir):
    stage = model_dir / "generate"
    (stage / "notes.txt").write_text("mine")
    flip(stage / "checkpoints/6/params/data")
    kept.clear(stage)
    left = sorted(p.relative_to(stage).as_posix() for p in stage.rglob("*") if p.is_file())
    assert left == [
        "checkpoints/2.damaged/params/data",
        "checkpoints/3/files_made.json",
        "checkpoints/3/params/data",
        "checkpoints/6.damaged/files_made.json",
        "checkpoints/6.damaged/params/data",
        "metrics.jsonl",
        "notes.txt",
        "stage.json",
        "stage.json.partial",
        "tensorboard/events",
        "x.npy.partial",
    ]
    flip(stage / "checkpoints/3/params/data")
    kept.clear(stage)
    left = sorted(p.relative_to(stage).parts[0] for p in stage.rglob("*") if p.is_file())
    assert "metrics.jsonl" not in left and "tensorboard" not in left


def test_reading_explains_what_the_contents_raise(model_dir):
    path = model_dir / "file.json"
    for content in (b"", b"{", b"\xff", b"[1]", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(
            Damaged, match=rf"^{path}: cannot be read \(.*\); truncated or damaged$"
        ):
            kept.read_json(path)
    path.write_bytes(b"[1]")
    assert kept.read_json(path, list) == [1]
    with pytest.raises(FileNotFoundError, match="there is no such file. `python -m dgr_jax.train"):
        kept.read_json(model_dir / "generate" / "none.json")
    with pytest.raises(PermissionError), kept.reading(path):  # the machine's fault, not the file's
        raise PermissionError(13, "Permission denied")
