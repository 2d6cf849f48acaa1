"""Reads gin files and bindings: the experiment that they describe, or the mistake in them."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import inspect
import logging
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dgr_jax import interrupts, processes
from dgr_jax.config import bound, cli, requirements
from dgr_jax.config.mistakes import FLAGS, Mistake
from dgr_jax.shipped import resources

logger = logging.getLogger(__name__)


EXPERIMENTS = ("Experiment", "DenseExperiment")  # of the same command, train
_MACRO = re.compile(r"^(\w+) =", re.MULTILINE)
_MACRO_REFERENCE = re.compile(r"%(\w[\w.]*)")
_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_PLACE = re.compile(r'\n  In file "([^"]+)", line (\d+)')


def load_experiment(
    args: argparse.Namespace,
    bindings: Sequence[str],
    kinds: Sequence[str] = EXPERIMENTS,
    *,
    keep: bool = True,
    fill: bool | None = None,
) -> Any:
    """The experiment that gin files and bindings describe; MODEL_DIR/config.gin keeps it.

    Without --gin_file the experiment of --model_dir goes on: its config.gin is read.
    kinds: the components that it may be.
    keep: False writes nothing.
    fill: takes folders and files that are not given for given; None: where nothing is written.
    Raises Mistake for an unknown file, macro, component or setting, with the nearest names, for one
    that is missing or of a wrong type, and for one on the command line that another overrides.
    """
    files = files_of(args)
    if problem := requirements.problem():
        raise Mistake(problem)
    if keep and hasattr(args, "num_processes"):
        cli.join(args)
    if keep:
        interrupts.goes_on("the experiment")
    printed = read(files, search_paths(args), bindings)
    if fill or fill is None and not keep:
        printed = _filled(printed)
    kind = _kind(files, kinds, printed)
    experiment = _call_experiment(files, kind)
    effects = bound.Effects.now(printed)
    effects.check(bindings)
    if args.gin_file:
        paths = search_paths(args)
        effects.say_without(line for file in files for line in _own_lines(file, paths))
    if kind in EXPERIMENTS:
        _check_tasks(experiment.prepare.tasks)
    _check_model_dir(getattr(experiment, "model_dir", ""), args.model_dir)
    if keep and processes.first():
        bound.keep(experiment)
    return _labelled(experiment) if kind in EXPERIMENTS else experiment


def search_paths(args: argparse.Namespace) -> list[str]:
    """The folders that gin files are looked for in."""
    return [".", *filter(None, args.gin_search_paths.split(",")), str(resources("gin_configs"))]


def read(files: Sequence[str], paths: Sequence[str], bindings: Sequence[str]) -> str:
    """Brings into gin what files and bindings say, and nothing else; what gin then prints, which
    takes a while. Raises Mistake for an unknown file, macro, component or setting, with the nearest
    names."""
    import gin

    register()
    gin.clear_config()
    _check_files(files, paths)
    _without_packages()
    for path in paths:
        _add_search_path(path)
    gin.parse_config([f"{c}.{s} = @{d}()" for c, s, d in _known().nested_defaults()])
    for file in files:
        _check_statements(file, paths)
        with _explained(file):
            gin.parse_config_file(file)
    return _bind(files, bindings)


def from_flags(
    flags: Sequence[str],
    keep: bool = False,
    *,
    fill: bool = False,
    kinds: Sequence[str] = EXPERIMENTS,
) -> Any:
    """The experiment that flags of `python -m dgr_jax.train`, or of the command of another kind,
    describe; see `load_experiment`."""
    args, bindings = cli.parse(cli.parser("train", ""), flags)
    return load_experiment(args, bindings, kinds, keep=keep, fill=fill)


def _labelled(experiment: Any) -> Any:
    """The experiment, without labels where its collection has none; see `stages.labels`."""
    from dgr_jax.stages import labels

    return labels.without_labels(experiment)


def _filled(printed: str) -> str:
    """Sets every setting that is still required to a word; those that are no strings refuse it.

    printed: what gin prints; -> what it prints then.
    """
    import gin

    required = re.findall(r"^(\S+) = %gin\.REQUIRED$", printed, re.MULTILINE)
    for name in required:
        gin.parse_config(f"{name} = 'NOT_GIVEN'")
    return gin.config_str() if required else printed


def files_of(args: argparse.Namespace) -> list[str]:
    """The gin files of the flags, or that of MODEL_DIR. Raises Mistake where there is none."""
    if args.gin_file:
        return args.gin_file
    if not args.model_dir:
        raise Mistake("give --gin_file=FILE, such as quickstart.gin, or --model_dir=DIR")
    file = Path(args.model_dir) / "config.gin"
    if not file.is_file():
        raise Mistake(f"no experiment at {file}; give --gin_file=FILE")
    return [str(file)]


def _check_files(files: Sequence[str], paths: Sequence[str]) -> None:
    for path in paths:
        if not Path(path).is_dir():
            raise Mistake(f"--gin_search_paths: {path} is no folder")
    for file in files:
        if not any((Path(path) / file).is_file() for path in paths):
            names = sorted(
                f.relative_to(path).as_posix()
                for path in paths
                for form in ("*.gin", "*/*.gin")
                for f in Path(path).glob(form)
            )
            raise Mistake(
                f"--gin_file={file}: not found in {', '.join(paths)}{_nearest(file, names)}"
            )


def parsed(source: Any, where: str) -> list[Any]:
    """The statements of a gin file, or of a text, before gin obeys any of them."""
    from gin import config_parser

    class Names(config_parser.ParserDelegate):
        def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
            return scoped_configurable_name

        def macro(self, macro_name: str) -> str:
            return macro_name

    with _explained(where):
        return list(config_parser.ConfigParser(source, Names()))


def _check_statements(file: str, paths: Sequence[str]) -> None:
    """Raises Mistake where a gin file, or one that it includes, would run code or reach beyond its
    folders: whoever reads a file of somebody else runs nothing of theirs."""
    place = place_of(file, paths)
    assert place is not None  # `_check_files` has found it
    named = [place.resolve().parent, *(Path(path).resolve() for path in paths if path != ".")]
    _check_included(file, paths, named, ())


def _check_included(
    file: str, paths: Sequence[str], named: Sequence[Path], above: tuple[Path, ...]
) -> None:
    """named: folders that an include may give in full; above: the files that include this one."""
    place = place_of(file, paths)
    if place is None:  # gin will say so
        return
    if place in above:
        raise Mistake(f"{above[-1]} includes {file}, which includes it")
    with place.open(encoding="utf-8") as text:
        statements = parsed(text, file)
    for statement in statements:
        if module := getattr(statement, "module", None):
            raise Mistake(
                f"{place}:{statement.location.line_num}: got an import of {module}, expected none: "
                "gin files name the components of dgr_jax, and run no other code"
            )
        if included := getattr(statement, "filename", None):
            within = place_of(included, paths)
            free = not Path(included).is_absolute() and ".." not in Path(included).parts
            folders = [*named, Path.cwd()] if free else named
            if within and not any(within.resolve().is_relative_to(f) for f in folders):
                raise Mistake(
                    f"{place}:{statement.location.line_num}: include {included!r}: expected a file "
                    f"in {', '.join(map(str, folders))}; add folders by --gin_search_paths"
                )
            _check_included(included, paths, named, (*above, place))


def _own_lines(file: str, paths: Sequence[str]) -> Iterator[bound.Line]:
    """The lines of a gin file, and of those that it includes, which are not shipped."""
    place = place_of(file, paths)
    if place is None or place.resolve().is_relative_to(resources("gin_configs").resolve()):
        return
    with place.open(encoding="utf-8") as text:
        statements = parsed(text, file)
    for statement in statements:
        if included := getattr(statement, "filename", None):
            yield from _own_lines(included, paths)
        elif selector := getattr(statement, "selector", None):
            name = selector.rpartition(".")[2]
            where = f"{place}:{statement.location.line_num}"
            yield bound.Line(where, statement.scope, name, statement.arg_name)


def place_of(file: str, paths: Sequence[str]) -> Path | None:
    """Where gin finds a file: as it is named, or else in the first folder that has it."""
    places = (Path(folder, file) for folder in ("", *paths))
    return next((place for place in places if place.is_file()), None)


def _without_packages() -> None:
    """gin also looks into Python packages, and breaks off where a folder of the working directory
    (models/, runs/) has the name of one of our folders: only files are read here."""
    import gin

    readers = gin.config._FILE_READERS
    readers[:] = [pair for pair in readers if pair[1].__module__ != "gin.resource_reader"]


@functools.cache
def _add_search_path(path: str) -> None:
    """Adds a folder to gin's search path, once in a process, as gin cannot remove one."""
    import gin

    gin.add_config_file_search_path(path)


