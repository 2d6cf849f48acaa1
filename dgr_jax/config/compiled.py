"""Programs that XLA compiled, kept for the next command in the user's cache folder.

JAX reads where they are from the environment when it is imported, so this is done before.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import platform
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from dgr_jax import interrupts, processes, traced

logger = logging.getLogger(__name__)

VARIABLE = "DGR_JAX_COMPILATION_CACHE"
MOST_BYTES = 1 << 30  # beyond it, the oldest programs are removed
_LEAST_SECONDS = "0.05"  # what compiles faster is not kept
_OFF = ("off", "0", "no", "false")
_SEVERAL = ("distributed", *processes.VARIABLES)


def add_flag(p: argparse.ArgumentParser) -> None:
    """Adds the flag that turns it off."""
    p.add_argument(
        "--compilation_cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep compiled programs in the user's cache folder; off by "
        f"--no-compilation_cache, or {VARIABLE}=off",
    )


def keep(args: argparse.Namespace) -> None:
    """Has JAX keep what it compiles, and find what it has kept.

    Without effect where the flag or the variable says so, where the user has told JAX a folder,
    where the folder cannot be written, for several processes together, which must all compile the
    same, and in a program that is not a command of ours.
    """
    off = not args.compilation_cache or os.environ.get(VARIABLE, "").lower() in _OFF
    told = "JAX_COMPILATION_CACHE_DIR" in os.environ or "jax" in sys.modules
    if off or told or _is_several(args) or not interrupts.is_program():
        return
    try:
        kept = folder()
        kept.mkdir(parents=True, exist_ok=True)
        prune(kept)
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        return
    if not os.access(kept, os.W_OK | os.X_OK):
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(kept)
    traced.keep_in(kept)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", _LEAST_SECONDS)
    mend(kept)


def folder() -> Path:
    """Where programs for this processor are kept; another one may lack instructions of theirs, and
    older Pythons cannot read those of Python 3.14.

    Raises RuntimeError where there is no home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    mark = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        mark += [next((line for line in lines if line.startswith(("flags", "Features"))), "")]
    if sys.version_info >= (3, 14):  # JAX packs programs with zstd there, under the names of zlib's
        mark += ["zstd"]
    return root / "dgr_jax" / "compiled" / hashlib.sha256("".join(mark).encode()).hexdigest()[:12]


def prune(kept: Path, most: int = MOST_BYTES) -> None:
    """Removes the oldest files of a folder until half of so many bytes are left, where there are
    more."""
    files = []
    for entry in os.scandir(kept):
        with contextlib.suppress(FileNotFoundError):  # another command removes it too
            said = entry.stat()
            files.append((said.st_mtime, said.st_size, entry.path))
    left = sum(size for _, size, _ in files)
    if left <= most:
        return
    for _, size, path in sorted(files):
        if left <= most // 2:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
        left -= size


def mend(kept: Path) -> None:
    """From now on, where JAX warns that it cannot read a kept program, all are removed, so that
    they are made again; where it cannot write one, nothing is said: it was not asked for."""
    shown = warnings.showwarning

    def show(message: Any, *place: Any, **more: Any) -> None:
        text = str(message)
        if text.startswith("Error reading persistent compilation cache"):
            logger.warning("%s: a compiled program is damaged; all are made again", kept)
            for path in kept.iterdir():
                with contextlib.suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif not text.startswith("Error writing persistent compilation cache"):
            shown(message, *place, **more)

    warnings.showwarning = show


def _is_several(args: argparse.Namespace) -> bool:
    joined = any(getattr(args, name, None) for name in _SEVERAL)
    variables = (*processes.VARIABLES.values(), "SLURM_STEP_NUM_TASKS")
    return joined or any(os.environ.get(name) for name in variables)
