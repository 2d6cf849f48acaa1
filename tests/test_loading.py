"""What TensorFlow's libraries write as they are loaded."""

import os

import pytest

from dgr_jax.data import loading

HEADER = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
INFO = "I0000 00:00:1.5    8415 cudart_stub.cc:31] Could not find cuda drivers on your machine\n"
ERROR = "E0000 00:00:1.5    8415 plugin.cc:7] I0000 the plugin is broken\n"


def load(*lines):
    with loading.quietly():
        os.write(2, "".join(lines).encode())


@pytest.mark.parametrize(
    ("level", "kept"), [("2", ERROR), ("1", ERROR), ("0", HEADER + INFO + ERROR)]
)
def test_only_chatter_is_left_out(level, kept, monkeypatch, capfd):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", level)
    load(HEADER, INFO, ERROR)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == kept + "after\n"


def test_nothing_is_touched_unless_asked(monkeypatch, capfd):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    load(HEADER, INFO)
    assert capfd.readouterr().err == HEADER + INFO


def test_a_failing_import_fails_and_is_heard(monkeypatch, capfd):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    with pytest.raises(ImportError, match="cannot load"), loading.quietly():
        os.write(2, (INFO + ERROR).encode())
        raise ImportError("cannot load")
    assert capfd.readouterr().err == ERROR
