"""The pictures of docs/tour.md, from a trained quickstart.

    python -m dgr_jax.train --gin_file=quickstart.gin
    python scripts/tour_pictures.py --model_dir=quickstart_model docs/assets/tour

systems.png: measures of every system. map.png: passages and their first codes. beams.png: what the
student would write for a question. curves.png: how training went, as evaluate drew it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dgr_jax import Retriever
from dgr_jax.identifiers.embeddings import TfidfSvd
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.plots import COLOURS
from dgr_jax.stages.prepared import Prepared

QUESTION = "How do animals find their way in the dark?"
MEASURES = ("Success@1", "RR@10")
SHOWN = 6  # first codes of beams.png


def figure(width: float, height: float) -> tuple[Figure, Axes]:
    picture = Figure(figsize=(width, height), layout="constrained")
    axes = picture.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return picture, axes


def systems(model_dir: Path) -> Figure:
    """Bars of two measures of each system, the one that answers on top."""
    measured = json.loads((model_dir / "evaluate" / "metrics.json").read_text(encoding="utf-8"))
    names = sorted(measured, key=lambda name: measured[name]["test"]["RR@10"])
    picture, axes = figure(7.5, 0.7 + 0.5 * len(names))
    for place, measure in enumerate(MEASURES):
        heights = np.arange(len(names)) + 0.38 * (0.5 - place)
        values = [measured[name]["test"][measure] for name in names]
        bars = axes.barh(heights, values, 0.36, color=COLOURS[place], label=measure)
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return picture


def passage_map(model_dir: Path) -> Figure:
    """Passages by the two axes of their vectors that tell their first codes apart best.

    The six first codes with the most passages have a colour each.
    """
    prepared = Prepared.load(model_dir)
    vectors = TfidfSvd(dim=64).embed(prepared.store, 0)
    first = first_codes(model_dir)
    codes, counts = np.unique(first, return_counts=True)
    common = codes[np.argsort(-counts, kind="stable")[:SHOWN]]
    centres = np.stack([vectors[first == code].mean(0) for code in common])
    axes_of_codes = np.linalg.svd(centres - centres.mean(0), full_matrices=False)[2][:2]
    places = vectors @ axes_of_codes.T
    picture, axes = figure(6.5, 4.5)
    others = ~np.isin(first, common)
    axes.scatter(*places[others].T, s=12, color="#b8bcc8", label="other codes")
    for colour, code in zip(COLOURS, common, strict=False):
        chosen = first == code
        title = prepared.store[int(np.flatnonzero(chosen)[0])].title
        label = f"{code - first.min()}: such as {title!r}"
        axes.scatter(*places[chosen].T, s=28, color=colour, label=label)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    return picture


def first_codes(model_dir: Path) -> np.ndarray:
    """int32 [P]: the first token of each passage's identifier."""
    table = IdentifierTable.load(model_dir / "prepare" / "identifiers")
    return np.asarray(table.tokens)[table.rows_of_passages(), 0]


def beams(model_dir: Path, question: str) -> Figure:
    """p(first code | question), each bar divided among the passages whose identifiers begin so."""
    first = first_codes(model_dir)
    sizes = {"num_beams": len(first), "depth": len(first)}
    retriever = Retriever.load(model_dir, system="distill", **sizes)
    hits = retriever.search([question], k=len(first))[0]
    passages = {retriever.store.pid_of(row): row for row in range(len(first))}
    shares: dict[int, list[tuple[float, str]]] = {}
    for hit in hits:
        shares.setdefault(int(first[passages[hit.pid]]), []).append(
            (float(np.exp(hit.score)), hit.title)
        )
    ordered = sorted(shares, key=lambda code: -sum(share for share, _ in shares[code]))[:SHOWN]
    picture, axes = figure(8, 3.4)
    for place, code in enumerate(reversed(ordered)):
        _bar(axes, place, shares[code])
    labels = [str(code - first.min()) for code in reversed(ordered)]
    axes.set_yticks(range(len(ordered)), labels)
    axes.set_ylabel("first code")
    axes.set_xlabel(f'probability, given "{question}"')
    return picture


def _bar(axes: Axes, place: int, shares: Sequence[tuple[float, str]]) -> None:
    """A bar of passages one after the other, the best first and named."""
    left = 0.0
    for number, (share, _) in enumerate(shares):
        axes.barh(place, share, left=left, color=COLOURS[5 * (number % 2)], edgecolor="white")
        left += share
    axes.text(left, place, f"  {shares[0][1]}: {shares[0][0]:.2f}", va="center", fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "systems": systems(args.model_dir),
        "map": passage_map(args.model_dir),
        "beams": beams(args.model_dir, args.question),
    }
    for name, picture in pictures.items():
        picture.savefig(args.folder / f"{name}.png", dpi=110)
    curves = args.model_dir / "evaluate" / "training_curves.png"
    shutil.copyfile(curves, args.folder / "curves.png")


if __name__ == "__main__":
    main()
