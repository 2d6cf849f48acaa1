"""Distillation enhanced generative retrieval in JAX."""

import importlib
import os
import signal
import sys

from dgr_jax import moved

__version__ = "0.2.0"


def _end_early(*_: object) -> None:
    """Ends without a traceback at Ctrl-C while a command is still imported: nothing was begun."""
    os.write(2, b"interrupted: nothing was begun\n")
    os._exit(130)


# Only for `python -m dgr_jax.train` and the others, until `dgr_jax.interrupts` listens.
_arguments = zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
if any(flag == "-m" and module.startswith("dgr_jax.") for flag, module in _arguments):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_early)


# What the package offers by itself -> where it is; `__init__.pyi` tells editors of it.
_OFFERED = {"GenerativeRetriever": "config.builder", "Retriever": "retrieval.retriever"}


def __getattr__(name: str) -> object:
    """`from dgr_jax import Retriever`, imported when it is asked for: it needs JAX."""
    if name in _OFFERED:
        return getattr(importlib.import_module(f"dgr_jax.{_OFFERED[name]}"), name)
    raise AttributeError(f"module 'dgr_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_OFFERED]


moved.install()