def _bind(files: Sequence[str], bindings: Sequence[str]) -> str:
    """Puts bindings over the files; -> what gin prints.

    Raises Mistake where one names an unknown macro, and where a macro is used that nothing sets.
    """
    import gin

    printed = gin.config_str()
    macros = _MACRO.findall(printed)
    for binding in bindings:
        name = binding.partition(" =")[0]
        if "." not in name and name not in macros:
            where = f"{', '.join(files)} has no macro {name}"
            if name in FLAGS:
                raise Mistake(f"{FLAGS[name]}: {where}, so it would not be looked at")
            raise Mistake(f"--gin.{name}: {where}{_nearest(name, macros)}")
        given = f"--gin.{binding.replace(' = ', '=')}"
        if [type(part).__name__ for part in parsed(binding, given)] != ["BindingStatement"]:
            raise Mistake(f"{given!r}: expected one --gin.NAME=VALUE")
        with _explained(given):
            gin.parse_config(binding)
    if bindings:
        printed = gin.config_str()
    for name in _MACRO_REFERENCE.findall(_STRING.sub("''", printed)):
        if name not in macros and name != "gin.REQUIRED":
            raise Mistake(f"{', '.join(files)}: %{name} is not set{_nearest(name, macros)}")
    return printed


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turns gin's errors into a Mistake: the place, gin's words, and the nearest names."""
    try:
        yield
    except (SyntaxError, tokenize.TokenError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else error.args[1][0]
        place = where if where.startswith("--") else f"{where}:{line}"
        raise Mistake(
            f"{place}: gin cannot read this; are strings in quotes, and brackets closed?"
        ) from error
    except (AttributeError, ValueError, TypeError, NameError, OSError) as error:
        message = str(error)
        if not where.startswith("--") and (match := _PLACE.search(message)):
            where = f"{match[1]}:{match[2]}"
        message = message.strip().splitlines()[0].removesuffix(".")
        raise Mistake(f"{where}: {message}{_nearest_in(message)}") from error


def _nearest_in(message: str) -> str:
    """The nearest known names where gin names an unknown one."""
    components = _known().configurables()
    if unknown := re.search(r"No configurable matching (?:reference )?'@?([^'()]+)", message):
        return _nearest(unknown[1].split("/")[-1], list(components))
    parameter = re.search(r"parameter named '([^']+)'", message)
    target = re.search(r"[Cc]onfigurable '([^']+)'", message)
    if parameter and target and (component := components.get(target[1].split(".")[-1])):
        return _nearest(parameter[1], list(inspect.signature(component).parameters))
    return ""


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; there are: {', '.join(known[:40])}" if known else ""


def _kind(files: Sequence[str], kinds: Sequence[str], printed: str) -> str:
    """Which of these the files describe, of which gin prints this. Raises Mistake where it is an
    experiment of another command."""
    commands = {**dict.fromkeys(EXPERIMENTS, "train"), "PseudoQueries": "pseudo_queries"}
    commands["Refresh"] = "update --refresh"
    marks = ("model_dir", "gin_files")  # of experiments, and of studies of these
    set_up = {name for _, name, key in bound.settings(printed) if key in marks}
    if described := [kind for kind in kinds if kind in set_up]:
        return described[0]
    if others := [other for other in commands if other in set_up]:
        raise Mistake(f"{', '.join(files)} is for python -m dgr_jax.{commands[others[0]]}")
    return kinds[0]


def _call_experiment(files: Sequence[str], kind: str) -> Any:
    """Makes the experiment. Raises Mistake naming all that must still be given, or what a component
    says of its settings."""
    import gin

    try:
        return gin.get_configurable(kind)()
    except _known().Missing as error:
        missing = re.findall(r"^(\S+) = %gin\.REQUIRED$", gin.config_str(), re.MULTILINE)
        asked = (f"{FLAGS.get(name, f'--gin.{name}')}=..." for name in missing)
        raise Mistake(f"{', '.join(files)} needs {', '.join(asked)}") from error
    except (TypeError, ValueError) as error:
        # gin appends where it was; what the settings said is before it.
        raise Mistake(str(error).strip().split("\n  In call to")[0]) from error


def _check_tasks(name: str) -> None:
    known = sorted(f.stem for f in resources("tasks").glob("[a-z]*.py"))
    if name not in known:
        raise Mistake(f"Prepare.tasks: no tasks/{name}.py{_nearest(name, known)}")


def _check_model_dir(folder: str, given: str | None) -> None:
    if folder and given and folder != given:
        raise Mistake(f"--model_dir={given}: the gin files set {folder}, whatever MODEL_DIR is")
    if "://" in folder:
        raise Mistake(
            f"MODEL_DIR: got {folder}, expected a folder: its files are mapped into memory and "
            "renamed, so a bucket must be mounted, as by gcsfuse or mount-s3"
        )


def _known():
    """The module of all configurables, imported when a gin file is read: it imports JAX."""
    from dgr_jax.config import configurables

    return configurables


@functools.cache
def register() -> None:
    """Make every configurable known to gin, once a process."""
    import gin

    for name, component in _known().configurables().items():
        gin.external_configurable(component, name=name, module="dgr_jax")
