"""One writer in a MODEL_DIR: a second one is told who it is, and a dead one does not count."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from dgr_jax.model_dir import writer_lock

HOLD = """
    import sys, time
    from dgr_jax.model_dir import writer_lock
    with writer_lock.held(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds tmp_path/model until its input ends or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path / "model")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(writer_lock, "PATIENCE", 0.0)


def test_the_second_writer_is_told_who_the_first_one_is(tmp_path, other):
    said = rf"being written by process {other.pid} on \S+ since \d{{4}}-.* UTC \(.*\). Wait for it"
    with pytest.raises(writer_lock.Locked, match=said):
        writer_lock.take(tmp_path / "model")
    assert f"process {other.pid} " in writer_lock.holder(tmp_path / "model")


def test_what_the_first_one_leaves_can_be_taken(tmp_path, other):
    other.communicate("")
    assert writer_lock.holder(tmp_path / "model") == ""
    with writer_lock.held(tmp_path / "model"):
        assert writer_lock.holder(tmp_path / "model") == "this process"


def test_a_dead_writer_is_no_writer(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "model" / writer_lock.FILE).exists()
    assert writer_lock.holder(tmp_path / "model") == ""
    with writer_lock.held(tmp_path / "model"):
        told = json.loads((tmp_path / "model" / writer_lock.FILE).read_text())
    assert told["process"] == os.getpid()
    assert not (tmp_path / "model").joinpath(writer_lock.FILE).exists()


def test_of_another_host_it_is_said_how_its_lock_is_removed(tmp_path, other, monkeypatch):
    """A lock that a file server keeps although its host is gone."""
    with pytest.raises(writer_lock.Locked) as here:
        writer_lock.take(tmp_path / "model")
    assert "has ended" not in str(here.value)
    monkeypatch.setattr(writer_lock.socket, "gethostname", lambda: "elsewhere")
    with pytest.raises(writer_lock.Locked, match="; if it has ended, remove .*model/.lock$"):
        writer_lock.take(tmp_path / "model")


def test_a_reader_that_looks_takes_nothing_from_the_writer(tmp_path, other):
    for _ in range(3):
        writer_lock.holder(tmp_path / "model")
    with pytest.raises(writer_lock.Locked):
        writer_lock.take(tmp_path / "model")


def test_the_same_process_may_take_it_twice(tmp_path):
    with writer_lock.held(tmp_path):
        writer_lock.take(tmp_path)
        assert writer_lock.holder(tmp_path) == "this process"
    assert writer_lock.holder(tmp_path) == ""


def test_a_lock_whose_file_was_removed_meanwhile_is_not_taken_for_it(tmp_path, monkeypatch):
    """Between opening and locking the file, its writer removes it and leaves; a third one comes."""
    real, removed = writer_lock._try, []

    def lock(file, **kind):
        if not removed:
            removed.append(os.unlink(file.name))
            (tmp_path / writer_lock.FILE).write_text("of a third one")
        return real(file, **kind)

    monkeypatch.setattr(writer_lock, "PATIENCE", 1.0)
    monkeypatch.setattr(writer_lock, "_try", lock)
    with writer_lock.held(tmp_path):
        told = json.loads((tmp_path / writer_lock.FILE).read_text())
    assert told["process"] == os.getpid()


def test_a_folder_made_for_the_lock_alone_goes_again(tmp_path):
    with writer_lock.held(tmp_path / "model"):
        pass
    assert not (tmp_path / "model").exists()


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with writer_lock.held(tmp_path):
        pass
    assert caplog.messages == [
        f"MODEL_DIR {tmp_path} cannot be locked (No locks available): let no second command write "
        "there meanwhile"
    ]


def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(type(tmp_path), "open", refuse)
    with writer_lock.held(tmp_path):
        assert writer_lock.holder(tmp_path) == ""


def refuse_to_append(monkeypatch, folder):
    """The lock's file is of another user: it may be read, not written into."""
    real = type(folder).open

    def opened(path, mode="r", **how):
        if path.exists() and "a" in mode:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, mode, **how)

    monkeypatch.setattr(type(folder), "open", opened)


def test_a_writer_of_another_user_is_a_writer(tmp_path, other, monkeypatch):
    refuse_to_append(monkeypatch, tmp_path)
    with pytest.raises(writer_lock.Locked, match=f"written by process {other.pid} "):
        writer_lock.take(tmp_path / "model")
    assert (tmp_path / "model" / writer_lock.FILE).exists()


def test_a_dead_writer_of_another_user_is_none(tmp_path, other, monkeypatch):
    other.send_signal(signal.SIGKILL)
    other.wait()
    refuse_to_append(monkeypatch, tmp_path)
    monkeypatch.setattr(writer_lock, "PATIENCE", 1.0)
    with writer_lock.held(tmp_path / "model"):
        assert writer_lock.holder(tmp_path / "model") == "this process"


def test_where_it_cannot_be_told_whether_another_user_writes_nothing_is_taken(
    tmp_path, monkeypatch
):
    (tmp_path / writer_lock.FILE).write_text("")
    refuse_to_append(monkeypatch, tmp_path)
    access = lambda path, mode: mode != os.R_OK  # nor be read
    monkeypatch.setattr(os, "access", access)
    with pytest.raises(writer_lock.Locked, match=r"of another user\. .* ended, remove .*\.lock"):
        writer_lock.take(tmp_path)
