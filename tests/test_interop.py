"""Against torch and transformers on the same random weights: logits, gradients, beam search."""

from __future__ import annotations

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dgr_jax.decoding import trie
from dgr_jax.losses.generation import cross_entropy
from dgr_jax.models import hugging_face, pretrained
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval.search_programs import decode_fn

WHY = "needs the extra 'interop': pip install 'dgr_jax[interop]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

VOCAB, EOS = 60, 1
SIZES = dict(
    vocab_size=VOCAB, emb_dim=32, num_heads=3, head_dim=8, mlp_dim=48, num_encoder_layers=3,
    num_decoder_layers=2, relpos_buckets=8, relpos_max_distance=12,
)  # fmt: skip
CONFIGS = {
    "t5": T5Config(**SIZES, mlp_activations=("relu",), logits_via_embedding=True),
    "t5_1_1": T5Config(**SIZES),
}


@functools.cache
def random_params(config: T5Config):
    """Drawn so that logits spread over several units and attention is not flat."""
    tokens = np.ones((1, 2), np.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(1), tokens, tokens)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        scale = 2.0 if path[-1].key in ("embedding", "rel_embedding") else leaf.shape[0] ** -0.5
        if path[-1].key == "scale":
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return (scale * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(shapes))


@pytest.fixture(scope="module", params=list(CONFIGS))
def pair(request, tmp_path_factory):
    """(our config, our parameters, the transformers model of the folder that we wrote)."""
    config = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    pretrained.write_hf(folder, config, random_params(config))
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    return config, random_params(config), model.eval()


def queries(seed=0):
    """int32 [3, 20]: longer than the relative distances told apart, the last ones padded."""
    tokens = np.random.default_rng(seed).integers(2, VOCAB, (3, 20)).astype(np.int32)
    for row, length in enumerate((20, 13, 4)):
        tokens[row, length:] = 0
    return tokens


def encoder_inputs(tokens):
    tokens = torch.tensor(tokens, dtype=torch.int64)
    return {"input_ids": tokens, "attention_mask": (tokens > 0).to(torch.int64)}


def targets(seed=1):
    tokens = np.random.default_rng(seed).integers(2, VOCAB, (3, 15)).astype(np.int32)
    weights = np.ones((3, 15), np.float32)
    weights[1, 9:] = 0
    return tokens, weights


def shifted(tokens):
    return np.pad(tokens, [(0, 0), (1, 0)])[:, :-1]


def test_logits_are_those_of_transformers(pair):
    config, params, model = pair
    tokens, _ = targets()
    got = jax.jit(Transformer(config).apply)({"params": params}, queries(), shifted(tokens))
    with torch.no_grad():
        inputs = torch.tensor(shifted(tokens), dtype=torch.int64)
        expected = model(**encoder_inputs(queries()), decoder_input_ids=inputs).logits.numpy()
    assert expected.std() > 0.5  # else 1e-4 would say little
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_loss_and_gradients_are_those_of_torch(pair):
    config, params, model = pair
    tokens, weights = targets()

    def loss(params):
        logits = Transformer(config).apply({"params": params}, queries(), shifted(tokens))
        total, weight = cross_entropy(logits, tokens, weights)
        return total / weight

    ours, gradients = jax.jit(jax.value_and_grad(loss))(params)
    labels = torch.tensor(np.where(weights > 0, tokens, -100), dtype=torch.int64)
    inputs = torch.tensor(shifted(tokens), dtype=torch.int64)
    model.zero_grad()
    theirs = model(**encoder_inputs(queries()), decoder_input_ids=inputs, labels=labels).loss
    theirs.backward()
    assert float(ours) == pytest.approx(theirs.item(), abs=1e-5)
    got = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    expected = hugging_face._from_hf(config, got)
    gradients = flax.traverse_util.flatten_dict(gradients, sep="/")
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = np.abs(expected[name]).max()
        assert scale > 0, name
        np.testing.assert_allclose(gradient, expected[name], atol=1e-4 * scale, err_msg=name)


def test_what_transformers_writes_is_read_bit_for_bit(pair, tmp_path):
    config, params, model = pair
    model.save_pretrained(tmp_path / "whole")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half", max_shard_size="20KB")
    model.float().load_state_dict(
        transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "whole").state_dict()
    )
    assert (tmp_path / "half" / "model.safetensors.index.json").exists()
    for folder, dtype in (("whole", jnp.float32), ("half", jnp.bfloat16)):
        again, read = pretrained.read_hf(tmp_path / folder)
        assert again == config
        expected = jax.tree.map(lambda x, d=dtype: np.asarray(x.astype(d), np.float32), params)
        jax.tree.map(np.testing.assert_array_equal, read, expected)


