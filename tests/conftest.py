"""Shared by all tests: eight CPU devices, and one small experiment run from the command line."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import hypothesis
import pytest

# The same examples in every run, so that what has passed passes again; others with
# DGR_JAX_EXAMPLES=random.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.load_profile(os.environ.get("DGR_JAX_EXAMPLES", "same"))

# Before jax starts. Tests of meshes ask for eight devices; programs are small, and compiling them
# with all care takes longer than running them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

# To look through all modules, tests and programs for garbage as often as usual takes a while.
gc.set_threshold(20_000, 20, 50)

# A shell in the background has its processes ignore Ctrl-C; commands that tests start must hear it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent

# The embedded collection, and everything else as small as it can be.
TINY = (
    "--gin_file=quickstart.gin",
    "--gin.T5Config.emb_dim=16",
    "--gin.T5Config.num_heads=2",
    "--gin.T5Config.head_dim=8",
    "--gin.T5Config.mlp_dim=32",
    "--gin.T5Config.num_encoder_layers=1",
    "--gin.T5Config.num_decoder_layers=1",
    "--gin.T5Config.dropout_rate=0",
    "--gin.GENERATE_STEPS=6",
    "--gin.DISTILL_STEPS=3",
    "--gin.WARMUP_STEPS=2",
    "--gin.BATCH_SIZE=8",
    "--gin.LIST_BATCH_SIZE=4",
    "--gin.NUM_BEAMS=8",
    "--gin.DEPTH=8",
    "--gin.PLAN=None",
    "--gin.SEARCH_BATCH_SIZE=8",
    "--gin.QUERY_LENGTH=12",
    "--gin.Candidates.max_queries=16",
    "--gin.Evaluate.max_queries=12",
    "--gin.SentencePiece.size=600",
    "--gin.TfidfSvd.dim=8",
    "--gin.ResidualQuantization.codebook_size=16",
    "--gin.Training.log_every=2",
    "--gin.Training.checkpoint_every=3",
    "--gin.Mesh.data=1",
)

with_seqio = pytest.mark.skipif(
    importlib.util.find_spec("seqio") is None, reason="SeqIO has no wheel for this Python"
)

Command = Callable[..., subprocess.CompletedProcess]


def strict_warnings() -> str:
    """PYTHONWARNINGS under which a deprecation that a line of ours is warned of is an error, as in
    pyproject.toml; there, a module's name is no pattern."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in ROOT.glob("dgr_jax/**/*.py"))
    names = (".".join(path.parts).removesuffix(".__init__") for path in paths)
    return ",".join(f"error::DeprecationWarning:{name}" for name in sorted(names))


def kept_programs(together: Path) -> dict[str, str]:
    """Variables with which processes find what those before them have compiled."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(together / "compiled"),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(1 << 31),  # with a limit, it is locked
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    }


@dataclass(frozen=True)
class Finished:
    """A finished experiment. Read it only: copy the folder to change something."""

    folder: Path
    log: str


@pytest.fixture(scope="session")
def together(tmp_path_factory) -> Path:
    """A folder that the workers of pytest-xdist share: their own folders lie in it side by side."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def compiled_once(together) -> None:
    """What a test has compiled, the next one that needs the same program reads, in all workers.

    Not by the environment: processes that tests start keep to what they are given.
    """
    if jax := sys.modules.get("jax"):
        jax.config.update("jax_compilation_cache_dir", str(together / "programs"))
        # Most of what compiles in less is never asked for again, and to keep it takes time, too.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session", autouse=True)
def versions_read_once() -> Iterator[None]:
    """Whoever reads a gin file asks for the versions of all packages, which takes a while."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "version", functools.cache(metadata.version))
        yield


@pytest.fixture(scope="session", autouse=True)
def values_printed_once() -> Iterator[None]:
    """Whenever gin prints its bindings it parses what it prints of each, to see that it can be read
    again: that is the most of what loading an experiment takes."""
    from gin import config

    readable = set()

    def literal(value: object) -> str | None:
        printed = repr(value)
        if (type(value), printed) in readable:
            return printed
        if (literal := format_value(value)) is not None:
            readable.add((type(value), printed))
        return literal

    format_value = config._format_value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "_format_value", literal)
        yield


@pytest.fixture(scope="session")
def command(tmp_path_factory, together) -> Command:
    """command(module, *arguments, env={}) runs `python -m module` in an empty folder.

    XLA compiles with little care here, and what one command compiled the next one finds.
    """
    folder = tmp_path_factory.mktemp("commands")
    settings = {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        **kept_programs(together),
        "PYTHONWARNINGS": strict_warnings(),
    }

    # JAX, imported here, sets it for the processes that are started from here.
    inherited = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}

    def run(module: str, *arguments: str, env: dict[str, str] | None = None, check: bool = True):
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            env={**inherited, **settings, **(env or {})},
            capture_output=True,
            text=True,
            timeout=600,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """While one process is in this context with a path, the others wait before it."""
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def tiny_run(command, together) -> Finished:
    """A whole experiment of a few steps, from its one command, once for all workers."""
    folder, log = together / "tiny" / "model", together / "tiny.log"
    with one_at_a_time(together / "tiny.lock"):
        if not log.exists():
            logged = {"JAX_LOG_COMPILES": "1"}
            done = command("dgr_jax.train", *TINY, f"--model_dir={folder}", env=logged)
            log.write_text(done.stdout + done.stderr)
    return Finished(folder, log.read_text())


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_run) -> Path:
    """MODEL_DIR of `tiny_run`."""
    return tiny_run.folder
