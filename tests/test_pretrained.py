"""Hugging Face folders in and out, without torch: files are written and read by hand here."""

import dataclasses
import functools
import json
import struct
import sys
import types

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

from dgr_jax.models import pretrained, tensor_files
from dgr_jax.models.t5 import T5Config, Transformer
from tests import students

V, D, H, K, F, BUCKETS = 11, 8, 2, 3, 10, 6
DESCRIBED = {
    "model_type": "t5",
    "vocab_size": V,
    "d_model": D,
    "num_heads": H,
    "d_kv": K,
    "d_ff": F,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "dropout_rate": 0.05,
    "relative_attention_num_buckets": BUCKETS,
    "relative_attention_max_distance": 20,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
T5_1_1 = T5Config(
    vocab_size=V, emb_dim=D, num_heads=H, head_dim=K, mlp_dim=F, num_encoder_layers=2,
    num_decoder_layers=1, dropout_rate=0.05, relpos_buckets=BUCKETS, relpos_max_distance=20,
)  # fmt: skip
T5_1_0 = dataclasses.replace(T5_1_1, mlp_activations=("relu",), logits_via_embedding=True)
ORIGINAL = {
    k: v for k, v in DESCRIBED.items() if k not in ("feed_forward_proj", "tie_word_embeddings")
}


def hf_shapes(gated=True):
    """Names and shapes of the format, [out, in], as published checkpoints have them."""
    attention = {"q": (H * K, D), "k": (H * K, D), "v": (H * K, D), "o": (D, H * K)}
    mlp = {"wi_0": (F, D), "wi_1": (F, D)} if gated else {"wi": (F, D)}
    mlp["wo"] = (D, F)
    parts = {"SelfAttention": attention, "EncDecAttention": attention, "DenseReluDense": mlp}
    stacks = {
        "encoder": (2, ("SelfAttention", "DenseReluDense")),
        "decoder": (1, ("SelfAttention", "EncDecAttention", "DenseReluDense")),
    }
    shapes = {"shared.weight": (V, D)}
    if gated:
        shapes["lm_head.weight"] = (V, D)
    for stack, (blocks, sublayers) in stacks.items():
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shapes |= {f"{stack}.final_layer_norm.weight": (D,), bias: (BUCKETS, H)}
        for block in range(blocks):
            for i, part in enumerate(sublayers):
                layer = f"{stack}.block.{block}.layer.{i}"
                shapes[f"{layer}.layer_norm.weight"] = (D,)
                for name, shape in parts[part].items():
                    shapes[f"{layer}.{part}.{name}.weight"] = shape
    return shapes


def random_arrays(gated=True, dtype=np.float32):
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=s).astype(dtype) for name, s in hf_shapes(gated).items()}


def safetensors(arrays):
    """The bytes of a file."""
    names = {
        "float64": "F64",
        "int32": "I32",
        "float32": "F32",
        "float16": "F16",
        "bfloat16": "BF16",
        "complex64": "C64",
    }
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        offsets = [len(body), len(body) + array.nbytes]
        header[name] = {
            "dtype": names[array.dtype.name],
            "shape": array.shape,
            "data_offsets": offsets,
        }
        body += array.tobytes()
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


def write(folder, described, arrays):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "model.safetensors").write_bytes(safetensors(arrays))
    return folder


def flat(params):
    return flax.traverse_util.flatten_dict(params, sep="/")


def same(got, expected):
    got, expected = flat(got), flat(expected)
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
        assert got[name].dtype == leaf.dtype == np.float32
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)


