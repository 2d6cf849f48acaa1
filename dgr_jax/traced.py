"""Programs that were traced, kept for the next command: it reads them instead of tracing again.

JAX's cache of compiled programs finds a program by its text, which is made by tracing and lowering
the functions of this package: the greater part of the time to answer a first question. Here the
text itself is kept (`jax.export`: StableHLO, no code of Python), by all that it depends on. JAX is
imported where it is needed, for commands ask for the folder before.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SUFFIX = ".traced"
folder: Path | None = None
_HASH = hashlib.sha256().digest_size  # bytes
_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion")


@functools.cache
def _package() -> str:
    """The sources of this package, and the versions of the libraries that trace it."""
    here = Path(__file__).parent
    libraries = [metadata.version(name) for name in ("jax", "jaxlib", "flax")]
    mark = hashlib.sha256(repr(libraries).encode())
    for path in sorted(here.rglob("*.py")):
        mark.update(str(path.relative_to(here)).encode())
        mark.update(path.read_bytes())
    return mark.hexdigest()


def keep_in(kept: Path | None) -> None:
    """From now on, programs are read from this folder and left in it; None: they are not."""
    global folder
    folder = kept


def kept(name: str, settings: object, program: Any) -> Callable[..., Any]:
    """The jitted `program`, whose text is kept where `keep_in` was told a folder.

    settings: all that it depends on beside its arguments and the sources of this package, by its
      repr. Arguments and results are trees of arrays on one device; with others the program is
      traced as usual. The result's trees are those of JAX, or registered with `jax.export`.
    """
    return program if folder is None else _Kept(folder, f"{name} {settings!r}", program)


def kept_shapes(name: str, make: Callable[[], Any]) -> Any:
    """The shapes of a model's parameters that `make` finds by tracing it, kept likewise.

    name: of the model, with all its settings. They are dicts of `jax.ShapeDtypeStruct`, some in
    boxes that name their logical axes; other trees are not kept.
    """
    if folder is None:
        return make()
    path = folder / f"{_mark(name)}{SUFFIX}.json"
    try:
        return _unpacked(json.loads(_read(path)))
    except FileNotFoundError:
        pass
    except Exception as error:
        logger.warning("%s: cannot be read (%s), and is made again", path, error)
    shapes = make()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        content = json.dumps(_packed(shapes))
        if _unpacked(json.loads(content)) == shapes:
            _write(path, content.encode())
    return shapes


def _packed(shapes: Any) -> Any:
    """Shapes as JSON: a list of shape, dtype and logical axes for each leaf."""
    if isinstance(shapes, dict):
        return {name: _packed(node) for name, node in shapes.items()}
    names = getattr(shapes, "names", None)
    leaf = shapes if names is None else shapes.value
    return [leaf.shape, str(leaf.dtype), names]


def _unpacked(packed: Any) -> Any:
    import jax
    import numpy as np
    from flax import linen as nn

    if isinstance(packed, dict):
        return {name: _unpacked(node) for name, node in packed.items()}
    shape, dtype, names = packed
    leaf = jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
    return leaf if names is None else nn.LogicallyPartitioned(leaf, tuple(names))


def _mark(*named: Any) -> str:
    """The name of a file, by what its content depends on: this package's sources, and more."""
    return hashlib.sha256(repr([_package(), *named]).encode()).hexdigest()[:32]


class _Kept:
    """A jitted program that reads or leaves its text at the first call with other shapes."""

    def __init__(self, folder: Path, name: str, program: Any) -> None:
        self._folder, self._name, self._program = folder, name, program
        self._ready: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any) -> Any:
        import jax

        leaves, tree = jax.tree.flatten(arguments)
        # At every call, of every parameter: nothing here that takes longer than to look it up.
        shapes = tuple([getattr(leaf, "aval", type(leaf)) for leaf in leaves])
        if (tree, shapes) not in self._ready:
            self._ready[tree, shapes] = self._opened(leaves, tree, shapes)
        return self._ready[tree, shapes](*leaves)

    def _opened(self, leaves: list[Any], tree: Any, shapes: Any) -> Callable[..., Any]:
        import jax
        from jax import export

        traced = lambda *leaves: self._program(*tree.unflatten(leaves))
        if not all(isinstance(leaf, jax.Array) for leaf in leaves):
            return traced
        devices = {device for leaf in leaves for device in leaf.devices()}
        if len(devices) != 1:
            return traced
        (device,) = devices
        options = [getattr(jax.config, option) for option in _OPTIONS]
        named = [self._name, str(tree), shapes, device.platform, device.device_kind, options]
        path = self._folder / f"{_mark(*named)}{SUFFIX}"
        try:
            return jax.jit(export.deserialize(_read(path)).call)
        except FileNotFoundError:
            pass
        except Exception as error:  # of a damaged file, whatever its reader stumbles over
            logger.warning("%s: cannot be read (%s), and is made again", path, error)
        try:
            exported = export.export(jax.jit(traced))(*leaves)
            _write(path, exported.serialize())
        except (ValueError, NotImplementedError, OSError):  # of what cannot be, or is not, kept
            return traced
        return jax.jit(exported.call)


def _read(path: Path) -> bytearray:
    """What `_write` wrote. Raises ValueError where it was changed since: a program with one other
    bit may still be one, which answers wrongly."""
    written = path.read_bytes()
    content = written[_HASH:]
    if hashlib.sha256(content).digest() != written[:_HASH]:
        raise ValueError("it is damaged")
    return bytearray(content)


def _write(path: Path, content: bytes | bytearray) -> None:
    """Writes a file that is whole as soon as it has its name, its hash before its content."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
