"""How many queries a service answers, and how fast: many clients, closed and open loop.

    python -m benchmarks.serve --model_dir=quickstart_model

A service is started in a process of its own. In a closed loop, each of so many clients asks its
next query when the last one is answered; in an open loop, queries come at random at a given rate,
whether or not others are answered, and the time of each counts from when it came. Beside it, one
process answers the same queries one by one without a service, before and after; and a service that
puts no queries together answers them over HTTP. With --transformers also `serve_transformers`.
Ratios are those of one run. Client and service share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dgr_jax.analysis.speed import device_name
from dgr_jax.corpora.types import Passage
from dgr_jax.models.hugging_face import write_hf
from dgr_jax.retrieval.retriever import Retriever

K = 10


class Client:
    """One connection that is kept; HTTP in as few words as there are."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, body: bytes) -> int:
        """-> the status; 0 where the connection was closed."""
        try:
            return await self._ask(body)
        except (OSError, asyncio.IncompleteReadError):
            self.writer = None
            return 0

    async def _ask(self, body: bytes) -> int:
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST /search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" \
            f"Content-Length: {len(body)}\r\n\r\n"  # fmt: skip
        self.writer.write(head.encode() + body)
        answer = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.partition(b"content-length:")[2].split(b"\r\n")[0])
        await self.reader.readexactly(length)
        return int(answer.split()[1])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


async def closed(port: int, clients: int, seconds: float, bodies: Iterator[bytes]) -> dict:
    """Each client asks as soon as it is answered."""
    took, statuses, ends = [], [], time.perf_counter() + seconds

    async def one() -> None:
        client = Client(port)
        while (start := time.perf_counter()) < ends:
            statuses.append(await client.ask(next(bodies)))
            took.append(time.perf_counter() - start)
        client.close()

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    return summary(f"closed, {clients} clients", took, statuses, time.perf_counter() - start)


async def opened(port: int, rate: float, seconds: float, bodies: Iterator[bytes]) -> dict:
    """Queries come at random, `rate` a second on average."""
    took, statuses, idle, draw = [], [], [], random.Random(0)

    async def one(at: float) -> None:
        client = idle.pop() if idle else Client(port)
        statuses.append(await client.ask(next(bodies)))
        took.append(time.perf_counter() - at)
        idle.append(client)

    start = at = time.perf_counter()
    asked = []
    while at < start + seconds:
        await asyncio.sleep(max(0, at - time.perf_counter()))
        asked.append(asyncio.create_task(one(at)))
        at += draw.expovariate(rate)
    await asyncio.gather(*asked)
    for client in idle:
        client.close()
    return summary(f"open, {rate:.0f} a second", took, statuses, time.perf_counter() - start)


def alone(name: str, retriever: Retriever, queries: list[str], seconds: float) -> dict:
    """One after another, in this process."""
    took, start = [], time.perf_counter()
    for query in itertools.cycle(queries):
        before = time.perf_counter()
        if before > start + seconds:
            break
        retriever.search([query], K)
        took.append(time.perf_counter() - before)
    return summary(name, took, [200] * len(took), time.perf_counter() - start)


def summary(name: str, took: list[float], statuses: list[int], seconds: float) -> dict:
    p50, p95, p99 = (1000 * np.percentile(took, (50, 95, 99))).tolist()
    good = statuses.count(200)
    failed = len(statuses) - good
    return {"load": name, "queries": good, "a_second": good / seconds, "p50": p50, "p95": p95,
            "p99": p99, "failed": failed}  # fmt: skip


def row(measured: dict, base: float, used: float) -> str:
    """base: queries a second of one by one; used: processor seconds of whoever answered."""
    each = 1000 * used / max(1, measured["queries"])
    times = " | ".join(f"{measured[name]:.1f}" for name in ("p50", "p95", "p99"))
    return (
        f"| {measured['load']} | {measured['queries']:,} | {measured['a_second']:.1f} | "
        f"{measured['a_second'] / base:.2f} | {times} | {each:.1f} | {measured['failed']} |"
    )


