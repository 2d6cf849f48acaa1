"""What gin has bound once files are read: what has no effect, and the file that keeps all of it."""

from __future__ import annotations

import ast
import difflib
import functools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dgr_jax.config.mistakes import Mistake
from dgr_jax.model_dir import writer_lock

logger = logging.getLogger(__name__)

# A line of what gin prints: scope/Component.setting = ...
_SETTING = re.compile(r"^((?:[\w-]+/)*)([\w.]*?)(\w+)\.(\w+) =", re.MULTILINE)


def settings(text: str) -> list[tuple[str, str, str]]:
    """(scope, component, setting) of every binding in what gin prints."""
    return [(scope.rstrip("/"), name, key) for scope, _, name, key in _SETTING.findall(text)]


def winner(scope: str, name: str, key: str, there: Iterable[tuple[str, str, str]]) -> str | None:
    """The scope whose binding a call in `scope` takes: the longest that is bound; None: default."""
    parts = scope.split("/") if scope else []
    prefixes = ["/".join(parts[:n]) for n in range(len(parts), -1, -1)]
    return next((p for p in prefixes if (p, name, key) in there), None)


class Line(NamedTuple):
    """A line of a gin file: NAME = ..., which has no key, or scope/Component.key = ..."""

    place: str
    scope: str
    name: str
    key: str


class Effects(NamedTuple):
    """What gin prints of all that is bound, and of what an experiment was made with."""

    bound: str
    called: str

    @classmethod
    def now(cls, printed: str) -> Effects:
        """Those of the experiment that was made; printed: of all that is bound."""
        import gin

        return cls(printed, gin.operative_config_str())

    def check(self, bindings: Sequence[str]) -> None:
        """Raises Mistake where a binding of the command line reaches nothing because of its scope
        or of bindings that are more special, or is of a plan that is not there; warns where the
        experiment makes no other such component."""
        from dgr_jax.config import configurables  # imports JAX

        for setting, instead in self._without(settings("\n".join(bindings))):
            scope, name, key = setting
            given = f"--gin.{scope}/{name}.{key}" if scope else f"--gin.{name}.{key}"
            if not instead and name in configurables.plans():
                raise Mistake(
                    f"{given}: got a setting of a plan that this experiment does not have, "
                    f"expected --gin.PLAN=@{name}() beside it"
                )
            if not instead:
                logger.warning("%s has no effect: this experiment makes no %s", given, name)
                continue
            raise Mistake(f"{given} has no effect; set {' or '.join(instead)}")

    def _without(
        self, asked: Iterable[tuple[str, str, str]]
    ) -> Iterator[tuple[tuple[str, str, str], list[str]]]:
        """Those of (scope, component, setting) that nothing was made with, and what to set instead;
        nothing where no such component was made."""
        there, called = set(settings(self.bound)), settings(self.called)
        for scope, name, key in asked:
            calls = [s for s, n, k in called if (n, k) == (name, key)]
            if not any(winner(s, name, key, there) == scope for s in calls):
                others = sorted({f"{s}/{name}.{key}" for s in calls if s})
                yield (scope, name, key), others or [f"{name}.{key}"] * bool(calls)

    def say_without(self, lines: Iterable[Line]) -> None:
        """Warns of macros that nothing refers to and of settings that nothing was made with, which
        may be mistyped, once a process. A file may be for several experiments, so that it is no
        mistake."""
        macros = re.findall(r"^(\w+) =", self.bound, re.MULTILINE)
        used = set(re.findall(r"%(\w+)", self.bound))
        lines = list(lines)
        settable = ((line.scope, line.name, line.key) for line in lines if line.key)
        without = dict(self._without(settable))
        for line in lines:
            if not line.key:
                if line.name not in used:
                    near = difflib.get_close_matches(
                        line.name, sorted(used & {*macros}), cutoff=0.8
                    )
                    meant = f"; did you mean {' or '.join(near)}?" if near else ""
                    _say(f"{line.place}: {line.name} has no effect: nothing refers to it{meant}")
                continue
            instead = without.get((line.scope, line.name, line.key))
            if instead is not None:
                given = f"{line.scope}/{line.name}.{line.key}".removeprefix("/")
                why = f"; set {' or '.join(instead)}" if instead else f": no {line.name} is made"
                _say(f"{line.place}: {given} has no effect{why}")


@functools.cache
def _say(message: str) -> None:
    logger.warning("%s", message)


def keep(experiment: Any) -> None:
    """Writes MODEL_DIR/config.gin: every binding, and the defaults of every component made. From
    here on no other process writes into MODEL_DIR, see `writer_lock`.

    So the file alone says what is done, and bindings are as general as they were: any of them can
    be overridden when the experiment goes on.
    """
    import gin

    from dgr_jax.config import configurables  # imports JAX

    text = gin.config_str(max_line_length=100)
    there = set(settings(text))
    lines = {}
    for _, name, _ in settings(gin.operative_config_str()):
        for key, default in (
            configurables.defaults(name).items() if name in configurables.configurables() else ()
        ):
            if ("", name, key) not in there and _is_literal(default):
                lines[f"{name}.{key} = {default!r}"] = None
    folder = Path(experiment.model_dir)
    try:
        writer_lock.take(folder)
    except OSError as error:
        raise Mistake(f"MODEL_DIR {folder} cannot be made: {error.strerror}") from error
    rule = "# " + "=" * 78
    kept = f"{text}\n# Defaults:\n{rule}\n" + "\n".join(sorted(lines)) + "\n"
    if _read(folder / "config.gin") == kept:
        return
    partial = folder / "config.gin.partial"
    try:
        partial.write_text(kept, encoding="utf-8")
        partial.replace(folder / "config.gin")
    except OSError as error:  # what is finished there can be read all the same
        if error.errno not in writer_lock.READ_ONLY:
            raise
        logger.warning("%s: %s; it stays as it is", folder / "config.gin", error.strerror)


def _read(file: Path) -> str:
    """Blank where the file is missing or no text."""
    try:
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return ""


def _is_literal(value: object) -> bool:
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError):
        return False
