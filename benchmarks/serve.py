"""How many queries a service answers, and how fast: many clients, closed and open loop.

    python -m benchmarks.serve --model_dir=quickstart_model

A service is started in a process of its own. In a closed loop, each of so many clients asks its
next query when the last one is answered; in an open loop, queries come at random at a given rate,
whether or not others are answered, and the time of each counts from when it came. Beside them, one
process answers the same queries one by one, without a service, before and after: ratios are those
of one run. Client and service share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

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


def alone(retriever, queries: list[str], seconds: float) -> dict:
    """One after another, in this process."""
    took, start = [], time.perf_counter()
    for query in itertools.cycle(queries):
        before = time.perf_counter()
        if before > start + seconds:
            break
        retriever.search([query], K)
        took.append(time.perf_counter() - before)
    return summary("one by one", took, [200] * len(took), time.perf_counter() - start)


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


def processor_seconds(process: subprocess.Popen) -> float:
    """What a process has used of all processors."""
    used = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, used)) / os.sysconf("SC_CLK_TCK")


def bytes_of(process: subprocess.Popen) -> int:
    """Resident memory."""
    pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--system", default="planned")
    parser.add_argument("--clients", default="1,8,64,256")
    parser.add_argument("--rates", default="0.5,0.8", help="of the throughput with most clients")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--patience_ms", type=float, default=2.0)
    args = parser.parse_args()
    lines = (Path(args.model_dir) / "prepare" / "collection" / "queries.jsonl").read_text()
    queries = [json.loads(line)["text"] for line in lines.splitlines()]
    random.Random(0).shuffle(queries)
    asked = [json.dumps({"query": query, "k": K}).encode() for query in queries]
    bodies = itertools.cycle(asked)

    from dgr_jax.analysis.speed import device_name
    from dgr_jax.retrieval.retriever import Retriever

    command = [sys.executable, "-m", "dgr_jax.serve", f"--model_dir={args.model_dir}", "--port=0"]
    command += [f"--system={args.system}", f"--batch_size={args.batch_size}"]
    command += [f"--patience_ms={args.patience_ms}", "--deadline_s=60"]
    service = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        port = next(int(line.rpartition(":")[2]) for line in service.stderr if "http://" in line)
        next(line for line in service.stderr if line.startswith("ready"))
        retriever = Retriever.load(args.model_dir, system=args.system)
        retriever.search([queries[0]], K), retriever.search([""], K)  # compiled
        print(device_name(retriever.decoder.mesh.devices.flat[0]), flush=True)
        asyncio.run(closed(port, 64, 1, bodies))
        memory, used = bytes_of(service), time.process_time()
        before = alone(retriever, queries, args.seconds)
        base, best = before["a_second"], 0.0
        columns = "load | queries | a second | of one by one | p50 ms | p95 | p99 | processor ms"
        print(f"| {columns} | failed |\n|---|---|---|---|---|---|---|---|---|")
        print(row(before, base, time.process_time() - used), flush=True)

        def loaded(load: Any) -> float:
            used = processor_seconds(service)
            measured = asyncio.run(load)
            print(row(measured, base, processor_seconds(service) - used), flush=True)
            return measured["a_second"]

        for clients in map(int, args.clients.split(",")):
            best = max(best, loaded(closed(port, clients, args.seconds, bodies)))
        for share in map(float, args.rates.split(",")):
            loaded(opened(port, share * best, args.seconds, bodies))
        used = time.process_time()
        again = alone(retriever, queries, args.seconds)
        print(row(again, base, time.process_time() - used))
        print(
            f"memory of the service: {memory >> 20} MB before, {bytes_of(service) >> 20} MB after"
        )
    finally:
        service.terminate()
        service.wait()


if __name__ == "__main__":
    main()
