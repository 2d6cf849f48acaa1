"""The command line: flags, gin files and their search path, the experiment they describe.

Nothing heavy is imported before the arguments are read, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import dataclasses
import io
import logging
import os
import platform
import select
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dgr_jax import interrupts, processes
from dgr_jax.config import compiled, requirements
from dgr_jax.config.mistakes import FLAGS, Mistake
from dgr_jax.display import LogFormatter, harmless
from dgr_jax.model_dir import kept, versions
from dgr_jax.shipped import resources

logger = logging.getLogger(__name__)

EXIT_CLOSED = 141  # 128 + SIGPIPE, as in shells: whatever read the output has gone


class _Parser(argparse.ArgumentParser):
    """A parser whose messages repeat no control characters of its arguments."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(harmless(message or ""), file)


class _Versions(argparse.Action):
    """--version: this package and what results depend on, one a line; imports none of it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        for name, version in versions.here().items():
            sys.stdout.write(f"{name} {version}\n")
        parser.exit()


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags of every command of an experiment. Its help describes
    `--gin.NAME=VALUE`, which `parse` reads."""
    p = plain_parser(
        command,
        description,
        epilog="Any binding can be set as --gin.NAME=VALUE, such as --gin.SEED=1 or "
        "--gin.Search.num_beams=40. gin files shipped with the package: "
        + ", ".join(sorted(f.name for f in resources("gin_configs").glob("*.gin"))),
    )
    p.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="an experiment such as quickstart.gin; repeat to put one over another",
    )
    p.add_argument(
        "--gin_search_paths",
        default="",
        metavar="DIR,DIR",
        help="more folders to look for gin files in",
    )
    p.add_argument("--model_dir", help="where everything is written (MODEL_DIR)")
    p.add_argument("--data_dir", help="where the collection lies (DATA_DIR)")
    return p


