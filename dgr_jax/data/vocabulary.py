"""One vocabulary: text pieces (SentencePiece), then a block of docid codes. No TensorFlow here.

Token ids: 0 padding and start of a target, 1 end of sequence, 2 unknown, then text pieces. Docid
codes begin at the next multiple of 128 after the text pieces (32,128 for the published T5 model,
whose checkpoints hold that many rows), and the whole is rounded up to a multiple of 128.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
_MULTIPLE = 128


def _round_up(n: int) -> int:
    return -(-n // _MULTIPLE) * _MULTIPLE


@dataclass(frozen=True)
class SentencePiece:
    """Where the text pieces come from.

    path: a SentencePiece model (T5's `spiece.model`); blank trains one on the corpus.
    size: pieces of a trained model; fewer where the corpus has fewer.
    lowercase: fold case in a trained model, which small collections need.
    extra_ids: unused ids after the pieces; 100 for the published T5 model.
    max_sentences: texts that a trained model sees, evenly spread.
    """

    path: str = ""
    size: int = 8000
    lowercase: bool = True
    extra_ids: int = 0
    max_sentences: int = 1_000_000

    def write(self, folder: Path, texts: Iterable[str]) -> Path:
        """Copy or train the model into `folder`/spiece.model.

        Raises FileNotFoundError when `path` is not there, ValueError when it is no model, or
        without any text.
        """
        target = folder / "spiece.model"
        if not self.path:
            target.write_bytes(self._train(texts))
            return target
        if not Path(self.path).is_file():
            raise FileNotFoundError(
                f"SentencePiece.path: no file at {self.path!r}; expected a SentencePiece model, "
                "such as T5's spiece.model, or '' to train one on the corpus"
            )
        import sentencepiece

        try:
            sentencepiece.SentencePieceProcessor(model_file=self.path)
        except RuntimeError as error:
            raise ValueError(
                f"SentencePiece.path: {self.path!r} is no SentencePiece model, such as T5's "
                f"spiece.model ({error})"
            ) from error
        shutil.copyfile(self.path, target)
        return target

    def _train(self, texts: Iterable[str]) -> bytes:
        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_lines(texts),
                model_writer=model,
                vocab_size=self.size,
                hard_vocab_limit=False,
                pad_id=PAD_ID,
                eos_id=EOS_ID,
                unk_id=UNK_ID,
                bos_id=-1,
                normalization_rule_name="nmt_nfkc_cf" if self.lowercase else "nmt_nfkc",
                input_sentence_size=self.max_sentences,
                shuffle_input_sentence=False,
                max_sentence_length=65536,
                num_threads=1,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"SentencePiece could not be trained on this corpus with size={self.size}: {error}"
            ) from error
        return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        text = " ".join(text.split())
        if text:
            yield text


@dataclass(frozen=True)
class Vocabulary:
    """A prepared vocabulary in `folder`: spiece.model and vocabulary.json."""

    folder: Path
    text_size: int
    num_code_tokens: int = 0

    @classmethod
    def create(cls, folder: Path, *, extra_ids: int = 0) -> Vocabulary:
        """The vocabulary over `folder`/spiece.model, before any docid code is known."""
        pieces = cls(folder, 0)._processor.get_piece_size()
        return cls(folder, pieces + extra_ids)

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """Read what `save` wrote. Raises FileNotFoundError naming the file."""
        path = folder / "vocabulary.json"
        if not path.is_file():
            raise FileNotFoundError(f"no vocabulary at {path}: run the prepare stage first")
        return cls(folder, **json.loads(path.read_text(encoding="utf-8")))

    def save(self) -> None:
        values = {k: v for k, v in asdict(self).items() if k != "folder"}
        (self.folder / "vocabulary.json").write_text(json.dumps(values), encoding="utf-8")

    @property
    def first_code_id(self) -> int:
        """Token id of the first docid code."""
        return _round_up(self.text_size)

    @property
    def size(self) -> int:
        """Rows of the embedding table, V."""
        return self.first_code_id + _round_up(self.num_code_tokens)

    @cached_property
    def _processor(self):
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=str(self.folder / "spiece.model"))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without end of sequence."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; docid codes are written as <code>."""
        parts, run = [], []
        for i in ids:
            if i >= self.text_size:
                parts += [self._processor.decode(run), f"<{i - self.first_code_id}>"]
                run = []
            elif i > UNK_ID:
                run.append(int(i))
        return " ".join(filter(None, [*parts, self._processor.decode(run)]))

    def encode_inputs(self, texts: Sequence[str], length: int) -> np.ndarray:
        """Encoder inputs int32 [B, length]: cut to length - 1 pieces, ended by EOS, padded by 0."""
        rows = np.zeros((len(texts), length), np.int32)
        for row, ids in zip(rows, self._processor.encode(list(texts)), strict=True):
            ids = ids[: length - 1] + [EOS_ID]
            row[: len(ids)] = ids
        return rows
