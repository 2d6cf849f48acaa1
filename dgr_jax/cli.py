"""The command line: flags, gin files and their search path, the experiment they describe.

Nothing heavy is imported before the arguments are read, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgr_jax.experiment import Experiment

PACKAGE = Path(__file__).resolve().parent
_MACRO = re.compile(r"^([A-Z][A-Z0-9_]*) *=", re.MULTILINE)


def resources(name: str) -> Path:
    """Folder `gin_configs` or `tasks`: inside the installed package, or beside it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """The flags that every command has; `--gin.name=value` is described, and read by `parse`."""
    p = argparse.ArgumentParser(
        prog=f"python -m dgr_jax.{command}",
        description=description,
        epilog="Any binding can be set as --gin.NAME=VALUE, such as --gin.SEED=1 or "
        "--gin.Search.num_beams=40. gin files shipped with the package: "
        + ", ".join(sorted(f.name for f in resources("gin_configs").glob("*.gin"))),
    )
    p.add_argument("--gin_file", action="append", default=[], metavar="FILE",
                   help="an experiment such as quickstart.gin; repeat to put one over another")  # fmt: skip
    p.add_argument("--gin_search_paths", default="", metavar="DIR,DIR",
                   help="more folders to look for gin files in")  # fmt: skip
    p.add_argument("--model_dir", help="where everything is written (MODEL_DIR)")
    p.add_argument("--data_dir", help="where the collection lies (DATA_DIR)")
    p.add_argument("--verbose", action="store_true", help="log what libraries say as well")
    return p