def plain_parser(command: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser with the flags that every command has, to be read by `parse_plain`."""
    p = _Parser(
        prog=f"python -m dgr_jax.{command}",
        allow_abbrev=False,
        description=description,
        epilog=epilog,
    )
    p.add_argument("--verbose", action="store_true", help="log what libraries say as well")
    p.add_argument(
        "--version",
        action=_Versions,
        nargs=0,
        help="print the versions of this package, of Python and of the installed libraries",
    )
    compiled.add_flag(p)
    return p


def settings(p: argparse.ArgumentParser, kind: Any) -> None:
    """Adds a flag for each field of a dataclass of settings, whose metadata say what it is."""
    for field in dataclasses.fields(kind):
        of: dict[str, Any] = {"type": type(field.default), "metavar": field.name.upper()}
        if isinstance(field.default, bool):
            of = {"action": argparse.BooleanOptionalAction}
        help = f"{field.metadata['help']} (default: {field.default})"
        p.add_argument(f"--{field.name}", default=field.default, help=help, **of)


def set_from(args: argparse.Namespace, kind: Any) -> Any:
    """The settings of the flags that `settings` added."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def parse_plain(
    p: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """The flags of a command without gin files, while all is set up as they say."""
    args = p.parse_args(argv)
    _set_up(args)
    return args


def _set_up(args: argparse.Namespace) -> None:
    _configure_logging(args.verbose)
    compiled.keep(args)


def several(p: argparse.ArgumentParser) -> None:
    """Adds the flags of a command that several processes can run together."""
    group = p.add_argument_group(
        "several processes", "on one or more hosts, one MODEL_DIR; see docs/launching.md"
    )
    group.add_argument(
        "--distributed", action="store_true", help="JAX finds them: TPU slice, SLURM, MPI"
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--num_processes", metavar="N")
    group.add_argument("--process_id", metavar="I", help="of this one: 0 to N - 1")


def stages(p: argparse.ArgumentParser, known: str) -> None:
    """Adds --stages: a list of names, None for all. known: the names, for people."""
    p.add_argument(
        "--stages",
        type=lambda text: [name.strip() for name in text.split(",")],
        metavar="STAGE,STAGE",
        help=f"stages to run, with those they need: {known} (default: all)",
    )


def join(args: argparse.Namespace) -> None:
    """Joins the other processes, where there are any; the first one speaks for all."""
    try:
        given = processes.settings({name: getattr(args, name) for name in processes.VARIABLES})
    except ValueError as error:
        raise Mistake(str(error)) from error
    if given is None and args.distributed:
        given = {}
    if given is not None:
        processes.start(given)
    if not processes.first():
        kept.leave_contents_to_others()
        logging.getLogger("dgr_jax").setLevel(logging.WARNING)


def parse(
    p: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """What `flags` reads, while logging is set up as they say."""
    args, bindings = flags(p, argv)
    _set_up(args)
    return args, bindings


def flags(
    p: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and gin bindings from --gin.NAME=VALUE, --model_dir and --data_dir."""
    given = list(sys.argv[1:] if argv is None else argv)
    bindings = [a.removeprefix("--gin.") for a in given if a.startswith("--gin.")]
    args = p.parse_args([a for a in given if not a.startswith("--gin.")])
    for binding in bindings:
        if not binding.partition("=")[0].strip() or "=" not in binding:
            p.error(f"--gin.{binding}: expected --gin.NAME=VALUE")
    for macro, flag in FLAGS.items():
        if value := getattr(args, flag.removeprefix("--")):
            bindings.append(f"{macro}={value!r}")
    return args, [_quoted(binding) for binding in bindings]


def _quoted(binding: str) -> str:
    """name=value with the value as gin reads it: a bare word or path becomes a string."""
    name, _, value = binding.partition("=")
    value = value.strip()
    if not value.startswith(("@", "%", "[", "(", "{")):
        try:
            ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = repr(value)
    return f"{name.strip()} = {value}"


def named(bindings: Iterable[str]) -> set[str]:
    """The strings among the values of bindings; the files that some of them name must exist."""
    values = (binding.partition(" = ")[2] for binding in bindings)
    return {ast.literal_eval(value) for value in values if value[:1] in ("'", '"')}


def _configure_logging(verbose: bool) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbose else "3")
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        force=True,
    )
    for handler in logging.getLogger().handlers:
        handler.setFormatter(LogFormatter("%(message)s"))
    logging.getLogger("dgr_jax").setLevel(logging.INFO)
    # gin logs an error for every folder of its search path that lacks a file.
    logging.getLogger("root").addFilter(lambda r: not r.getMessage().startswith("Path not found"))
    if not verbose:
        # TensorFlow Datasets, Orbax and SeqIO log details through absl that concern nobody here.
        # matplotlib warns where there is no home folder to keep its fonts in.
        for name in ("absl", "matplotlib"):
            logging.getLogger(name).setLevel(logging.ERROR)


def reuse_memory() -> None:
    """Asks glibc, before there are threads, to keep the memory that is freed.

    Otherwise the temporaries of every step on CPU go back to the system and return zeroed, page by
    page: a fifth of a small student's training time. Without effect on other systems.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # of malloc.h
    libc = ctypes.CDLL(None)
    for parameter, value in ((trim_threshold, -1), (mmap_max, 0), (arena_max, 1)):
        libc.mallopt(parameter, value)


def main(command: Callable[[Sequence[str] | None], None]) -> None:
    """Runs a command. A mistake of the user ends it with one clear line and exit status 2, and not
    with a traceback."""
    _open_streams()
    if interrupts.is_program():
        sys.excepthook = _show_crash
        reuse_memory()
    with processes.leaving(), interrupts.heard():
        _run(command)


def _run(command: Callable[[Sequence[str] | None], None]) -> None:
    try:
        with processes.blaming():
            try:
                command(None)
            finally:
                sys.stdout.flush()
    except Mistake as mistake:
        _complain(str(mistake))
        sys.exit(mistake.status)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and _close_broken():
            sys.exit(EXIT_CLOSED)
        if logging.getLogger().level <= logging.INFO:
            raise
        missing = isinstance(error, ModuleNotFoundError) and requirements.problem()
        message = missing or str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}"
        sys.exit(_complain(f"{message}\n(--verbose shows where)"))
    except KeyboardInterrupt:
        sys.exit(interrupts.EXIT_INTERRUPTED)


def _open_streams() -> None:
    """Makes the standard streams take any text: characters that the locale lacks are escaped, and a
    stream that is closed is replaced by one that leads nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - to the end of the process
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _show_crash(kind: type[BaseException], error: BaseException, place: Any) -> None:
    sys.stderr.write(harmless("".join(traceback.format_exception(kind, error, place))))


def _complain(message: str) -> int:
    sys.stderr.write(harmless(f"error: {message}\n"))
    return 2


def _close_broken() -> bool:
    """Whether the reader of our output has gone, as `| head` does. Nothing more is written to a
    stream without a reader."""
    poll, nowhere = select.poll(), os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)  # errors are reported without being asked for
    gone = [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]
    for descriptor in gone:
        os.dup2(nowhere, descriptor)
    return bool(gone)
