"""Kills a training command at random moments until it is done, and compares what it has made.

    python tests/campaigns/kills.py --kills=50

Signals are SIGKILL, SIGTERM and SIGINT by turns of chance. What is started again must end with the
bytes of a run that nobody has disturbed, without a traceback, and with the exit status of the
signal. Exit status 1 where anything else happens.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from small import TINY, contents, differences, report, run, start

# 75 is EX_TEMPFAIL: a training step was told to stop and has saved; otherwise the signal's own.
EXPECTED = {
    signal.SIGKILL: (-signal.SIGKILL,),
    signal.SIGTERM: (-signal.SIGTERM, 75, 128 + signal.SIGTERM),
    signal.SIGINT: (128 + signal.SIGINT,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        sys.exit(campaign(Path(folder), args.kills, random.Random(args.seed)))


def campaign(folder: Path, kills: int, chance: random.Random) -> int:
    """Exit status."""
    whole = folder / "whole"
    for _ in range(2):  # the second one finds compiled programs, as those that are killed do
        shutil.rmtree(whole, ignore_errors=True)
        began = time.monotonic()
        code, said = run("dgr_jax.train", *TINY, f"--model_dir={whole}", folder=folder)
        if code:
            print(said)
            return 1
    expected, seconds = contents(whole), time.monotonic() - began
    counts = dict.fromkeys(("kills", "runs", "tracebacks", "other_exits", "differences"), 0)
    while counts["kills"] < kills:
        model_dir = folder / "killed"
        shutil.rmtree(model_dir, ignore_errors=True)
        for kind, code, said in killed(folder, model_dir, seconds, chance):
            counts["kills"] += 1
            counts["tracebacks"] += said_too_much("traceback", "Traceback" in said, said)
            wrong = code not in EXPECTED[kind]
            counts["other_exits"] += said_too_much(f"{kind.name} -> {code}", wrong, said)
            if counts["kills"] >= kills:
                break
        code, said = run("dgr_jax.train", *TINY, f"--model_dir={model_dir}", folder=folder)
        other = differences(contents(model_dir), expected) if code == 0 else [f"exit status {code}"]
        counts["differences"] += said_too_much(", ".join(other[:5]), bool(other), said)
        counts["runs"] += 1
        report(**counts)
    return int(any(counts[name] for name in ("tracebacks", "other_exits", "differences")))


def killed(folder: Path, model_dir: Path, seconds: float, chance: random.Random):
    """(signal, exit status, words) of each run that was cut off, until one gets through."""
    while True:
        process = start("dgr_jax.train", *TINY, f"--model_dir={model_dir}", folder=folder)
        try:
            process.communicate(timeout=chance.uniform(0.5, seconds))
            return
        except subprocess.TimeoutExpired:
            kind = chance.choice(list(EXPECTED))
            process.send_signal(kind)
            said = process.communicate()[0]
        if process.returncode == 0:  # it was done already
            return
        yield kind, process.returncode, said


def said_too_much(what: str, wrong: bool, said: str) -> bool:
    """Whether something was wrong; then it is printed with the last words of the command."""
    if wrong:
        print(f"--- {what}\n" + "\n".join(said.strip().splitlines()[-25:]), flush=True)
    return wrong


if __name__ == "__main__":
    main()
