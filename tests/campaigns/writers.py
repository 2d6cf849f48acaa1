"""Two writers and a reader on one MODEL_DIR.

    python tests/campaigns/writers.py --reads=200

Two processes start commands with two seeds at random: each command is done, or refused because the
other one writes. Meanwhile the folder is opened and asked: every answer must be that of a whole
student of one of the seeds over its own identifiers, or an error that names what is missing. Exit
status 1 where anything else happens.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from small import TINY, report, run, start

from dgr_jax.retrieval.retriever import Retriever

QUESTIONS = ["Why do bees dance?", "What is a button cell?", "How does a lighthouse shine?"]
SEEDS = (0, 1)
PAUSE = 0.5  # seconds between reads, so that there are commands enough beside them
SYSTEMS = ("generate", "control", "distill")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reads", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(campaign(Path(folder), args.reads, args.seed))


def answers(model_dir: Path, system: str | None = None) -> tuple:
    """What the questions find, with scores."""
    hits = Retriever.load(model_dir, system=system).search(QUESTIONS, k=5)
    return tuple((hit.pid, hit.score) for found in hits for hit in found)


def campaign(folder: Path, reads: int, seed: int) -> int:
    """Exit status."""
    known = {}
    for number in SEEDS:
        whole = folder / f"whole-{number}"
        flags = (*TINY, f"--gin.SEED={number}", f"--model_dir={whole}")
        code, said = run("dgr_jax.train", *flags, folder=folder)
        if code:
            print(said)
            return 1
        known |= {answers(whole, system): f"{system} of seed {number}" for system in SYSTEMS}
    model_dir = folder / "model"
    shutil.copytree(folder / "whole-0", model_dir)
    writers = [Writer(folder, model_dir, random.Random(seed + n)) for n in range(2)]
    counts = dict.fromkeys(("reads", "answers", "errors", "others", "tracebacks", "wrote"), 0)
    for writer in writers:
        writer.start()
    while counts["reads"] < reads:
        counts["reads"] += 1
        time.sleep(PAUSE)
        try:
            answer = answers(model_dir)
            counts["answers" if answer in known else "others"] += 1
        except (ValueError, FileNotFoundError) as error:
            counts["errors"] += 1
            if "trained" not in str(error) and "changed" not in str(error):
                counts["others"] += 1
                print(f"--- {type(error).__name__}: {error}", flush=True)
        if counts["reads"] % 20 == 0:
            report(**counts)
    for writer in writers:
        writer.stop()
    wrong = [said for writer in writers for said in writer.wrong]
    counts["tracebacks"] = len(wrong)
    counts["wrote"] = sum(writer.wrote for writer in writers)
    counts["refused"] = sum(writer.refused for writer in writers)
    print("\n".join(f"--- {said}" for said in wrong))
    report(**counts)
    return int(bool(counts["others"] or wrong))


class Writer(threading.Thread):
    """Starts one command after another in MODEL_DIR."""

    def __init__(self, folder: Path, model_dir: Path, chance: random.Random) -> None:
        super().__init__(daemon=True)
        self.folder, self.model_dir, self.chance = folder, model_dir, chance
        self.wrong: list[str] = []
        self.wrote = self.refused = 0
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.is_set():
            stage = self.chance.choice(("prepare", "prepare", "generate", "evaluate"))
            number = self.chance.choice(SEEDS)
            flags = (f"--model_dir={self.model_dir}", f"--gin.SEED={number}", f"--stages={stage}")
            process = start("dgr_jax.train", *flags, folder=self.folder)
            said = self._said(process)
            if process.returncode == 0:
                self.wrote += 1
            elif process.returncode == 2 and "is being written by process" in said:
                self.refused += 1
                self._over.wait(1)
            elif not self._over.is_set():
                self.wrong.append(f"{stage}, seed {number}: {process.returncode}\n{said[-2000:]}")

    def _said(self, process: subprocess.Popen) -> str:
        while True:
            try:
                return process.communicate(timeout=0.5)[0]
            except subprocess.TimeoutExpired:
                if self._over.is_set():
                    process.kill()

    def stop(self) -> None:
        """Ends it and its command."""
        self._over.set()
        self.join()


if __name__ == "__main__":
    main()
