"""What a run writes about itself: metrics.jsonl, TensorBoard where installed, one progress line."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from dgr_jax.data import loading
from dgr_jax.model_dir import kept

logger = logging.getLogger(__name__)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; the first that is none, such as a last line cut off by a killed
    process, is left out with all that follow."""
    rows = []
    for line in kept.opened(path).read_bytes().splitlines():
        try:
            row = json.loads(line)
            int(row["step"])
        except kept.UNREADABLE:
            break
        rows.append(row)
    return rows


def _keep_until(path: Path, step: int) -> None:
    """Drops the rows after `step`: a resumed run writes them again."""
    if not path.exists():
        return
    rows = [row for row in read_jsonl(path) if row["step"] <= step]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


@functools.cache
def _summary_writers() -> Any:
    """The module of clu's writers of TensorBoard summaries, or None where TensorFlow, TensorBoard
    or clu is missing, which is said once."""
    # TensorFlow only writes files here; without this it would take the accelerator's memory.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    try:
        with loading.quietly():
            import tensorboard  # noqa: F401
            from clu import metric_writers
    except ImportError as error:
        logger.info("no TensorBoard summaries (%s): metrics go to metrics.jsonl only", error)
        return None
    return metric_writers


def _tensorboard(folder: Path) -> Any:
    """A writer of TensorBoard summaries, or None."""
    if (writers := _summary_writers()) is None:
        return None
    return writers.AsyncWriter(writers.SummaryWriter(str(folder)))


class MetricsWriter:
    """Appends rows {"step": ..., name: value} to metrics.jsonl, and to TensorBoard's files, in the
    folder tensorboard beside it, where TensorBoard is installed.

    Only the first process of a pod should make one.
    """

    def __init__(self, folder: str | Path, *, after: int = 0) -> None:
        """Args:
        folder: made if absent.
        after: the step that the run goes on from; rows after it are dropped.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        _keep_until(path, after)
        self._file = path.open("a", encoding="utf-8")
        self._summaries = _tensorboard(folder / "tensorboard")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row; a value that is not finite is written as null."""
        row = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        if self._summaries is not None:
            self._summaries.write_scalars(step, row)

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        if self._summaries is not None:
            self._summaries.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """42 -> '0:42', 3700 -> '1:01:40'."""
    seconds = max(0, round(seconds))
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def progress_line(
    name: str, step: int, total: int, loss: float, examples_per_second: float, seconds: float
) -> str:
    """'generate 300/600 | loss 1.234 | 512 examples/s | 0:42 left'; before the first look at the
    clock, without what is not known yet."""
    known = f"{name} {step}/{total} | loss {loss:.4g}"
    if not math.isfinite(examples_per_second):
        return known
    rate = f"{examples_per_second:,.{0 if examples_per_second >= 10 else 1}f}"
    return f"{known} | {rate} examples/s | {duration(seconds)} left"


class Progress:
    """Shows progress lines: one line rewritten in place on a terminal, log records elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._shown = False

    def show(self, line: str) -> None:
        """Shows `line` in place of the one before."""
        if not self._live:
            logger.info("%s", line)
            return
        self._stream.write(f"\r\x1b[2K{line}")
        self._stream.flush()
        self._shown = True

    def close(self) -> None:
        """Ends the line, so that what follows starts on its own."""
        if self._shown:
            self._stream.write("\n")
            self._stream.flush()
            self._shown = False


class Speed:
    """Seconds per step since the last look; the first look only starts the clock."""

    def __init__(self) -> None:
        self._time: float | None = None
        self._step = 0
        self.seconds_per_step = math.nan

    def look(self, step: int) -> float:
        """Seconds per step of the steps since the last look; what it was, if there are none."""
        now = time.monotonic()
        if self._time is not None and step > self._step:
            self.seconds_per_step = (now - self._time) / (step - self._step)
        self._time, self._step = now, step
        return self.seconds_per_step
