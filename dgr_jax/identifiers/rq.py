"""Docids from residual quantisation: a coarse code first, then codes of what is left over."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from dgr_jax import ranges
from dgr_jax.identifiers import embeddings, kept_models, kmeans
from dgr_jax.identifiers.embeddings import Embeddings, TfidfSvd
from dgr_jax.identifiers.scheme import Addition, CorpusSize, Material, Scheme, Sizes, TableSizes
from dgr_jax.identifiers.table import IdentifierTable, sort_rows
from dgr_jax.settings import unless_default
from dgr_jax.special_tokens import LONGEST_IDENTIFIER

_log = logging.getLogger(__name__)

_CODEBOOKS = "codebooks"  # folder of what is kept
_FEW = 32  # passages, below which one code is enough
_SIZES = (16, 32, 64, 128, 256)  # sizes to choose from, where a codebook's is not set
# Shares of the passages with codes of their own: what is wanted, and where a warning begins.
_WANTED, _ENOUGH = 0.95, 0.9
_GROWN = 3  # larger choices that are tried, at most


@dataclass(frozen=True)
class ResidualQuantization(Scheme):
    """k-means codes level by level, collision-free by a last tie code.

    Level l clusters the residuals of level l-1 into `codebook_size` codes (RIPOR, Zeng et al. 2024,
    without their learned encoder); passages with the same codes are numbered in corpus order by the
    last code, which then every passage has (TIGER, Rajput et al. 2023).
    num_codes, codebook_size: None: what so many passages need, see `sized`.
    spread: collisions are first spread over the last level: passages that agree on all codes before
    it take different codes there, at the least total distance, in groups of up to so many passages;
    0 leaves every passage at its nearest code, and collisions to the tie code alone.
    train_passages: codebooks are trained on a sample of this size; then all passages are coded
    in pieces. full_batch: up to so many training passages full k-means runs, mini-batches above.
    reserve: further tie codes, for passages that come later (`dgr_jax.update`); with them, every
    passage has a tie code.
    """

    codes_by_position = True  # a code of another level is another token

    num_codes: int | None = None
    codebook_size: int | None = None
    embeddings: Embeddings = field(default_factory=TfidfSvd)
    spread: int = 1024
    train_passages: int = 200_000
    full_batch: int = 50_000
    reserve: int = unless_default(0)

    def __post_init__(self) -> None:
        ranges.check(
            self,
            num_codes=ranges.optional(ranges.at_least(1)),
            codebook_size=ranges.optional(ranges.tokens(2)),
            spread=ranges.at_least(0),
            train_passages=ranges.at_least(1),
            full_batch=ranges.at_least(0),
            reserve=ranges.tokens(0),
        )
        ranges.check(self, num_codes=ranges.optional(ranges.identifier_tokens(beside=1)))

    def tables(self, material: Material) -> list[IdentifierTable]:
        """Rows int32 [P, num_codes + 1]: first_code_id + level * codebook_size + code.

        The tie codes follow the last level: as many tokens as the largest group has passages.
        Without any collision there is no tie code, and rows have num_codes tokens: a token that
        is the same everywhere would cost a decoding step and teach nothing.

        What is not set of the number and the size of codes is `sized` by the number of passages; it
        grows where less than 95% of them have codes of their own, as with passages much alike.
        """
        vectors = embeddings.embedded(self.embeddings, material.store, material.seed, material.keep)
        chosen, codes, distinct = self, np.zeros((0, 0), np.int32), 0
        codebooks: list[np.ndarray] = []
        for sized in self._choices(len(vectors)):
            tried_codebooks = sized.train(vectors, material.seed)
            tried = sized._codes(vectors, tried_codebooks)
            now_distinct, own = _distinct(tried)
            if now_distinct <= distinct:
                break
            chosen, codes, distinct = sized, tried, now_distinct
            codebooks = tried_codebooks
            _log.info(
                "rq: %d codes of %d: %s of %s passages (%.1f%%) have codes of their own",
                *(sized.num_codes, sized.codebook_size, f"{own:,}", f"{len(codes):,}"),
                100 * own / len(codes),
            )
            if own >= _WANTED * len(codes):
                break
        if material.keep is not None:
            arrays = {str(level): codebook for level, codebook in enumerate(codebooks)}
            sizes = np.array(chosen._shape())
            kept_models.save(material.keep / _CODEBOOKS, {"sizes": sizes, **arrays})
        return [chosen._table(codes, material.first_code_id)]

    def rows(self, addition: Addition) -> np.ndarray:
        """See Scheme: the codes of the codebooks as they are.

        A row must be free: among those that begin with the same codes, the last code with the
        fewest passages, of these the nearest, and its first free tie code; without `spread`, the
        nearest that has one. Where all are taken, the second nearest code of the level before.
        """
        folder = addition.kept / _CODEBOOKS
        num_codes, size = kept_models.load(folder, ["sizes"])["sizes"].tolist()
        codebooks = list(kept_models.load(folder, map(str, range(num_codes))).values())
        texts = [passage.contents for passage in addition.passages]
        vectors = embeddings.later(self.embeddings, texts, addition.kept)
        before = np.arange(num_codes) * size + addition.first_code_id
        first_tie = before[-1] + size
        tied = addition.table.tokens.shape[1] > num_codes
        ties = addition.table.num_code_tokens - num_codes * size if tied else 1
        codes = np.asarray(addition.table.tokens[:, :num_codes]) - before.astype(np.int32)
        last = (
            addition.table.tokens[:, num_codes] - first_tie if tied else np.zeros(len(codes), int)
        )
        cells = _Cells(codebooks, codes, last, ties, bool(self.spread))
        rows = np.zeros((len(vectors), addition.table.tokens.shape[1]), np.int32)
        for row, vector in zip(rows, vectors, strict=True):
            taken = cells.take(vector)
            if taken is None:
                left = len(codes) + len(rows)
                raise ValueError(
                    f"ResidualQuantization: no identifier is left for {left:,} passages with "
                    f"{num_codes} codes of {size} and {ties} tie codes; prepare and train again "
                    "with all passages, or with ResidualQuantization.reserve"
                )
            row[:num_codes] = taken[:-1] + before
            row[num_codes:] = taken[-1] + first_tie
        return rows

    def sizes(self, corpus: CorpusSize) -> Sizes:
        """Codes used evenly; a code for ties where there is no room for twice the passages."""
        passages, (num_codes, size) = corpus.passages, self.sized(corpus.passages)._shape()
        levels = (size,) * num_codes
        if math.prod(levels) < 2 * passages:
            levels = (*levels, max(2, math.ceil(2 * passages / math.prod(levels))))
        elif self.reserve:
            levels = (*levels, 1)
        table = TableSizes(passages, levels)
        return Sizes((table,), codes=sum(levels) + self.reserve)

    def sized(self, num_passages: int) -> ResidualQuantization:
        """These settings with the number and the size of codes that so many passages need.

        The least number, from two on, of codes for which a codebook of 256 codes is enough, and
        then, of two or three codes, the smallest codebook of 16, 32, 64, 128 or 256 that is enough.
        Enough is

            size ** number >= 4 * 16 ** min(number - 2, 2) * passages

        for k-means fills the cells of its codes unevenly, the more so the more codes there are
        (codebooks below 64, where they are set: size / 4 for 16). With so much room nearly all
        passages of real collections have codes of their own once they are spread. 1,000 passages
        get 2 codes of 64, 100,000 get 3 of 256, a million 4 of 256. Fewer than 32, and as many as
        one codebook has codes, get one code: a second would tell nothing.
        """
        return next(self._choices(num_passages))

    def _choices(self, num_passages: int) -> Iterator[ResidualQuantization]:
        """What `sized` gives, then a few larger ones, where something is not set."""
        sizes = [self.codebook_size] if self.codebook_size else _SIZES
        few = num_passages < _FEW or num_passages <= (self.codebook_size or 0)
        numbers = (
            [self.num_codes] if self.num_codes else [1] if few else range(2, LONGEST_IDENTIFIER)
        )
        pairs = [(num_codes, size) for num_codes in numbers for size in sizes]
        if not self.num_codes and not self.codebook_size:
            pairs = [(n, size) for n, size in pairs if n < 4 or size == max(sizes)]
        cells, least, left = num_passages, 0, 1 + _GROWN
        for num_codes, size in pairs:
            enough = _cells(num_codes, size) >= cells and size >= least
            if left and (enough or (num_codes, size) == pairs[-1]):
                cells, least, left = _cells(num_codes, size) + 1, size, left - 1
                yield replace(self, num_codes=num_codes, codebook_size=size)

    def _shape(self) -> tuple[int, int]:
        """The number and the size of codes, as `_choices` has set both."""
        assert self.num_codes and self.codebook_size
        return self.num_codes, self.codebook_size

    def _codes(self, vectors: np.ndarray, codebooks: list[np.ndarray]) -> np.ndarray:
        """Codes int32 [P, num_codes], spread where they collide."""
        codes = self.quantize(vectors, codebooks)
        if self.spread:
            self._spread_last_level(codes, vectors, codebooks)
        return codes

    def _table(self, codes: np.ndarray, first_code_id: int) -> IdentifierTable:
        """The table of codes int32 [P, num_codes]."""
        ties, (num_codes, size) = tie_codes(codes), self._shape()
        rows = codes + np.arange(num_codes, dtype=np.int32) * size
        num_code_tokens = num_codes * size
        if ties.any() or self.reserve:
            rows = np.column_stack([rows, ties + num_code_tokens])
            num_code_tokens += int(ties.max()) + 1 + self.reserve
        own = _distinct(codes)[1]
        if own < _ENOUGH * len(codes):
            self._warn(own, len(codes), int(ties.max()) + 1)
        table = IdentifierTable.from_rows(
            rows + np.int32(first_code_id),
            view="rq",
            num_code_tokens=num_code_tokens,
            counts={"passages_with_codes_of_their_own": own},
        )
        return table.require_docids()

    def _warn(self, own: int, passages: int, largest: int) -> None:
        wanted, (num_codes, size) = ResidualQuantization().sized(passages), self._shape()
        _log.warning(
            "rq: %d codes of %d: %.1f%% of %s passages have codes of their own, expected %.0f%% or "
            "more; the others are told apart by a last code of %s tokens that says nothing of what "
            "they are about; %s",
            *(num_codes, size, 100 * own / passages, f"{passages:,}"),
            *(100 * _ENOUGH, f"{largest:,}"),
            "ResidualQuantization.num_codes and codebook_size, left unset, would be "
            f"{wanted.num_codes} and {wanted.codebook_size}"
            if _cells(num_codes, size) < passages
            else "look whether many passages are the same",
        )

    def train(self, vectors: np.ndarray, seed: int) -> list[np.ndarray]:
        """One codebook f32 [<= codebook_size, D] a level, from vectors [P, D]."""
        num_codes, size = self.sized(len(vectors))._shape()
        rows = kmeans.sample(len(vectors), self.train_passages, seed)
        # One fancy index on a memory map reads only the rows of the sample.
        residuals = kmeans.as_float32(vectors[rows], "embeddings").copy()
        codebooks = []
        for level in range(num_codes):
            codebook = kmeans.fit(residuals, size, seed=seed + level, full_batch=self.full_batch)
            codebooks.append(codebook)
            residuals -= codebook[kmeans.nearest(residuals, codebook)]
            _log.info("level %d: mean squared residual %.4f", level, np.mean(residuals**2))
        return codebooks

    def quantize(self, vectors: np.ndarray, codebooks: list[np.ndarray]) -> np.ndarray:
        """Codes int32 [P, num_codes] of vectors [P, D], a piece at a time."""
        codes = np.empty((len(vectors), len(codebooks)), np.int32)
        width = max(vectors.shape[1], *map(len, codebooks))
        for rows in kmeans.chunks(len(vectors), width):
            residuals = kmeans.as_float32(vectors[rows], "embeddings").copy()
            for level, codebook in enumerate(codebooks):
                codes[rows, level] = kmeans.nearest(residuals, codebook)
                residuals -= codebook[codes[rows, level]]
        return codes

    def _spread_last_level(
        self, codes: np.ndarray, vectors: np.ndarray, codebooks: list[np.ndarray]
    ) -> None:
        """Reassigns last codes, in place, in groups that agree before them and collide."""
        for members in _colliding_groups(codes):
            if len(members) > self.spread:
                continue
            residuals = kmeans.as_float32(vectors[members], "embeddings").copy()
            for level, codebook in enumerate(codebooks[:-1]):
                residuals -= codebook[codes[members, level]]
            codes[members, -1] = _distinct_nearest(residuals, codebooks[-1])


class _Cells:
    """Which codes, and tie codes, passages have.

    codebooks: f32 [codes, D] of each level; codes int [P, L], sorted, and ties int [P] of passages
    that are there; num_ties: of each cell; spread: see ResidualQuantization.
    """

    def __init__(
        self,
        codebooks: list[np.ndarray],
        codes: np.ndarray,
        ties: np.ndarray,
        num_ties: int,
        spread: bool,
    ) -> None:
        self._codebooks, self._num_ties, self._spread = codebooks, num_ties, spread
        self._half_norms = [0.5 * (codebook * codebook).sum(axis=1) for codebook in codebooks]
        self._codes, self._ties = np.asfortranarray(codes), ties
        self._taken: dict[tuple[int, ...], np.ndarray] = {}

    def take(self, vector: np.ndarray) -> list[int] | None:
        """The codes of a vector f32 [D] and its tie code, which from now on are taken; None where
        no cell has room."""
        return self._take(np.asarray(vector, np.float32), ())

    def _take(self, residual: np.ndarray, before: tuple[int, ...]) -> list[int] | None:
        level = len(before)
        codebook = self._codebooks[level]
        nearest = np.argsort(self._half_norms[level] - codebook @ residual, kind="stable")
        if level == len(self._codebooks) - 1:
            return self._take_last(nearest, before)
        for code in nearest.tolist():
            if row := self._take(residual - codebook[code], (*before, code)):
                return row
        return None

    def _take_last(self, nearest: np.ndarray, before: tuple[int, ...]) -> list[int] | None:
        taken = self._of(before)
        counts = taken[nearest].sum(axis=1)
        free = counts < self._num_ties
        if not free.any():
            return None
        place = np.where(free, counts, self._num_ties).argmin() if self._spread else free.argmax()
        code = int(nearest[place])
        tie = int((~taken[code]).argmax())
        taken[code, tie] = True
        return [*before, code, tie]

    def _of(self, before: tuple[int, ...]) -> np.ndarray:
        """bool [codes, ties]: which of the cells that begin with these codes are taken."""
        if before not in self._taken:
            taken = np.zeros((len(self._codebooks[-1]), self._num_ties), bool)
            low, high = 0, len(self._codes)
            for level, code in enumerate(before):
                among = self._codes[low:high, level]
                low, high = low + np.searchsorted(among, [code, code + 1])
            taken[self._codes[low:high, -1], self._ties[low:high]] = True
            self._taken[before] = taken
        return self._taken[before]


def _cells(codes: int, size: int) -> float:
    """Passages for which so many codes of this size are enough, see `sized`."""
    if codes == 1:
        return size
    return size**codes / (4 * min(16, max(1, size // 4)) ** min(codes - 2, 2))


def _distinct(codes: np.ndarray) -> tuple[int, int]:
    """How many different rows codes int32 [P, L] has, and how many of them occur once."""
    _, starts = sort_rows(codes)
    once = starts & np.append(starts[1:], True)
    return int(np.count_nonzero(starts)), int(np.count_nonzero(once))


def _colliding_groups(codes: np.ndarray) -> list[np.ndarray]:
    """Passage indices of the groups with equal codes[:, :-1] in which whole rows are equal too."""
    order, starts_row = sort_rows(codes)
    prefixes = codes[order, :-1]
    starts_group = np.ones(len(codes), bool)
    starts_group[1:] = (prefixes[1:] != prefixes[:-1]).any(axis=1)
    first = np.flatnonzero(starts_group)
    collides = np.add.reduceat(~starts_row, first, dtype=np.int64) > 0
    ends = np.append(first[1:], len(codes))
    return [order[a:b] for a, b in zip(first[collides], ends[collides], strict=True)]


def _distinct_nearest(vectors: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """int32 [G]: codes of vectors [G, D], each used by at most ceil(G / codes) of them.

    The assignment of least total squared distance (Hungarian method).
    """
    from scipy.optimize import linear_sum_assignment

    share = -(-len(vectors) // len(codebook))
    distances = (codebook * codebook).sum(axis=1) - 2.0 * (vectors @ codebook.T)  # less |x|^2
    return (linear_sum_assignment(np.repeat(distances, share, axis=1))[1] // share).astype(np.int32)


def tie_codes(codes: np.ndarray) -> np.ndarray:
    """int32 [P]: the number of each passage among those with its codes [P, num_codes]."""
    order, starts = sort_rows(codes)
    position = np.arange(len(codes))
    group_start = np.maximum.accumulate(np.where(starts, position, 0))
    ties = np.empty(len(codes), np.int32)
    ties[order] = position - group_start
    return ties
