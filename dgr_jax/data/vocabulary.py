"""One vocabulary: text pieces (SentencePiece), view markers, docid codes. No TensorFlow here.

Token ids: 0 is padding and the start of a target, 1 the end of a sequence, 2 unknown; then come the
text pieces. Each block of ids after them begins at a multiple of 128, and the size is rounded up to
one. Docid codes begin at the first multiple after the text pieces (32,128 for the published T5
model, whose checkpoints have that many rows). A vocabulary with views has a block of their markers
there, and its docid codes begin 128 later. With the views of VIEWS and 1,000 text pieces:

    0 pad  1 eos  2 unk  3..999 text  1024 <title>  1025 <body>  1026 <query>  1152.. docid codes

dgr_jax.identifiers.multiview says where markers are used.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dgr_jax import ranges
from dgr_jax.corpora import lines
from dgr_jax.model_dir import kept
from dgr_jax.special_tokens import EOS_ID, PAD_ID, UNK_ID

VIEWS = ("title", "body", "query")
_MULTIPLE = 128


def round_up(n: int) -> int:
    """Rows of a block of the vocabulary that holds n tokens."""
    return -(-n // _MULTIPLE) * _MULTIPLE


@dataclass(frozen=True)
class SentencePiece:
    """Where the text pieces come from.

    path: a SentencePiece model (T5's `spiece.model`); if blank, one is trained on the corpus.
    size: number of pieces of a trained model; it has fewer where the corpus has fewer.
    lowercase: True folds case in a trained model, which small collections need.
    extra_ids: number of unused ids after the pieces; 100 for the published T5 model.
    max_sentences, max_characters: the most texts, and characters, from which a model is trained;
      where the corpus has more, it is trained on every second, fourth, eighth ... text. Training
      takes about 25 bytes of memory for each character.
    """

    path: str = ""
    size: int = 8000
    lowercase: bool = True
    extra_ids: int = 0
    max_sentences: int = 1_000_000
    max_characters: int = 60_000_000

    def __post_init__(self) -> None:
        ranges.check(
            self,
            size=ranges.tokens(UNK_ID + 2),  # at least one piece beside the three special ones
            extra_ids=ranges.tokens(0),
            max_sentences=ranges.at_least(1),
            max_characters=ranges.at_least(1),
        )

    def write(self, folder: Path, texts: Iterable[str]) -> Path:
        """Copies the model to `folder`/spiece.model, or trains it there.

        Raises FileNotFoundError when there is no file at `path`, ValueError when it is no model, or
        when there is no text to train on.
        """
        target = folder / "spiece.model"
        if not self.path:
            target.write_bytes(self._train(texts))
            return target
        given = lines.place(self.path)
        if not given.is_file():
            raise FileNotFoundError(
                f"SentencePiece.path: no file at {self.path!r}; expected a SentencePiece model, "
                "such as T5's spiece.model, or '' to train one on the corpus"
            )
        model = given.read_bytes()
        try:
            _processor_of(model)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"SentencePiece.path: {self.path!r} is no SentencePiece model, such as T5's "
                f"spiece.model ({error})"
            ) from error
        target.write_bytes(model)
        return target

    def _train(self, texts: Iterable[str]) -> bytes:
        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(
                    evenly(_lines(texts), self.max_sentences, self.max_characters)
                ),
                model_writer=model,
                vocab_size=self.size,
                hard_vocab_limit=False,
                pad_id=PAD_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                bos_id=-1,
                normalization_rule_name="nmt_nfkc_cf" if self.lowercase else "nmt_nfkc",
                max_sentence_length=65536,
                num_threads=1,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"SentencePiece could not be trained on this corpus with size={self.size}: {error}"
            ) from error
        return model.getvalue()


def _processor_of(model: bytes):
    """The processor of a model's bytes; RuntimeError or ValueError where they are no model."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if not model or not processor.get_piece_size():
        raise ValueError("it has no pieces")
    return processor


def evenly(texts: Iterable[str], max_texts: int, max_characters: int) -> list[str]:
    """All texts or, where these are too many, every second, fourth ... from the first on."""
    kept: list[str] = []
    characters, stride = 0, 1
    for place, text in enumerate(texts):
        if place % stride:
            continue
        kept.append(text)
        characters += len(text)
        while len(kept) > max(1, max_texts) or (len(kept) > 1 and characters > max_characters):
            kept, stride = kept[::2], 2 * stride
            characters = sum(map(len, kept))
    return kept


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        text = " ".join(text.split())
        if text:
            yield text


@dataclass(frozen=True)
class Vocabulary:
    """A prepared vocabulary in `folder`: spiece.model and vocabulary.json.

    views: the views that have a marker, in the order of their ids.
    """

    folder: Path
    text_size: int
    num_code_tokens: int = 0
    views: tuple[str, ...] = ()

    @classmethod
    def create(cls, folder: Path, *, extra_ids: int = 0, views: Sequence[str] = ()) -> Vocabulary:
        """The vocabulary over `folder`/spiece.model, before any docid code is known."""
        pieces = cls(folder, 0)._processor.get_piece_size()
        return cls(folder, pieces + extra_ids, views=tuple(views))

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """Reads what `save` wrote.

        Raises FileNotFoundError naming the file, kept.Damaged where it or the model beside it was
        changed since it was written.
        """
        path = folder / "vocabulary.json"
        if not path.is_file():
            raise FileNotFoundError(f"no vocabulary at {path}: run the prepare stage first")
        values = kept.read_json(path)
        with kept.reading(path):
            values["views"] = tuple(map(str, values.get("views", ())))
            sizes = {n: int(v) for n, v in values.items() if n != "views"}
            loaded = cls(folder, **values | sizes)
        kept.opened(folder / "spiece.model")
        return loaded

    def save(self) -> None:
        values = {k: v for k, v in asdict(self).items() if k != "folder"}
        (self.folder / "vocabulary.json").write_text(json.dumps(values), encoding="utf-8")

    @property
    def pieces(self) -> int:
        """Number of text pieces, without the unused ids after them."""
        return self._processor.get_piece_size()

    @property
    def first_view_id(self) -> int:
        """Token id of the first view marker, where there is one."""
        return round_up(self.text_size)

    @property
    def first_code_id(self) -> int:
        """Token id of the first docid code."""
        return self.first_view_id + round_up(len(self.views))

    @property
    def size(self) -> int:
        """Number of rows of the embedding table, V."""
        return self.first_code_id + round_up(self.num_code_tokens)

    def marker(self, view: str) -> int:
        """The token id that marks a view. Raises ValueError for a view without a marker."""
        if view not in self.views:
            raise ValueError(
                f"view {view!r}: the vocabulary in {self.folder} has markers of {self.views}; "
                "expected one of them: prepare the collection with this view (Multiview.views)"
            )
        return self.first_view_id + self.views.index(view)

    @cached_property
    def _processor(self):
        with kept.reading(self.folder / "spiece.model") as file:
            return _processor_of(file.read_bytes())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without end of sequence."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; docid codes are written as <code>, view markers as <view>."""
        parts, run = [], []
        text = lambda: self._processor.decode(run) if run else ""  # most identifiers have no text
        for i in ids:
            if i >= self.text_size:
                parts += [text(), f"<{self._name(i)}>"]
                run = []
            elif i > UNK_ID:
                run.append(int(i))
        return " ".join(filter(None, [*parts, text()]))

    def _name(self, token: int) -> str:
        """The name of a token that is no text piece."""
        view = token - self.first_view_id
        return self.views[view] if 0 <= view < len(self.views) else f"{token - self.first_code_id}"

    def encode_inputs(self, texts: Sequence[str], length: int, *, view: str = "") -> np.ndarray:
        """Encoder inputs int32 [B, length]: cut to length - 1 pieces, ended by EOS, padded by 0.

        view: the view whose marker is put first, and counts as a piece; blank for no marker.
        """
        return self.inputs(self.encode_all(texts), length, view=view)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as `encode`."""
        return self._processor.encode(list(texts))

    def inputs(self, texts: Sequence[Sequence[int]], length: int, *, view: str = "") -> np.ndarray:
        """Encoder inputs as those of `encode_inputs`, from token ids that `encode_all` gives."""
        first = [self.marker(view)] if view else []
        rows = np.zeros((len(texts), length), np.int32)
        for row, ids in zip(rows, texts, strict=True):
            ids = [*first, *ids][: length - 1] + [EOS_ID]
            row[: len(ids)] = ids
        return rows

    def word_starts(self) -> np.ndarray:
        """bool [V]: whether a piece begins a word, for scripts with spaces between words."""
        starts = np.zeros(self.size, bool)
        pieces = self._processor.id_to_piece(list(range(self._processor.get_piece_size())))
        starts[: len(pieces)] = [piece.startswith("\u2581") for piece in pieces]
        return starts
