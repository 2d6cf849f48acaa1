"""A retriever as a folder to publish: safetensors, JSON and .npy, nothing that runs code.

The folder is a MODEL_DIR with the stages that answer alone: the student (its parameters in
safetensors, files of at most 5 GB), its prepare stage without the training data (vocabulary,
passages, identifiers, index), what is said of the evaluation, config.gin, and README.md, the card.
`Retriever.load` opens it as any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from dgr_jax import partitioning
from dgr_jax.corpora import store
from dgr_jax.model_dir import kept, records
from dgr_jax.model_dir.index_versions import Versions
from dgr_jax.models import tensor_files
from dgr_jax.retrieval import cards, kinds, trained

# Of a stage that answers: what only training, or whoever measures, reads.
_LEFT_OUT = (
    "arrays", "checkpoints", "collection", "runs", "tensorboard", "tfds", "metrics.jsonl",
    "*.png", "*.trec", store.QUERIES, kept.MEMORY, ".lock", records.RECORD, "*.partial*",
)  # fmt: skip
_CONFIG = "config.gin"
_ARTIFACT = {"type": "dgr", "format": "dgr_jax", "package_hint": "dgr_jax"}  # for PyTerrier


def save(
    model_dir: Path,
    answering: Mapping[str, records.Answering],
    folder: str | os.PathLike,
    *,
    license: str = "other",
    datasets: tuple[str, ...] = (),
) -> Path:
    """Writes what answers in a MODEL_DIR into a new folder.

    answering: name -> a trained system with its prepare stage. license, datasets: names that the
    hub knows, for the card.
    Raises FileExistsError where the folder holds anything.
    """
    target = Path(folder)
    if target.is_dir() and any(target.iterdir()) or target.is_file():
        raise FileExistsError(f"{target}: there is something already, expected a new folder")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for prepared in {answer.prepared for answer in answering.values()}:
            _copy(prepared, partial / "prepare")
            Versions.of(model_dir, prepared).copy_current(partial)
        for name, answer in answering.items():
            kept.whole(answer.student)
            _copy(answer.student, partial / name, _parameters(answer.student))
        for evaluated in records.finished(model_dir, kinds.EVALUATION, records.RECORD):
            _copy(evaluated, partial / kinds.EVALUATION)
            break
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(model_dir / _CONFIG, partial / _CONFIG)
        (partial / "pt_meta.json").write_text(json.dumps(_ARTIFACT, indent=1), encoding="utf-8")
        text = cards.card(partial, tuple(answering), license, datasets)
        (partial / "README.md").write_text(text, encoding="utf-8")
        if target.is_dir():
            target.rmdir()
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _copy(origin: Path, folder: Path, parameters: Mapping[str, np.ndarray] | None = None) -> None:
    """A stage without what is left out, and a record of the files that it has there."""
    shutil.copytree(origin, folder, ignore=shutil.ignore_patterns(*_LEFT_OUT), dirs_exist_ok=True)
    if parameters is not None:
        tensor_files.write_folder(folder, parameters)
    record = records.read_record(origin)
    records.write_record(folder, **{**record, kept.KEY: kept.sign(folder)})


def _parameters(student: Path) -> dict[str, np.ndarray]:
    """The parameters of a trained system by name, on the host."""
    said = kinds.read_student(student)
    kind = kinds.TRAINED[said.kind]
    network = kind.network(kinds.restored(kind.model_settings, said.model))
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    params = trained.params(student, network, mesh, partitioning.RULES)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {name: np.asarray(leaf) for name, leaf in flat.items()}


def push(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Uploads a folder to a model repository, which is made where it is absent -> its address.

    Files that are there already are not sent again, so that a push which was cut off goes on.
    """
    api = _library("push_to_hub").HfApi()
    with _reached(repo):
        url = api.create_repo(repo_id=repo, private=private, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message=message)
    return str(url)


def fetch(repo: str | os.PathLike, revision: str | None) -> Path:
    """The folder of a repository, of a local one itself. What was fetched before is not fetched
    again, and a download that was cut off goes on."""
    if Path(repo).is_dir():
        return Path(repo)
    if isinstance(repo, Path) or str(repo).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{os.fspath(repo)}: no such folder")
    with _reached(str(repo)):
        return Path(_library("from_hub").snapshot_download(str(repo), revision=revision))


def _library(asked: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"Retriever.{asked} needs the extra 'dgr_jax[pretrained]': pip install "
            "'dgr_jax[pretrained]'"
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def _reached(repo: str) -> Iterator[None]:
    """Errors of the hub, of many kinds, become an OSError with what can be done."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")[:300]
        raise OSError(
            f"{repo!r} could not be reached on the hub ({type(error).__name__}: {first}); without "
            "a network, write a folder by Retriever.save and give it to Retriever.from_hub"
        ) from error
