"""An index of all substrings of a corpus: a suffix array, built on the host and put on a device.

    index = suffix_array.build(passages, vocab_size=32_128)   # token ids of each passage
    index.save(folder); index = suffix_array.load(folder)     # memory-mapped
    constraint = index.constraint(max_length=10)              # arrays on the device
    result = beam_search(step_fn, constraint, cache, record=True, ...)
    constraint.counts(result.prefixes.state)                  # occurrences of every prefix
    index.locate(lo, hi, limit=1500)                          # passages that hold a span

The passages lie one after another, each followed by token 0, which occurs nowhere else, so that no
substring crosses the border of a passage. Suffixes that begin with the same tokens are neighbours
in the sorted order, so a substring is an interval [lo, hi) of it, and hi - lo is the number of its
occurrences. See suffix_array_build for the sorting, and suffix_array_expand for the decoding step.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dgr_jax.decoding import array_folder, suffix_array_branches, suffix_array_build
from dgr_jax.decoding.suffix_array_branches import SpanBranches
from dgr_jax.decoding.suffix_array_expand import SubstringConstraint
from dgr_jax.decoding.trie_build import size_class
from dgr_jax.model_dir import kept

_FORMAT = "dgr_jax.suffix_array"
_VERSION = 1
_MAX_VOCAB = 1 << 17
_MAX_POSITIONS = (1 << 31) - 1  # positions are int32, on the host as on the device
# Arrays of one length for all corpora, and what the others are padded with, where it is not 0.
_FIXED = ("first", "branches_levels")
_FILL = {"starts": np.iinfo(np.int32).max}


@dataclasses.dataclass(frozen=True)
class SuffixArray:
    """An index of all substrings on the host. Axis letters: N tokens, P passages, V vocabulary.

    tokens uint16 | uint32 [N + P]: the passages, each followed by a 0.
    suffixes int32 [N]: positions in `tokens`, sorted by the text that begins there.
    first int32 [V + 1]: the suffixes that begin with token t are [first[t], first[t + 1]).
    starts int32 [P]: position of each passage.
    branches: the next tokens of some spans, see suffix_array_branches.
    capacity: name -> length that an array is padded to on the device, of those that grow with the
      corpus; none: as they are.
    """

    tokens: np.ndarray
    suffixes: np.ndarray
    first: np.ndarray
    starts: np.ndarray
    branches: SpanBranches
    capacity: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        """Number of tokens of the corpus, without separators."""
        return len(self.suffixes)

    @property
    def vocab_size(self) -> int:
        return len(self.first) - 1

    @property
    def num_passages(self) -> int:
        return len(self.starts)

    @property
    def nbytes(self) -> int:
        """Bytes of the index, the same on disk and on the device."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        apart = ("branches", "capacity")
        own = {name: array for name, array in vars(self).items() if name not in apart}
        return own | {f"branches_{name}": array for name, array in vars(self.branches).items()}

    def find(
        self, spans: np.ndarray, lengths: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The interval (lo, hi), int64 [...] each, of every span: hi - lo is its count.

        spans: int [..., T]. lengths: int [...]; None for T. A span that does not occur has hi = lo.
        """
        spans = np.asarray(spans)
        lengths = np.full(spans.shape[:-1], spans.shape[-1]) if lengths is None else lengths
        lo, hi = np.zeros(spans.shape[:-1], np.int64), np.full(spans.shape[:-1], len(self))
        for depth in range(spans.shape[-1]):
            token, more = spans[..., depth], depth < np.asarray(lengths)
            hi = np.where(more & ~((token > 0) & (token < self.vocab_size)), lo, hi)
            token = np.clip(token, 0, self.vocab_size - 1)
            if depth == 0:
                below, above = self.first[token], self.first[token + 1]
            else:
                end = np.where(more, hi, lo)  # nothing lies beyond the end of a complete span
                below = self._search(lo, end, depth, token)
                above = self._search(below, end, depth, token + 1)
            lo, hi = np.where(more & (lo < hi), (below, above), (lo, hi)).astype(np.int64)
        return lo, hi

    def _search(self, lo, hi, depth, token):
        """The first suffix in [lo, hi) whose token at `depth` is at least `token`, or hi."""
        while (lo < hi).any():
            middle = np.minimum((lo + hi) // 2, len(self) - 1)
            here = self.tokens[np.where(lo < hi, self.suffixes[middle] + depth, 0)]
            right = here < token
            lo, hi = (
                np.where((lo < hi) & right, middle + 1, lo),
                np.where((lo < hi) & ~right, middle, hi),
            )
        return lo

    def next_tokens(self, lo: int, hi: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """All tokens that follow a span of `depth` tokens, ascending, and how often each does so.

        Reads the whole interval.
        """
        counts = np.zeros(self.vocab_size, np.int64)
        for part in suffix_array_build.parts(self.suffixes[lo:hi]):
            tokens, times = np.unique(self.tokens[part + depth], return_counts=True)
            counts[tokens] += times
        following = np.flatnonzero(counts[1:]) + 1  # 0: the passage ends here
        return following, counts[following]

    def locate(self, lo: int, hi: int, limit: int) -> np.ndarray:
        """The passages of the first `limit` occurrences of a span, int32, ascending."""
        positions = np.asarray(self.suffixes[lo : min(hi, lo + limit)])
        return np.unique(np.searchsorted(self.starts, positions, side="right") - 1).astype(np.int32)

    def constraint(
        self, *, max_length: int = 10, opening: np.ndarray | None = None
    ) -> SubstringConstraint:
        """The arrays on the default device, as a Constraint for beam_search.

        max_length: number of tokens of a complete span; see SubstringConstraint for shorter ones.
        opening: bool [V], the tokens with which a span may begin, such as those that begin a word;
          None allows all.

        Raises ValueError for a max_length below 1 and an opening of another shape or type.
        """
        if max_length < 1:
            raise ValueError(
                f"SuffixArray.constraint.max_length must be at least 1; got {max_length}"
            )
        opens = np.diff(self.first) > 0
        if opening is not None:
            opening = np.asarray(opening)
            if opening.shape != opens.shape or opening.dtype != np.bool_:
                raise ValueError(
                    f"SuffixArray.constraint.opening must be bool of shape {opens.shape}, one a "
                    f"token; got {opening.dtype} of shape {opening.shape}"
                )
            opens &= opening
        arrays = {
            name: _pad(array, self.capacity.get(name, 0), _FILL.get(name, 0))
            for name, array in self.arrays().items()
        }
        names = [field.name for field in dataclasses.fields(SpanBranches)]
        branches = SpanBranches(**{name: arrays.pop(f"branches_{name}") for name in names})
        ordered = [arrays[name] for name in ("tokens", "suffixes", "first", "starts")]
        return SubstringConstraint.put(ordered, branches, opens, max_length)

    def changed(
        self,
        stay: np.ndarray,
        passages: Iterable[Sequence[int] | np.ndarray],
        *,
        max_length: int = 10,
    ) -> SuffixArray:
        """The index of the passages that stay, bool [P], and then of others, as `build` would make
        it of all of them; only the suffixes of the others are sorted.

        An index of an older version may have suffixes that are equal up to the end of their
        passages in another order; they keep it.
        """
        stay, size = np.asarray(stay), self.vocab_size
        added, of_added = suffix_array_build.concatenate(passages, size)
        width = suffix_array_build.token_bytes(size)
        new = suffix_array_build.sorted_suffixes(added, of_added, width)
        lengths = np.diff(self.starts, append=len(self.tokens)) - 1
        tokens, suffixes = np.asarray(self.tokens), np.asarray(self.suffixes)
        first = np.asarray(self.first)
        if not stay.all():
            gone = tokens[np.repeat(~stay, lengths + 1)]
            tokens, suffixes = suffix_array_build.staying(tokens, suffixes, lengths, stay)
            first, lengths = first - suffix_array_build.first(gone, size), lengths[stay]
        all_of = len(suffixes) + len(new), len(lengths) + len(of_added)
        planned_bytes(*all_of, size)  # raises for too many
        staying = dataclasses.replace(self, tokens=tokens, suffixes=suffixes, first=first)
        places = staying._places(added, new)
        suffixes = np.insert(suffixes, places, new + np.int32(len(tokens)))
        tokens, lengths = np.concatenate([tokens, added]), np.concatenate([lengths, of_added])
        first = first + suffix_array_build.first(added, size)
        return _with_branches(tokens, suffixes, first, lengths, max_length)

    def _places(self, tokens: np.ndarray, suffixes: np.ndarray) -> np.ndarray:
        """int64 [n]: how many suffixes come before each of others, positions in other `tokens`;
        those that are equal do."""
        token = tokens[suffixes].astype(np.int64)
        lo, hi = (self.first[token + i].astype(np.int64) for i in (0, 1))
        left, depth = np.flatnonzero(lo < hi), 1  # those that may still belong to several places
        while len(left):
            token = tokens[suffixes[left] + depth].astype(np.int64)
            asked = np.stack([lo[left], token])  # neighbours often ask the same
            new = np.append(True, (asked[:, 1:] != asked[:, :-1]).any(0))
            below = self._search(lo[left][new], hi[left][new], depth, token[new])
            above = self._search(below, hi[left][new], depth, token[new] + 1)
            below, above = (bounds[np.cumsum(new) - 1] for bounds in (below, above))
            ends = token == 0
            lo[left], hi[left] = np.where(ends, above, below), above
            left, depth = left[~ends & (below < above)], depth + 1
        return lo

    def like(self, other: SuffixArray) -> SuffixArray:
        """The same, of the shapes that another index has on the device, as long as all fit, so that
        nothing is compiled again; where they do not, there is room for a quarter more."""
        sizes = {name: len(a) for name, a in self.arrays().items() if name not in _FIXED}
        fits = other.capacity and all(n <= other.capacity[name] for name, n in sizes.items())
        room = {name: size_class(max(1024, n + n // 4)) for name, n in sizes.items()}
        return dataclasses.replace(self, capacity=other.capacity if fits else room)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes a .npy file for each array, and then header.json."""
        array_folder.save(folder, self.arrays(), kind=_FORMAT, version=_VERSION,
                          settings={"capacity": dict(self.capacity)})  # fmt: skip


def load(folder: str | pathlib.Path) -> SuffixArray:
    """Opens a saved index with memory-mapped arrays.

    Raises ValueError for files of another format or version, and for damaged ones.
    """
    fields = [field.name for field in dataclasses.fields(SpanBranches)]
    apart = ("branches", "capacity")
    own = [field.name for field in dataclasses.fields(SuffixArray) if field.name not in apart]
    needed = {"sha256": [*own, *(f"branches_{name}" for name in fields)]}
    arrays, header = array_folder.load(folder, kind=_FORMAT, version=_VERSION, needed=needed)
    with kept.reading(pathlib.Path(folder) / "header.json"):
        branches = SpanBranches(**{name: arrays.pop(f"branches_{name}") for name in fields})
        capacity = {str(name): int(size) for name, size in header.get("capacity", {}).items()}
        return SuffixArray(**arrays, branches=branches, capacity=capacity)


def build(
    passages: Iterable[Sequence[int] | np.ndarray], *, vocab_size: int, max_length: int = 10
) -> SuffixArray:
    """Builds the index of all substrings of the passages.

    passages: the token ids of each, 1 to vocab_size - 1, without padding; a stream is read once.
      Passages may be empty or equal.
    vocab_size: V, at most 2^17.
    max_length: number of tokens of the spans to be decoded. Longer spans can be decoded too, also
      exactly, but their last steps may be slow.

    Time and memory: see planned_bytes.
    Raises ValueError for the token 0 and tokens outside the vocabulary, for a corpus without
    tokens, and for one with 2^31 or more tokens and passages.
    """
    if not 2 <= vocab_size <= _MAX_VOCAB:
        raise ValueError(
            f"suffix_array.build.vocab_size must be between 2 and {_MAX_VOCAB}; got {vocab_size}"
        )
    tokens, lengths = suffix_array_build.concatenate(passages, vocab_size)
    if not len(lengths):
        raise ValueError("suffix_array.build: no passages; expected at least one")
    planned_bytes(len(tokens) - len(lengths), len(lengths), vocab_size)  # raises for too many
    width = suffix_array_build.token_bytes(vocab_size)
    suffixes = suffix_array_build.sorted_suffixes(tokens, lengths, width)
    first = suffix_array_build.first(tokens, vocab_size)
    return _with_branches(tokens, suffixes, first, lengths, max_length)


def _with_branches(
    tokens: np.ndarray, suffixes: np.ndarray, first: np.ndarray, lengths: np.ndarray, longest: int
) -> SuffixArray:
    """An index whose spans are to be of `longest` tokens; lengths int [P], of the passages."""
    if not len(suffixes):
        raise ValueError(
            f"suffix_array.build: {len(lengths)} passages without a token; expected at least one"
        )
    branches = suffix_array_branches.find(tokens, suffixes, first, longest)
    return SuffixArray(tokens, suffixes, first, suffix_array_build.starts(lengths), branches)


def planned_bytes(num_tokens: int, num_passages: int, vocab_size: int) -> dict[str, int]:
    """The bytes of each array of an index, of all of them ("index"), and the most bytes that
    `build` holds at once ("build"). Nothing is allocated.

    In the index, on disk and on the device, a token takes 2 bytes, or 4 where the vocabulary is
    larger than 2^16; its suffix takes 4, as positions are below 2^31 (more tokens are refused); a
    passage takes 4 and a separator. The lists of suffix_array_branches depend on the text; a
    sixteenth of the suffixes and some KB are assumed. For 700M tokens of a vocabulary of 32,128 in
    8.8M passages that is 4.5 GB.

    Building sorts 2 or 3 bytes for each token, and for each of these bytes libdivsufsort needs 4
    bytes (8 from 2^31 bytes on, which is about 715M tokens of a vocabulary larger than 2^16). With
    the tokens and the positions of the sorted ones that is 10 GB for the same corpus.
    """
    positions = num_tokens + num_passages
    if positions > _MAX_POSITIONS:
        raise ValueError(
            f"suffix_array: {num_tokens} tokens and {num_passages} separators; expected at most "
            f"{_MAX_POSITIONS} together: split the corpus into several indexes"
        )
    width = suffix_array_build.token_bytes(vocab_size)
    sizes = {
        "tokens": positions * suffix_array_build.token_dtype(vocab_size).itemsize,
        "suffixes": 4 * num_tokens,
        "first": 4 * (vocab_size + 1),
        "starts": 4 * num_passages,
        "branches": num_tokens // 4 + 4096,
    }
    places = positions + suffix_array_build.NUMBER * num_passages
    order = places * width * (4 if places * width <= _MAX_POSITIONS else 8)
    build = sizes["tokens"] + order + places * (1 + 4)
    return {**sizes, "index": sum(sizes.values()), "build": build}


def _pad(array: np.ndarray, size: int, fill: int) -> np.ndarray:
    return np.pad(array, (0, max(0, size - len(array))), constant_values=fill)