def identifiers(kind):
    """Rows: 'fixed': 400 of 5 tokens; 'variable': 300 of 1 to 6 tokens and EOS."""
    rng = np.random.default_rng(5)
    if kind == "fixed":
        return sorted({tuple(map(int, row)) for row in rng.integers(10, 26, (400, 5))})
    lengths = rng.integers(1, 7, 300)
    return sorted({(*map(int, rng.integers(10, 40, n)), EOS) for n in lengths})


def trie_of(rows):
    lengths = np.array([len(row) for row in rows])
    padded = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return trie.build(padded, lengths, vocab_size=VOCAB)


def continuations(rows):
    """{prefix: legal tokens}"""
    children = {}
    for row in rows:
        for t in range(len(row)):
            children.setdefault(row[:t], set()).add(row[t])
    return {prefix: sorted(tokens) for prefix, tokens in children.items()}


def transformers_search(model, tokens, rows, beams):
    """Per query [(row, log_prob)], best first.

    With length_penalty 0 their scores are sums of log-probabilities, over the whole vocabulary: the
    prefix function masks log-probabilities and does not renormalise them.  early_stopping False
    goes on as long as a live beam can reach the finished ones, as ours does.
    """
    children, length = continuations(rows), max(map(len, rows))
    with torch.no_grad():
        found = model.generate(
            **encoder_inputs(tokens),
            num_beams=beams,
            num_return_sequences=beams,
            do_sample=False,
            max_new_tokens=length,
            length_penalty=0.0,
            early_stopping=False,
            renormalize_logits=False,
            prefix_allowed_tokens_fn=lambda _, ids: children.get(tuple(ids.tolist()[1:]), [EOS]),
            return_dict_in_generate=True,
            output_scores=True,
        )
    scores = found.sequences_scores.numpy().reshape(len(tokens), beams)
    sequences = found.sequences.numpy()[:, 1:].reshape(len(tokens), beams, -1)
    legal = set(rows)

    def result(sequence, score):
        row = tuple(map(int, sequence))
        row = row[: row.index(EOS) + 1] if EOS in row else row  # they fill up with EOS
        return [(row, float(score))] if score > -1e8 and row in legal else []

    return [
        [item for pair in zip(*query, strict=True) for item in result(*pair)]
        for query in zip(sequences, scores, strict=True)
    ]


def our_search(config, params, tokens, rows, beams):
    index = trie_of(rows)
    search = decode_fn(config, beams, max(map(len, rows)))
    result = jax.tree.map(np.asarray, search(params, index.constraint(), tokens))
    return [
        [
            (tuple(int(t) for t in row if t), float(log_prob))
            for row, log_prob, valid in zip(*query, strict=True)
            if valid
        ]
        for query in zip(result.tokens, result.log_probs, result.valid, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("beams", [2, 8])
def test_fixed_length_identifiers_are_those_of_generate(pair, beams):
    config, params, model = pair
    rows = identifiers("fixed")
    got = our_search(config, params, queries(), rows, beams)
    expected = transformers_search(model, queries(), rows, beams)
    for ours, theirs in zip(got, expected, strict=True):
        assert len(theirs) == beams
        assert [row for row, _ in ours] == [row for row, _ in theirs]
        np.testing.assert_allclose([s for _, s in ours], [s for _, s in theirs], atol=1e-4)


@pytest.mark.slow
def test_identifiers_ended_by_eos_are_those_of_generate(pair):
    """With a beam for every identifier nothing is cut off, by either."""
    config, params, model = pair
    rows = identifiers("variable")[::8]
    beams = len(rows)
    got = our_search(config, params, queries(), rows, beams)
    expected = transformers_search(model, queries(), rows, beams)
    for ours, theirs in zip(got, expected, strict=True):
        assert len(theirs) == beams == len({row for row, _ in theirs})
        assert [row for row, _ in ours] == [row for row, _ in theirs]
        np.testing.assert_allclose([s for _, s in ours], [s for _, s in theirs], atol=1e-4)


@pytest.mark.slow
def test_narrow_beams_lose_nothing_that_generate_finds(pair):
    """Both follow the same live beams.  Generate drops a sequence that ends outside of the best M
    offers of its step; ours lets it compete with the finished ones, and so is never behind."""
    config, params, model = pair
    rows, beams = identifiers("variable"), 8
    got = our_search(config, params, queries(), rows, beams)
    expected = transformers_search(model, queries(), rows, beams)
    for ours, theirs in zip(got, expected, strict=True):
        assert len(ours) == beams
        scores = dict(ours)
        for rank, (row, score) in enumerate(theirs):
            assert ours[rank][1] >= score - 1e-4
            if score > ours[-1][1] + 1e-4:
                assert scores[row] == pytest.approx(score, abs=1e-4)
        assert ours[0][0] == theirs[0][0]