class Process:
    """A service in a process of its own, ready to answer.

    module: what is run; its log tells the address, and then a line that begins with 'ready'.
    """

    def __init__(
        self,
        model_dir: Path | str,
        *flags: str,
        module: str = "dgr_jax.serve",
        python: str = sys.executable,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        command = [python, "-m", module, f"--model_dir={model_dir}", "--port=0", *flags]
        environment = {**os.environ, **(settings or {})}
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(command, stderr=self._log, env=environment)
        try:
            self.port = int(self._said("http://").rpartition(":")[2])
            self._said("ready")
        except BaseException:
            self.__exit__()
            raise

    def _said(self, words: str) -> str:
        """The first line of the log that begins so."""
        while self._process.poll() is None:
            with open(self._log.name) as log:
                for line in log:
                    if line.startswith(words) and line.endswith("\n"):
                        return line.strip()
            time.sleep(0.1)
        raise RuntimeError(f"the service ended: {Path(self._log.name).read_text()[-2000:]}")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def processor_seconds(self) -> float:
        """What it has used of all processors."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        return sum(map(int, stat.rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")

    def bytes(self) -> int:
        """Resident memory."""
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


def written_for_transformers(retriever: Retriever, folder: Path) -> None:
    """Writes a student with one identifier a passage as `serve_transformers` reads it."""
    student, store = retriever.decoder, retriever.store
    write_hf(folder, student.config, student.params)
    shutil.copy(retriever.vocabulary.folder / "spiece.model", folder)
    passages = [
        {
            "tokens": [token for token in student.table.tokens[row].tolist() if token > 0],
            **vars_of(store[index]),
        }
        for index, row in enumerate(student.rows.tolist())
    ]
    search = student.search
    kept = {"num_beams": search.num_beams, "query_length": search.query_length}
    (folder / "passages.json").write_text(json.dumps({**kept, "passages": passages}))


def vars_of(passage: Passage) -> dict[str, str]:
    return {"pid": passage.pid, "title": passage.title, "text": passage.text}


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--system", default="planned")
    parser.add_argument("--clients", default="1,8,64,256")
    parser.add_argument("--rates", default="0.5,0.8", help="of the throughput with most clients")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--patience_ms", type=float, default=2.0)
    parser.add_argument(
        "--transformers",
        metavar="PYTHON",
        help="an interpreter that has transformers, fastapi and uvicorn: measure them too; the "
        "system must be a student with one identifier a passage",
    )
    return parser.parse_args()


class Bench:
    """Loads of the same queries on services, and a table of what came out."""

    def __init__(self, retriever: Retriever, queries: list[str], seconds: float) -> None:
        self.retriever, self.queries, self.seconds = retriever, queries, seconds
        self.bodies = itertools.cycle([json.dumps({"query": q, "k": K}).encode() for q in queries])
        self.base = self.best = 0.0

    def alone(self, name: str) -> None:
        """One by one in this process; the first time is what the others are compared with."""
        used = time.process_time()
        measured = alone(name, self.retriever, self.queries, self.seconds)
        self.base = self.base or measured["a_second"]
        print(row(measured, self.base, time.process_time() - used), flush=True)

    def closed(self, service: Process, clients: int, name: str = "") -> None:
        asyncio.run(closed(service.port, clients, 1, self.bodies))
        self._loaded(service, closed(service.port, clients, self.seconds, self.bodies), name)

    def opened(self, service: Process, share: float) -> None:
        rate = share * self.best
        self._loaded(service, opened(service.port, rate, self.seconds, self.bodies))

    def _loaded(self, service: Process, load: Any, name: str = "") -> None:
        used = service.processor_seconds()
        measured = asyncio.run(load)
        measured["load"] = f"{name}{measured['load']}"
        print(row(measured, self.base, service.processor_seconds() - used), flush=True)
        if not name:
            self.best = max(self.best, measured["a_second"])


def main() -> None:
    args = flags()
    lines = (Path(args.model_dir) / "prepare" / "collection" / "queries.jsonl").read_text()
    queries = [json.loads(line)["text"] for line in lines.splitlines()]
    random.Random(0).shuffle(queries)
    retriever = Retriever.load(args.model_dir, system=args.system)
    retriever.search([queries[0]], K), retriever.search([""], K)  # compiled
    bench = Bench(retriever, queries, args.seconds)
    print(device_name(retriever.decoder.mesh.devices.flat[0]), flush=True)
    columns = "load | queries | a second | of one by one | p50 ms | p95 | p99 | processor ms"
    print(f"| {columns} | failed |\n|---|---|---|---|---|---|---|---|---|")
    bench.alone("one by one, no service")
    usual = f"--system={args.system}", "--deadline_s=60"
    with Process(args.model_dir, *usual, "--batch_size=1", "--patience_ms=0") as service:
        for clients in (1, 64):
            bench.closed(service, clients, "no batches, ")
    flags_of = f"--batch_size={args.batch_size}", f"--patience_ms={args.patience_ms}"
    with Process(args.model_dir, *usual, *flags_of) as service:
        asyncio.run(closed(service.port, 64, 1, bench.bodies))
        memory = service.bytes()
        for clients in map(int, args.clients.split(",")):
            bench.closed(service, clients)
        for share in map(float, args.rates.split(",")):
            bench.opened(service, share)
        after = service.bytes()
    if args.transformers:
        with tempfile.TemporaryDirectory() as folder:
            written_for_transformers(retriever, Path(folder))
            asked: Any = {"module": "benchmarks.serve_transformers", "python": args.transformers}
            with Process(folder, **asked) as service:
                for clients in (1, 64):
                    bench.closed(service, clients, "transformers, ")
    bench.alone("one by one, again")
    print(f"memory of the service: {memory >> 20} MB before, {after >> 20} MB after")


if __name__ == "__main__":
    main()
