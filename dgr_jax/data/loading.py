"""Loading TensorFlow without its log lines, or its replacement where it is not installed."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from types import ModuleType

_CHATTER = re.compile(rb"I\d{4} |WARNING: All log messages before absl::InitializeLog")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """A context in which TF_CPP_MIN_LOG_LEVEL also holds while TensorFlow is imported.

    Its native libraries write to stderr while they are loaded, before they read the variable. Where
    it is 1 or more, lines of level INFO are left out and all others are written after the import.
    Where it is not set, this context has no effect.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "0") == "0":
        yield
        return
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            for line in said:
                if not _CHATTER.match(line):
                    os.write(2, line)


def missing() -> str:
    """The reason why SeqIO and TensorFlow Datasets cannot be used; blank where they can."""
    try:
        with quietly():
            import seqio  # noqa: F401
            import tensorflow_datasets  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


def prepared() -> ModuleType:
    """`dgr_jax.data.prepared`, which writes TFDS records, or `direct` without TensorFlow."""
    if missing():
        from dgr_jax.data import direct

        return direct
    with quietly():
        from dgr_jax.data import prepared

    return prepared
