"""A minimal service beside which `benchmarks.serve` is measured: FastAPI, and `generate` of
transformers with a trie as `prefix_allowed_tokens_fn`. It needs fastapi, uvicorn, sentencepiece and
transformers, and nothing of this package.

    python -m benchmarks.serve_transformers --model_dir=FOLDER --port=0

FOLDER is what `benchmarks.serve` writes: weights and config.json of transformers, spiece.model, and
passages.json: a list of identifiers with their passages, and the settings of the search.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections import defaultdict
from pathlib import Path

import sentencepiece
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import T5ForConditionalGeneration

_PAD, _EOS = 0, 1


class Asked(BaseModel):
    query: str
    k: int = 10


def application(folder: Path) -> FastAPI:
    """POST /search, one request after another."""
    model = T5ForConditionalGeneration.from_pretrained(folder).eval()
    texts = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    kept = json.loads((folder / "passages.json").read_text())
    passages = {tuple(row["tokens"]): row for row in kept["passages"]}
    after = defaultdict(set)
    for tokens in passages:
        for place, token in enumerate(tokens):
            after[tokens[:place]].add(token)
    legal = {prefix: sorted(tokens) for prefix, tokens in after.items()}
    longest = max(map(len, passages))
    app = FastAPI()

    def written(sequence: torch.Tensor) -> tuple[int, ...]:
        return tuple(token for token in sequence[1:].tolist() if token != _PAD)

    @app.post("/search")
    def search(asked: Asked) -> dict:
        tokens = texts.encode(asked.query)[: kept["query_length"] - 1] + [_EOS]
        with torch.inference_mode():
            found = model.generate(
                torch.tensor([tokens]),
                num_beams=kept["num_beams"],
                num_return_sequences=asked.k,
                max_new_tokens=longest,
                length_penalty=0.0,
                do_sample=False,
                prefix_allowed_tokens_fn=lambda _, sent: legal.get(written(sent), [_PAD]),
                return_dict_in_generate=True,
                output_scores=True,
            )
        rows = zip(found.sequences, found.sequences_scores.tolist(), strict=True)
        hits = [{"score": score, **passages.get(written(row), {})} for row, score in rows]
        return {"results": [{"query": asked.query, "hits": hits}]}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    app = application(args.model_dir)
    with socket.create_server(("127.0.0.1", args.port)) as listening:
        port = listening.getsockname()[1]
        print(f"http://127.0.0.1:{port}\nready", file=sys.stderr, flush=True)
        config = uvicorn.Config(app, log_level="error", access_log=False)
        uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