def parse(
    p: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and gin bindings from --gin.NAME=VALUE, --model_dir and --data_dir."""
    given = list(sys.argv[1:] if argv is None else argv)
    bindings = [a.removeprefix("--gin.") for a in given if a.startswith("--gin.")]
    args = p.parse_args([a for a in given if not a.startswith("--gin.")])
    for binding in bindings:
        if "=" not in binding:
            p.error(f"--gin.{binding}: expected --gin.NAME=VALUE")
    for flag, macro in (("model_dir", "MODEL_DIR"), ("data_dir", "DATA_DIR")):
        if value := getattr(args, flag):
            bindings.append(f"{macro}={value!r}")
    _configure_logging(args.verbose)
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


def _configure_logging(verbose: bool) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0" if verbose else "3")
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        force=True,
    )
    logging.getLogger("dgr_jax").setLevel(logging.INFO)
    # gin logs an error for every folder of its search path that lacks a file.
    logging.getLogger("root").addFilter(lambda r: not r.getMessage().startswith("Path not found"))
    if not verbose:
        # absl (TensorFlow Datasets, Orbax, SeqIO) speaks up about its own affairs.
        logging.getLogger("absl").setLevel(logging.ERROR)


def main(command: Callable[[Sequence[str] | None], None]) -> None:
    """Run a command; a user's mistake is one clear line and exit status 2, not a traceback."""
    try:
        command(None)
    except (ValueError, FileNotFoundError, ImportError) as error:
        if logging.getLogger().level <= logging.INFO:
            raise
        sys.exit(_complain(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(error: Exception) -> int:
    sys.stderr.write(f"error: {error}\n(--verbose shows where)\n")
    return 2


def load_experiment(args: argparse.Namespace, bindings: Sequence[str]) -> Experiment:
    """The experiment that gin files and bindings describe; its operative config is written.

    Without --gin_file the experiment of --model_dir goes on: MODEL_DIR/config.gin is read.
    Raises ValueError for an unknown file, macro or parameter, with the nearest names.
    """
    import gin

    files = list(args.gin_file)
    if not files:
        if not args.model_dir:
            raise ValueError("give --gin_file=FILE, such as quickstart.gin, or --model_dir=DIR")
        files = [str(Path(args.model_dir) / "config.gin")]
        if not Path(files[0]).is_file():
            raise FileNotFoundError(f"no experiment at {files[0]}; give --gin_file=FILE")
    register()
    gin.clear_config()
    paths = [".", *filter(None, args.gin_search_paths.split(",")), str(resources("gin_configs"))]
    for path in paths:
        gin.add_config_file_search_path(path)
    _check_files(files, paths)
    _parse(files, bindings)
    experiment = _call_experiment()
    folder = Path(experiment.model_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.gin").write_text(gin.operative_config_str(), encoding="utf-8")
    return experiment


def _check_files(files: Sequence[str], paths: Sequence[str]) -> None:
    for file in files:
        if not any((Path(path) / file).is_file() for path in paths):
            names = sorted({f.name for path in paths for f in Path(path).glob("*.gin")})
            raise FileNotFoundError(
                f"--gin_file={file}: not found in {', '.join(paths)}{_nearest(file, names)}"
            )


def _parse(files: Sequence[str], bindings: Sequence[str]) -> None:
    import gin

    try:
        gin.parse_config_files_and_bindings(files, None, finalize_config=False)
        known = _MACRO.findall(gin.config_str())
        for binding in bindings:
            name = binding.partition(" =")[0]
            if "." not in name and name not in known:
                raise ValueError(
                    f"--gin.{name}: {', '.join(files)} has no macro of that name"
                    f"{_nearest(name, known)}"
                )
        gin.parse_config(list(bindings))
        gin.finalize()
    except (AttributeError, ValueError, TypeError, NameError) as error:
        raise ValueError(_explain(str(error))) from error
    missing = [n for n in known if _is_required(n)]
    if missing:
        flags = {"MODEL_DIR": "--model_dir=DIR", "DATA_DIR": "--data_dir=DIR"}
        asked = ", ".join(flags.get(n, f"--gin.{n}=...") for n in missing)
        raise ValueError(f"{', '.join(files)} needs {asked}")


def _is_required(macro: str) -> bool:
    import gin

    return (
        gin.query_parameter(f"{macro}/macro.value") is gin.REQUIRED
        or str(gin.query_parameter(f"{macro}/macro.value")) == "%gin.REQUIRED"
    )


def _explain(message: str) -> str:
    """gin's own words, with the nearest known name where it names an unknown one."""
    message = message.strip().splitlines()[0]
    unknown = re.search(r"No configurable matching '([^']+)'", message)
    if unknown:
        return message + _nearest(unknown[1], list(_configurables()))
    parameter = re.search(r"parameter named '([^']+)'", message)
    target = re.search(r"[Cc]onfigurable '([^']+)'", message)
    if parameter and target and (made := _configurables().get(target[1].split(".")[-1])):
        return message + _nearest(parameter[1], list(inspect.signature(made).parameters))
    return message


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; there are: {', '.join(known[:40])}" if known else ""


def _call_experiment() -> Experiment:
    import gin

    try:
        return gin.get_configurable("Experiment")()
    except RuntimeError as error:
        raise ValueError(str(error).strip().splitlines()[0]) from error
    except (TypeError, ValueError) as error:
        # gin appends where it was; what the settings said is the first line.
        raise ValueError(str(error).strip().split("\n  In call to")[0]) from error


@functools.cache
def _configurables() -> dict[str, Callable[..., Any]]:
    """Everything that gin files can name."""
    from dgr_jax import experiment, partitioning
    from dgr_jax.corpora import beir, dpr, irds, msmarco, quickstart
    from dgr_jax.data import examples, vocabulary
    from dgr_jax.identifiers import atomic, embeddings, rq, semantic, string, title
    from dgr_jax.losses import ranking
    from dgr_jax.models import t5
    from dgr_jax.retrieval import generative, teacher
    from dgr_jax.training import objectives, optimizers

    made = [
        experiment.Experiment, experiment.Prepare, experiment.Training, experiment.Candidates,
        experiment.Teach, experiment.Evaluate, partitioning.Mesh, t5.T5Config,
        beir.BeirCollection, dpr.DprCollection, irds.IrDatasetsCollection,
        msmarco.MsmarcoCollection, quickstart.QuickstartCollection,
        examples.Sources, vocabulary.SentencePiece, generative.Search,
        atomic.Atomic, rq.ResidualQuantization, semantic.KMeansTree, string.NaiveString,
        title.Title, embeddings.TfidfSvd, embeddings.SentenceEncoder, embeddings.FromFile,
        objectives.Generation, objectives.Distillation,
        optimizers.Adafactor, optimizers.AdamW, optimizers.Constant, optimizers.ReciprocalSqrt,
        optimizers.Linear, optimizers.Cosine,
        teacher.RunTeacher, teacher.Bm25Teacher, teacher.CrossEncoderTeacher,
        teacher.BiEncoderTeacher, teacher.VectorTeacher, teacher.TopM, teacher.TwoLists,
    ]  # fmt: skip
    return {c.__name__: c for c in made} | {
        name: _loss_factory(name, loss) for name, loss in ranking.LOSSES.items()
    }


def _loss_factory(name: str, loss: Callable[..., Any]) -> Callable[..., Any]:
    """`@distilled_ranknet()` in gin: the loss with its settings bound and readable."""

    def factory(**settings: Any) -> functools.partial:
        return functools.partial(loss, **settings)

    factory.__name__ = factory.__qualname__ = name
    factory.__doc__ = loss.__doc__
    settings = list(inspect.signature(loss).parameters.values())[3:]
    factory.__signature__ = inspect.Signature(settings)
    return factory


@functools.cache
def register() -> None:
    """Make every configurable known to gin, once a process."""
    import gin

    for name, made in _configurables().items():
        gin.external_configurable(made, name=name, module="dgr_jax")