def random_params(config):
    """Parameters in the form of init, in boxes that name their axes."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, _abstract(config))


@functools.cache
def _abstract(config):
    tokens = np.ones((1, 2), np.int32)
    return jax.eval_shape(Transformer(config).init, jax.random.key(1), tokens, tokens)["params"]


def unboxed(config):
    return nn.unbox(random_params(config))


def logits(config, params, tokens):
    apply = jax.jit(Transformer(config).apply)
    return apply({"params": params}, tokens[:, :1], tokens)


def test_t5_1_1_by_name(tmp_path):
    arrays = random_arrays()
    config, params = pretrained.read_hf(write(tmp_path / "m", DESCRIBED, arrays))
    assert config == T5_1_1
    got = flat(params)
    assert len(got) == len(arrays)
    pairs = {
        "token_embedder/embedding": arrays["shared.weight"],
        "decoder/logits_dense/kernel": arrays["lm_head.weight"].T,
        "encoder/layers_1/attention/out/kernel": arrays[
            "encoder.block.1.layer.0.SelfAttention.o.weight"
        ].T,
        "encoder/layers_1/pre_mlp_layer_norm/scale": arrays[
            "encoder.block.1.layer.1.layer_norm.weight"
        ],
        "decoder/layers_0/encoder_decoder_attention/query/kernel": arrays[
            "decoder.block.0.layer.1.EncDecAttention.q.weight"
        ].T,
        "decoder/layers_0/mlp/wi_1/kernel": arrays[
            "decoder.block.0.layer.2.DenseReluDense.wi_1.weight"
        ].T,
        "decoder/relpos_bias/rel_embedding": arrays[
            "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ].T,
    }
    for name, expected in pairs.items():
        np.testing.assert_array_equal(got[name], expected)
    assert logits(config, params, np.array([[3, 1, 0]], np.int32)).shape == (1, 3, V)


def test_the_original_t5_has_one_projection_and_no_output_kernel(tmp_path):
    """The first config leaves settings out; its file may hold copies and an unused bias."""
    arrays = random_arrays(gated=False)
    copies = {
        f"{stack}.embed_tokens.weight": arrays["shared.weight"] for stack in ("encoder", "decoder")
    } | {"lm_head.weight": arrays["shared.weight"]}
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    more = {**arrays, **copies, unused: np.ones((BUCKETS, H), np.float32)}
    config, params = pretrained.read_hf(write(tmp_path / "m", ORIGINAL, more))
    assert config == T5_1_0
    same(params, pretrained.read_hf(write(tmp_path / "n", ORIGINAL, arrays))[1])


def test_the_embedding_may_have_the_name_of_a_copy(tmp_path):
    arrays = random_arrays()
    expected = pretrained.read_hf(write(tmp_path / "m", DESCRIBED, arrays))[1]
    arrays["decoder.embed_tokens.weight"] = arrays.pop("shared.weight")
    same(pretrained.read_hf(write(tmp_path / "m", DESCRIBED, arrays))[1], expected)


def test_newer_configs_say_tied_and_unscaled(tmp_path, caplog):
    newer = DESCRIBED | {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    arrays = random_arrays()
    config, params = pretrained.read_hf(write(tmp_path / "m", newer, arrays))
    assert config == T5_1_1
    np.testing.assert_array_equal(
        params["decoder"]["logits_dense"]["kernel"], arrays["lm_head.weight"].T
    )
    assert not caplog.text
    del arrays["lm_head.weight"]
    config, params = pretrained.read_hf(write(tmp_path / "m", newer, arrays))
    assert config == T5_1_1
    assert "no output kernel (lm_head.weight): the embedding is taken for it" in caplog.text
    np.testing.assert_array_equal(
        params["decoder"]["logits_dense"]["kernel"], arrays["shared.weight"].T
    )


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_read_exactly(tmp_path, dtype):
    arrays = random_arrays(dtype=dtype)
    whole = {name: array.astype(np.float32) for name, array in arrays.items()}
    got = pretrained.read_hf(write(tmp_path / "half", DESCRIBED, arrays))[1]
    same(got, pretrained.read_hf(write(tmp_path / "whole", DESCRIBED, whole))[1])


def test_shards_are_put_together(tmp_path):
    arrays = random_arrays()
    whole = pretrained.read_hf(write(tmp_path / "m", DESCRIBED, arrays))[1]
    names = list(arrays)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        (tmp_path / "m" / file).write_bytes(safetensors({name: arrays[name] for name in part}))
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    index_file = tmp_path / "m" / "model.safetensors.index.json"
    index_file.write_text(json.dumps(index))
    (tmp_path / "m" / "model.safetensors").unlink()
    same(pretrained.read_hf(str(tmp_path / "m"))[1], whole)
    index["weight_map"]["ghost.weight"] = "model-1.safetensors"
    index_file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names arrays that its files lack: \['ghost.weight'\]"):
        pretrained.read_hf(tmp_path / "m")
    for content in ("{", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        index_file.write_text(content)
        with pytest.raises(ValueError, match="model.safetensors.index.json: no index of shards"):
            pretrained.read_hf(tmp_path / "m")
    del index["weight_map"]["ghost.weight"]
    index_file.write_text(json.dumps(index))
    (tmp_path / "m" / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-2.safetensors is missing: model.safetensor"):
        pretrained.read_hf(tmp_path / "m")


def test_all_faulty_names_are_listed(tmp_path):
    arrays = random_arrays()
    del arrays["encoder.final_layer_norm.weight"], arrays["lm_head.weight"]
    arrays["decoder.block.1.layer.0.layer_norm.weight"] = np.ones(D, np.float32)
    arrays["encoder.embed_tokens.weight"] = arrays["shared.weight"] + 1
    arrays["encoder.block.0.layer.0.SelfAttention.q.weight"] = np.ones((4, D), np.float32)
    described = DESCRIBED | {"scale_decoder_outputs": True, "feed_forward_proj": "gated-silu"}
    with pytest.raises(ValueError) as error:
        pretrained.read_hf(write(tmp_path / "m", described, arrays))
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'm'} does not fit T5Config(vocab_size=11, ")
    assert "mlp_activations=('silu', 'linear')" in message
    assert message.partition("): ")[2].split("; ") == [
        "encoder/encoder_norm/scale is missing",
        "decoder.block.1.layer.0.layer_norm.weight is left over",
        "encoder.embed_tokens.weight is left over",
        "encoder/layers_0/attention/query/kernel: got shape (8, 4), expected (8, 6)",
    ]


@pytest.mark.parametrize("change", [{}, {"scale_decoder_outputs": False}])
def test_no_other_array_is_taken_for_an_output_kernel(tmp_path, change):
    arrays = random_arrays()
    del arrays["lm_head.weight"]
    with pytest.raises(ValueError, match=r"logits_dense/kernel is missing \(lm_head.weight of Hug"):
        pretrained.read(write(tmp_path / "m", DESCRIBED | change, arrays))


def test_tied_embeddings_of_two_projections_are_warned_of(tmp_path, caplog):
    arrays = random_arrays()
    del arrays["lm_head.weight"]
    tied = {name: value for name, value in DESCRIBED.items() if name != "tie_word_embeddings"}
    config, _ = pretrained.read_hf(write(tmp_path / "m", tied, arrays))
    assert config.logits_via_embedding
    assert "no output kernel, but two projections as in T5 1.1" in caplog.text


def test_quantised_weights_are_refused(tmp_path):
    arrays = random_arrays()
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    arrays[name] = np.round(100 * arrays[name]).astype(np.int32)
    with pytest.raises(ValueError, match=r"mlp/wo/kernel: got int32, expected floats: quantised"):
        pretrained.read_hf(write(tmp_path / "m", DESCRIBED, arrays))


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    arrays = random_arrays(dtype=np.float16)
    arrays["encoder.block.1.layer.1.DenseReluDense.wo.weight"][2, 3] = value
    message = r"m: encoder/layers_1/mlp/wo/kernel holds 1 of \d+ values that are not finite; expec"
    with pytest.raises(ValueError, match=message):
        pretrained.read_hf(write(tmp_path / "m", DESCRIBED, arrays))
    arrays["lm_head.weight"] = np.full((V, D), 1e300)  # no float32
    with pytest.raises(ValueError, match="values that are not finite and 1 other arrays"):
        pretrained.read_hf(write(tmp_path / "m", DESCRIBED, arrays))
    params = random_params(T5_1_1)
    params["encoder"]["encoder_norm"]["scale"] = np.full(D, value)
    with pytest.raises(
        ValueError, match=f"params: encoder/encoder_norm/scale holds {D} of {D} val"
    ):
        pretrained.write_hf(tmp_path / "w", T5_1_1, params)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json: not JSON"),
        ("", "config.json: not JSON"),
        ("[]", "config.json: got list, expected the config of a T5"),
        ('{"model_type": "t5"}', "config.json: vocab_size: got None, expected a number above 0"),
        (json.dumps(DESCRIBED | {"d_model": "6"}), "d_model: got '6', expected a number above 0"),
        (json.dumps(DESCRIBED | {"num_heads": 0}), "num_heads: got 0, expected a number above 0"),
    ],
)
def test_damaged_configs_are_named(tmp_path, content, message):
    folder = write(tmp_path / "m", DESCRIBED, random_arrays())
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        pretrained.read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing: expected the config"):
        pretrained.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "umt5"}, "config.json: model_type: got 'umt5', expected 't5' or 'mt5'"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon: got 1e-05, expected 1e-06"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj: got 'gelu', expected one of"),
        ({"feed_forward_proj": ["gelu"]}, r"feed_forward_proj: got \['gelu'\], expected one of"),
        ({"tie_word_embeddings": True}, "is neither T5 nor T5 1.1; expected tie_word_embeddings"),
    ],
)
def test_other_models_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        pretrained.read_hf(write(tmp_path / "m", DESCRIBED | change, random_arrays()))


def test_folders_without_readable_weights(tmp_path):
    folder = write(tmp_path / "m", DESCRIBED, {})
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors and no .*\['config.json'\]"):
        pretrained.read_hf(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"convert it once.*save_pretrained\("):
        pretrained.read_hf(folder)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        pretrained.read_hf(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="./nowhere: no such folder"):
        pretrained.read_hf("./nowhere")


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    whole = safetensors({"a": np.arange(6, dtype=np.float32)})
    path.write_bytes(whole)
    np.testing.assert_array_equal(tensor_files.read_file(path)["a"], np.arange(6))
    for content, message in {
        b"": "0 bytes, expected a whole safetensors file",
        whole[:20]: "20 bytes, expected a whole safetensors file",
        b"\x02" + bytes(7) + b"xxyy": "no JSON header, expected a safetensors file",
        whole[:-1]: r"a: got bytes \[0, 24\) of 23, expected 24 of them: the file is cut short",
        safetensors({"c": np.ones(2, np.complex64)}): "c: got dtype C64, expected one of F64, F32",
        whole.replace(b'"shape"', b'"shade"'): "a: got .*, expected its dtype, shape and data_offs",
        whole.replace(b"[6]", b"[-]"): "no JSON header",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"model.safetensors: {message}"):
            tensor_files.read_file(path)


@pytest.mark.parametrize("config", [T5_1_0, T5_1_1], ids=["t5", "t5_1_1"])
@pytest.mark.parametrize("most", [10**9, 1000])
def test_what_is_written_is_read_bit_for_bit(tmp_path, config, most):
    pretrained.write_hf(tmp_path, config, random_params(config), max_shard_bytes=most)
    written = {path.name for path in tmp_path.iterdir()}
    assert ("model.safetensors" in written) == (most == 10**9)
    shards = list(tmp_path.glob("model-*"))
    assert all(sum(a.nbytes for a in tensor_files.read_file(s).values()) <= 1000 for s in shards)
    assert set(tensor_files.read_folder(tmp_path)) == set(hf_shapes(config == T5_1_1))
    again, params = pretrained.read_hf(tmp_path)
    assert again == config
    same(params, unboxed(config))


def test_writing_over_another_form_leaves_no_stale_file(tmp_path):
    params = unboxed(T5_1_1)
    pretrained.write_hf(tmp_path, T5_1_1, params)
    changed = jax.tree.map(lambda x: x + 1, params)
    pretrained.write_hf(tmp_path, T5_1_1, changed, max_shard_bytes=1000)
    same(pretrained.read_hf(tmp_path)[1], changed)
    pretrained.write_hf(tmp_path, T5_1_1, params)
    same(pretrained.read_hf(tmp_path)[1], params)


def test_bfloat16_files_are_half_as_large(tmp_path):
    params = unboxed(T5_1_1)
    pretrained.write_hf(tmp_path, T5_1_1, params, dtype="bfloat16")
    assert {a.dtype for a in tensor_files.read_folder(tmp_path).values()} == {
        np.dtype(ml_dtypes.bfloat16)
    }
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    same(pretrained.read_hf(tmp_path)[1], rounded)


def test_what_cannot_be_written_is_refused(tmp_path):
    params = unboxed(T5_1_1)
    with pytest.raises(ValueError, match="write_hf.dtype: got 'float16', expected one of"):
        pretrained.write_hf(tmp_path, T5_1_1, params, dtype="float16")
    config = dataclasses.replace(T5_1_1, mlp_activations=("tanh",))
    with pytest.raises(ValueError, match=r"T5Config.mlp_activations: got \('tanh',\), expected"):
        pretrained.write_hf(tmp_path, config, params)
    del params["decoder"]["decoder_norm"]
    with pytest.raises(ValueError, match="params does not fit .*decoder_norm/scale is missing"):
        pretrained.write_hf(tmp_path, T5_1_1, params)
    assert not list(tmp_path.iterdir())


def test_the_hub_needs_its_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'dgr_jax\[pretrained\]'"):
        pretrained.read_hf("google/flan-t5-base")


def test_hub_ids_are_fetched_or_the_error_says_what_to_do(monkeypatch, tmp_path):
    write(tmp_path / "m", DESCRIBED, random_arrays())
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        if name == "far/away":
            raise ConnectionError("no network")
        return str(tmp_path / "m")

    client = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    assert pretrained.read_hf("some/model", revision="v1")[0] == T5_1_1
    with pytest.raises(
        OSError, match=r"'far/away' is no folder .*ConnectionError: no network.*give"
    ):
        pretrained.read_hf("far/away")
    assert asked == [("some/model", "v1"), ("far/away", None)]


@pytest.mark.parametrize("config", [T5_1_0, T5_1_1], ids=["t5", "t5_1_1"])
def test_a_larger_vocabulary_keeps_the_old_rows(config):
    params = unboxed(config)
    new = 2000
    larger, extended = pretrained.extend_vocabulary(config, params, V + new, jax.random.key(0))
    assert larger == dataclasses.replace(config, vocab_size=V + new)
    before, after = flat(params), flat(extended)
    grown = {"token_embedder/embedding": 0, "decoder/logits_dense/kernel": 1}
    for name, leaf in before.items():
        axis = grown.get(name)
        kept = after[name] if axis is None else np.take(after[name], np.arange(V), axis)
        np.testing.assert_array_equal(kept, leaf, err_msg=name)
        if axis is not None:
            added = np.take(after[name], np.arange(V, V + new), axis)
            np.testing.assert_allclose(added.mean(axis), leaf.mean(axis), atol=0.15)
            np.testing.assert_allclose(added.std(axis), leaf.std(axis), rtol=0.1)
    tokens = np.array([[3, V + 5]], np.int32)
    new, old = logits(larger, extended, tokens), logits(config, params, tokens[:, :1])
    np.testing.assert_allclose(new[:, 0, :V], old[:, 0], rtol=1e-5, atol=1e-5)


def test_new_rows_depend_on_the_key_alone():
    params = unboxed(T5_1_1)
    draw = lambda seed: pretrained.extend_vocabulary(  # noqa: E731
        T5_1_1, params, V + 4, jax.random.key(seed)
    )[1]
    same(draw(0), draw(0))
    first, second = (flat(draw(seed))["token_embedder/embedding"] for seed in (0, 1))
    assert np.abs(first[V:] - second[V:]).min() > 0
    same(pretrained.extend_vocabulary(T5_1_1, params, V, jax.random.key(0))[1], params)
    with pytest.raises(ValueError, match="extend_vocabulary.vocab_size: got 10, expected at least"):
        pretrained.extend_vocabulary(T5_1_1, params, 10, jax.random.key(0))


@pytest.mark.parametrize("write", [pretrained.write_hf, pretrained.write_t5x])
def test_a_prefix_adaptive_student_has_no_place_in_their_formats(write, tmp_path):
    config = dataclasses.replace(students.CONFIG, prefix_adaptive_layers=1)
    with pytest.raises(ValueError, match="prefix_adaptive_layers: got 1, expected 0: neither t5x"):
        write(tmp_path, config, students.parameters(config))
    assert not list(tmp_path.iterdir())
