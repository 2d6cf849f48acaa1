"""A service under load, while its index and its student are exchanged again and again.

    python tests/campaigns/endurance.py --model_dir=quickstart_model --switches=100 --reloads=10 \
        --minutes=10

A copy of MODEL_DIR is served, and clients ask it all the time. Passages are added and removed, each
change by another process than the one that serves; then the distilled student is exchanged for the
one of the control and back; then it is only asked, for some minutes. Every request must be answered
with passages, and every version must be taken up. Exit status 1 where anything else happens. The
resident memory of the service is told at each step.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.serve import Client, Process  # noqa: E402
from dgr_jax.corpora.types import Passage  # noqa: E402
from dgr_jax.retrieval.living import update  # noqa: E402

WATCH = 0.2  # seconds between two looks of the service for a new version
PATIENCE = 120  # seconds within which a new version must answer


class Load(threading.Thread):
    """Clients that ask one query after another, with a pause."""

    def __init__(self, port: int, queries: list[str], clients: int, pause: float) -> None:
        super().__init__(daemon=True)
        self.statuses: Counter[int] = Counter()
        self._port, self._clients, self._pause = port, clients, pause
        bodies = [json.dumps({"query": query, "k": 3}).encode() for query in queries]
        self._bodies = itertools.cycle(bodies)
        self._over = threading.Event()

    def run(self) -> None:
        asyncio.run(self._all())

    async def _all(self) -> None:
        await asyncio.gather(*(self._ask() for _ in range(self._clients)))

    async def _ask(self) -> None:
        client = Client(self._port)
        while not self._over.is_set():
            self.statuses[await client.ask(next(self._bodies))] += 1
            await asyncio.sleep(self._pause)
        client.close()

    def stop(self) -> None:
        """Ends it when all that was asked is answered."""
        self._over.set()
        self.join()

    @property
    def failed(self) -> int:
        """Requests that were not answered with passages."""
        return self.statuses.total() - self.statuses[200]


class Switched:
    """What the service says of the versions that it has found."""

    def __init__(self, port: int) -> None:
        self._metrics = f"http://127.0.0.1:{port}/metrics"

    def count(self, outcome: str = "switched") -> int:
        """Versions with an outcome."""
        text = urllib.request.urlopen(self._metrics, timeout=60).read().decode()
        lines = (line for line in text.splitlines() if line.startswith("dgr_jax_versions_total{"))
        return sum(int(float(line.split()[1])) for line in lines if f'"{outcome}"' in line)

    def wait(self, count: int) -> None:
        """Waits until so many versions were taken up."""
        ends = time.monotonic() + PATIENCE
        while self.count() < count:
            if time.monotonic() > ends:
                raise TimeoutError(f"{self.count()} versions were taken up, expected {count}")
            time.sleep(WATCH)


def change_index(model_dir: Path, step: int) -> None:
    """Adds a passage or, at every second step, removes it."""
    passage = Passage(f"new-{step // 2}", f"Tin whistles of kind {step // 2} have six holes.")
    added, removed = ([], [passage.pid]) if step % 2 else ([passage], [])
    update.update(update.versions(model_dir), added, removed)


def exchange_student(model_dir: Path, other: Path) -> None:
    """Has the student in `other` answer, and the one that did lie there, as training does it: the
    old one answers from `previous` until the new one is whole."""
    present, old = model_dir / "distill", model_dir / "previous" / "distill"
    old.parent.mkdir(exist_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    present.rename(old)
    other.rename(present)
    shutil.copytree(old, other)


def campaign(
    folder: Path,
    model_dir: Path,
    *,
    switches: int,
    reloads: int,
    minutes: float,
    clients: int = 8,
    pause: float = 0.02,
    system: str = "planned",
) -> dict[str, int]:
    """What came out. folder: an empty one to work in."""
    served, other = folder / "model", folder / "other"
    shutil.copytree(model_dir, served)
    shutil.copytree(model_dir / "control", other)
    queries = (model_dir / "prepare" / "collection" / "queries.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in queries]
    random.Random(0).shuffle(texts)
    flags = (f"--watch_s={WATCH}", "--deadline_s=120", "--batch_size=8", f"--system={system}")
    with Process(served, *flags, settings={"PYTHONPATH": str(ROOT)}) as service:
        load, switched = Load(service.port, texts, clients, pause), Switched(service.port)
        load.start()
        counts = {"switched": 0}

        def tell(when: str) -> None:
            counts.update(
                requests=load.statuses.total(), failed=load.failed,
                not_opened=switched.count("failed"), megabytes=service.bytes() >> 20,
            )  # fmt: skip
            print(json.dumps({"when": when, **counts}), flush=True)

        time.sleep(min(10.0, 60 * minutes))
        tell("warm")
        for step in range(switches + reloads):
            if step < switches:
                change_index(served, step)
            else:
                exchange_student(served, other)
            switched.wait(step + 1)
            counts["switched"] = step + 1
            if (step + 1) % 10 == 0 or step + 1 == switches + reloads:
                tell("switches" if step < switches else "reloads")
        for minute in whole_minutes(minutes):
            tell(f"{minute} minutes")
        load.stop()
        tell("end")
    return counts


def whole_minutes(minutes: float) -> Iterator[int]:
    """Counts minutes as they pass."""
    for minute in range(1, int(minutes) + 1):
        time.sleep(60)
        yield minute


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--switches", type=int, default=100)
    parser.add_argument("--reloads", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pause_ms", type=float, default=20)
    args = parser.parse_args()
    asked = {name: getattr(args, name) for name in ("switches", "reloads", "minutes", "clients")}
    with tempfile.TemporaryDirectory() as folder:
        counts = campaign(Path(folder), args.model_dir, pause=args.pause_ms / 1000, **asked)
    expected = args.switches + args.reloads
    sys.exit(int(counts["failed"] or counts["not_opened"] or counts["switched"] != expected))


if __name__ == "__main__":
    main()
