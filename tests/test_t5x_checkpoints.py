"""Checkpoints of t5x in and out, without t5x: files are written and read by hand here."""

import dataclasses
import gzip
import json
import os
import sys

import flax.serialization
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath

from dgr_jax.models import pretrained, stacking, t5x_adafactor, t5x_checkpoints
from dgr_jax.training.optimizers import Adafactor
from tests.test_pretrained import T5_1_0, T5_1_1, D, F, flat, random_params, same, unboxed

CONFIGS = pytest.mark.parametrize("config", [T5_1_0, T5_1_1], ids=["t5", "t5_1_1"])
# What a checkpoint does not say: t5x keeps it in gin files.
SILENT = {"dropout_rate": 0.1, "relpos_max_distance": 128}


def nested(arrays):
    return flax.traverse_util.unflatten_dict(arrays, sep="/")


def zarr(folder, array, *, rows=None):
    """One array in the format of zarr version 2, cut into chunks of `rows` rows."""
    folder.mkdir(parents=True)
    rows = rows or len(array)
    dtype = "bfloat16" if array.dtype == ml_dtypes.bfloat16 else array.dtype.str
    described = {
        "zarr_format": 2,
        "shape": array.shape,
        "chunks": [rows, *array.shape[1:]],
        "dtype": dtype,
        "compressor": {"id": "gzip", "level": 1},
        "fill_value": None,
        "order": "C",
        "filters": None,
    }
    (folder / ".zarray").write_text(json.dumps(described))
    for i in range(0, len(array), rows):
        chunk = np.zeros((rows, *array.shape[1:]), array.dtype)
        chunk[: len(array[i : i + rows])] = array[i : i + rows]
        name = ".".join(str(n) for n in (i // rows, *[0] * (array.ndim - 1)))
        (folder / name).write_bytes(gzip.compress(chunk.tobytes()))


def unzarr(folder):
    """The array of one chunk that was written."""
    described = json.loads((folder / ".zarray").read_text())
    assert described["chunks"] == described["shape"] and described["zarr_format"] == 2
    assert described["compressor"]["id"] == "gzip"
    content = gzip.decompress((folder / ".".join("0" * len(described["shape"]))).read_bytes())
    dtype = ml_dtypes.bfloat16 if described["dtype"] == "bfloat16" else described["dtype"]
    return np.frombuffer(content, dtype).reshape(described["shape"])


def spec(name, array, driver="file"):
    store = {"driver": driver, "path": f"{name.replace('/', '.')}/"}
    store |= {"bucket": "t5x-dummy-bucket"} if driver == "gcs" else {}
    compressor = {"id": "gzip", "level": 1}
    metadata = {"chunks": list(array.shape), "compressor": compressor, "shape": list(array.shape)}
    return {"driver": "zarr", "dtype": array.dtype.name, "kvstore": store, "metadata": metadata}


def by_hand(folder, params, *, driver="file", rows=None, inline=("encoder/encoder_norm/scale",)):
    """checkpoint_100 of t5x, with a step and no moments."""
    leaves = {}
    for name, array in params.items():
        name, inside = f"target/{name}", name in inline
        leaves[name] = array if inside else spec(name, array, driver)
        if not inside:
            zarr(folder / "checkpoint_100" / name.replace("/", "."), array, rows=rows)
    tree = nested(leaves) | {"state": {"step": np.int32(100), "param_states": {}}}
    pack(folder / "checkpoint_100", {"version": 3, "optimizer": tree})
    return folder


def pack(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(content))


def stacked_by_hand(params, layers={"encoder": 2, "decoder": 1}):  # noqa: B006
    """Parameters as t5x's scanned model names them."""
    out = {}
    for name, array in params.items():
        stack, _, rest = name.partition("/")
        if rest.startswith("layers_0/"):
            rest = rest.removeprefix("layers_0/")
            parts = [params[f"{stack}/layers_{i}/{rest}"] for i in range(layers[stack])]
            out[f"{stack}/{stack}/{rest}"] = np.stack(parts, axis=1)
        elif rest == "relpos_bias/rel_embedding":
            out[f"{stack}/{stack}/{rest}"] = np.stack([array] * layers[stack], axis=1)
        elif not rest.startswith("layers_"):
            out[name] = array
    return out


def silent(config, **more):
    return dataclasses.replace(config, **SILENT, **more)


@CONFIGS
def test_its_own_layout_by_name(tmp_path, config):
    expected = flat(unboxed(config))
    by_hand(tmp_path, expected, rows=3, driver="gcs")  # written in a bucket, copied here
    got, params = pretrained.read_t5x(tmp_path)
    assert got == silent(config)
    same(params, nested(expected))
    assert params["encoder"]["layers_1"]["mlp"]["wo"]["kernel"].shape == (F, D)
    for place in ("checkpoint_100", "checkpoint_100/checkpoint"):
        same(pretrained.read_t5x(tmp_path / place)[1], params)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    params = dict(flat(unboxed(T5_1_1)))
    params["decoder/layers_0/mlp/wo/kernel"] = np.full((F, D), np.nan, np.float32)
    by_hand(tmp_path, params)
    with pytest.raises(ValueError, match="decoder/layers_0/mlp/wo/kernel holds .* not finite"):
        pretrained.read(tmp_path)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("decoder/layers_0/", "checkpoint_100: the decoder has no layer"),
        ("encoder/layers_0/attention/out", "encoder/layers_0/attention/out/kernel is missing"),
        ("encoder/encoder_norm", "encoder/encoder_norm/scale is missing"),
    ],
)
def test_lost_arrays_are_named(tmp_path, lost, message):
    params = {k: v for k, v in flat(unboxed(T5_1_1)).items() if not k.startswith(lost)}
    by_hand(tmp_path, params, inline=())
    with pytest.raises(ValueError, match=message):
        pretrained.read(tmp_path)


def test_a_missing_output_kernel_is_warned_of(tmp_path, caplog):
    params = dict(flat(unboxed(T5_1_1)))
    del params["decoder/logits_dense/kernel"]
    by_hand(tmp_path, params)
    assert pretrained.read(tmp_path)[0].logits_via_embedding
    assert "no output kernel, but two projections as in T5 1.1" in caplog.text


def test_activations_are_given(tmp_path):
    by_hand(tmp_path, flat(unboxed(T5_1_1)))
    config, _ = pretrained.read_t5x(tmp_path, activations=("silu", "linear"))
    assert config == silent(T5_1_1, mlp_activations=("silu", "linear"))


def test_scanned_layers_become_single_ones(tmp_path):
    expected = flat(unboxed(T5_1_1))
    stacked = stacked_by_hand(expected)
    assert stacked["encoder/encoder/mlp/wo/kernel"].shape == (F, 2, D)
    config, params = pretrained.read_t5x(by_hand(tmp_path, stacked))
    assert config == silent(T5_1_1)
    same(params, nested(expected))
    ours = flat(stacking.stack_layers(params))  # our own names of scanned layers are read too
    same(nested(t5x_checkpoints.unscanned(ours)), params)


def test_relative_positions_of_every_layer(tmp_path):
    params = flat(unboxed(T5_1_1))
    bias = params.pop("encoder/relpos_bias/rel_embedding")
    for i in range(2):
        params[f"encoder/layers_{i}/relpos_bias/rel_embedding"] = bias
    same(pretrained.read_t5x(by_hand(tmp_path / "same", params))[1], unboxed(T5_1_1))
    params["encoder/layers_1/relpos_bias/rel_embedding"] = bias + 1
    with pytest.raises(ValueError) as error:
        pretrained.read_t5x(by_hand(tmp_path / "other", params))
    assert str(error.value) == (
        "encoder/layers_1/relpos_bias/rel_embedding: the layers' relative positions differ, as "
        "those of uMT5 do; expected one table for all layers of the encoder"
    )


def test_orbax_and_its_older_form(tmp_path):
    expected = unboxed(T5_1_1)
    tree = {"target": expected, "state": {"step": np.int32(7), "param_states": {"x": np.ones(3)}}}
    for ocdbt in (False, True):
        folder = tmp_path / str(ocdbt) / "checkpoint_7" / "state"
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(jax.tree.map(jax.numpy.array, tree)))
        same(pretrained.read_t5x(folder.parent.parent)[1], expected)
    older = tmp_path / "older" / "checkpoint_7"
    names = {name: f"target.{name.replace('/', '.')}" for name in flat(expected)}
    for name, place in names.items():
        zarr(older / place, flat(expected)[name])
    pack(older, {"target": nested({n: f"PLACEHOLDER://{p}" for n, p in names.items()})})
    same(pretrained.read_t5x(older)[1], expected)


def test_parameters_alone(tmp_path):
    """A finished student of this library, whose checkpoint holds the parameters alone."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "20" / "params", unboxed(T5_1_1))
    config, params = pretrained.read(tmp_path)
    assert config == silent(T5_1_1)
    same(params, unboxed(T5_1_1))


@pytest.mark.parametrize(
    ("config", "layout", "scanned"),
    [
        (T5_1_0, "t5x", False),
        (T5_1_1, "t5x", True),
        (T5_1_1, "orbax", False),
        (T5_1_0, "orbax", True),
    ],
)
def test_what_is_written_is_read_bit_for_bit(tmp_path, config, layout, scanned):
    params = random_params(config)
    pretrained.write_t5x(tmp_path, config, params, step=3, layout=layout, scanned=scanned)
    again, got = pretrained.read(tmp_path)
    assert again == silent(config)
    same(got, unboxed(config))
    names = {p.name for p in tmp_path.rglob("target.*")}
    assert ("target.encoder.encoder.mlp.wo.kernel" in names) == scanned
    with pytest.raises(FileExistsError, match="checkpoint_3 exists; give another step or folder"):
        pretrained.write_t5x(tmp_path, config, params, step=3, layout=layout)


def test_the_written_file_is_what_t5x_reads(tmp_path):
    """Names, placeholders and moments, against the format by hand."""
    params = flat(unboxed(T5_1_1))
    pretrained.write_t5x(tmp_path, T5_1_1, nested(params), step=4, dtype="bfloat16")
    assert os.listdir(tmp_path) == ["checkpoint_4"]
    folder = tmp_path / "checkpoint_4"
    content = flax.serialization.msgpack_restore((folder / "checkpoint").read_bytes())
    assert content["version"] == 3 and content["optimizer"].keys() == {"target", "state"}
    state, target = content["optimizer"]["state"], content["optimizer"]["target"]
    assert state["step"] == 4 and state["step"].dtype == np.int32
    named = "target/decoder/layers_0/mlp/wo/kernel"
    wo = params["decoder/layers_0/mlp/wo/kernel"].astype(ml_dtypes.bfloat16)
    assert target["decoder"]["layers_0"]["mlp"]["wo"]["kernel"] == spec(named, wo)
    np.testing.assert_array_equal(unzarr(folder / named.replace("/", ".")), wo)
    moments = state["param_states"]["decoder"]["layers_0"]["mlp"]["wo"]["kernel"]
    assert moments.keys() == {"m", "v", "v_row", "v_col"}
    assert moments["v_row"].shape == moments["m"].shape == (1,)
    place = "state/param_states/decoder/layers_0/mlp/wo/kernel/v"
    assert moments["v"] == spec(place, params["decoder/layers_0/mlp/wo/kernel"])
    assert not unzarr(folder / place.replace("/", ".")).any()


def test_moments_have_the_shapes_of_its_rules():
    target = {
        "encoder/layers_0/mlp/wo/kernel": np.empty((300, 200)),
        "encoder/layers_0/mlp/wi/kernel": np.empty((200, 300)),
        "encoder/layers_0/attention/out/kernel": np.empty((127, 200)),
        "decoder/decoder/mlp/wi_0/kernel": np.empty((8, 3, 10)),
        "decoder/decoder/mlp/wo/kernel": np.empty((10, 3, 8)),
        "decoder/decoder/pre_mlp_layer_norm/scale": np.empty((200, 130)),
        "decoder/decoder_norm/scale": np.empty(200),
    }
    moments = t5x_adafactor.fresh_moments(target)
    shapes = {n: [moments[f"{n}/{k}"].shape for k in ("v_row", "v_col", "v", "m")] for n in target}
    one = (1,)
    assert list(shapes.values()) == [
        [(200,), (300,), one, one],
        [(200,), (300,), one, one],
        [one, one, (127, 200), one],
        [(8, 3), (3, 10), one, one],
        [(3, 8), (10, 3), one, one],
        [one, one, (200, 130), one],
        [one, one, (200,), one],
    ]


@pytest.mark.parametrize("layout", ["t5x", "orbax"])
def test_the_optimizer_goes_out_and_comes_back(tmp_path, layout):
    params = unboxed(T5_1_1)
    optimizer = Adafactor(factor_from=8).transformation(10)
    draw = np.random.default_rng(5)
    state = jax.tree.map(
        lambda x: draw.normal(size=x.shape), jax.eval_shape(optimizer.init, params)
    )
    state = optax.tree_utils.tree_set(state, count=1)
    pretrained.write_t5x(tmp_path, T5_1_1, params, step=1, opt_state=state, layout=layout)
    got = t5x_adafactor.read_adafactor(tmp_path)
    assert got.count == 1
    for kind in ("v", "v_row", "v_col"):
        single = jax.tree.map(np.float32, optax.tree_utils.tree_get(state, kind))
        same(getattr(got, kind), single)
    assert got.v_row["decoder"]["logits_dense"]["kernel"].shape == (D,)  # factored


def test_errors_about_the_optimizer(tmp_path):
    params = unboxed(T5_1_1)
    with pytest.raises(ValueError, match="^write_t5x.opt_state: got one for scanned layers, expec"):
        pretrained.write_t5x(tmp_path, T5_1_1, params, scanned=True, opt_state={})
    with pytest.raises(ValueError, match="^opt_state: got a state without Adafactor's moments"):
        pretrained.write_t5x(tmp_path, T5_1_1, params, opt_state=optax.sgd(0.1).init(params))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="checkpoint_100: found no state of Adafactor"):
        t5x_adafactor.read_adafactor(by_hand(tmp_path / "bare", flat(params)))
    pretrained.write_t5x(tmp_path / "scan", T5_1_1, params, scanned=True)
    with pytest.raises(ValueError, match="got moments of scanned layers, expected layers one by"):
        t5x_adafactor.read_adafactor(tmp_path / "scan")
    states = {"param_states": {"x": {"m": np.ones(2), "v_row": np.ones(1)}}, "step": np.int32(1)}
    pack(tmp_path / "m" / "checkpoint_1", {"optimizer": {"state": states}, "version": 3})
    with pytest.raises(ValueError, match="got a state with momentum, expected none"):
        t5x_adafactor.read_adafactor(tmp_path / "m")


def test_a_student_with_scanned_layers_is_written(tmp_path):
    scan = dataclasses.replace(T5_1_1, scan_layers=True)
    params = stacking.stack_layers(unboxed(T5_1_1))
    pretrained.write_t5x(tmp_path / "t5x", scan, params, scanned=True)
    pretrained.write_hf(tmp_path / "hf", scan, params)
    same(pretrained.read(tmp_path / "t5x")[1], unboxed(T5_1_1))
    same(pretrained.read(tmp_path / "hf")[1], unboxed(T5_1_1))


def test_large_arrays_are_cut_into_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(t5x_checkpoints, "_CHUNK_BYTES", 100)
    target = {"a/b": np.arange(77, dtype=np.float32).reshape(11, 7), "c": np.float32(3)}
    folder = t5x_checkpoints.write(tmp_path, 1, target, {})
    chunks = json.loads((folder / "target.a.b" / ".zarray").read_text())["chunks"]
    assert chunks == [100 // (4 * 7), 7]
    got = t5x_checkpoints.read(folder)
    assert got.keys() == target.keys()
    for name, array in target.items():
        np.testing.assert_array_equal(got[name], array)


def test_a_larger_vocabulary_keeps_the_old_rows(tmp_path):
    config, params = pretrained.read(by_hand(tmp_path, flat(unboxed(T5_1_1))))
    larger, extended = pretrained.extend_vocabulary(config, params, 20, jax.random.key(0))
    assert larger == silent(T5_1_1, vocab_size=20)
    old, new = (tree["token_embedder"]["embedding"] for tree in (params, extended))
    assert new.shape == (20, D)
    np.testing.assert_array_equal(new[: len(old)], old)


def test_all_faulty_names_are_listed(tmp_path):
    params = flat(unboxed(T5_1_1))
    del params["encoder/layers_1/mlp/wi_1/kernel"]
    params["decoder/layers_0/mlp/wi_2/kernel"] = np.ones((D, F), np.float32)
    params["decoder/decoder_norm/scale"] = np.ones(D + 1, np.float32)
    with pytest.raises(ValueError) as error:
        pretrained.read(by_hand(tmp_path, params))
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'checkpoint_100'} does not fit T5Config(vocab_size=11,")
    assert message.partition("): ")[2].split("; ") == [
        "encoder/layers_1/mlp/wi_1/kernel is missing",
        "decoder/layers_0/mlp/wi_2/kernel is left over",
        f"decoder/decoder_norm/scale: got shape ({D + 1},), expected ({D},)",
    ]
    stacked = stacked_by_hand(flat(unboxed(T5_1_1)))
    del stacked["encoder/encoder/mlp/wi_1/kernel"]
    with pytest.raises(ValueError, match="layers_0/mlp/wi_1/kernel is missing; encoder/layers_1/"):
        pretrained.read(by_hand(tmp_path / "scanned", stacked))
    lacking = {"encoder/layers_0/x": np.ones(1), "encoder/layers_2/x": np.ones(1)}
    with pytest.raises(ValueError, match=r"^encoder/layers_<i>/x is missing in layers \[1\]$"):
        t5x_checkpoints.scanned(lacking)


def test_lost_and_damaged_arrays_are_named(tmp_path):
    by_hand(tmp_path, flat(unboxed(T5_1_1)), rows=4)
    folder = tmp_path / "checkpoint_100"
    (folder / "target.token_embedder.embedding" / "2.0").unlink()  # zarr would read zeros
    (folder / "target.decoder.decoder_norm.scale" / ".zarray").unlink()
    query = folder / "target.encoder.layers_0.attention.query.kernel" / "0.0"
    query.write_bytes(query.read_bytes()[:20])
    with pytest.raises(ValueError) as error:
        pretrained.read(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{folder}: cannot read decoder/decoder_norm/scale (NOT_FOUND")
    assert "; encoder/layers_0/attention/query/kernel (" in message and "truncated" in message
    last = message.partition("; token_embedder/embedding (")[2]
    assert "embedding/2.0" in last and last.endswith("is missing)")


def test_a_shape_and_a_dtype_that_are_not_those_promised(tmp_path):
    params = {"a": np.ones((2, 3), np.float32), "b": np.ones(2, np.uint16)}
    for name, array in params.items():
        zarr(tmp_path / f"target.{name}", array)
    leaves = {"a": spec("target/a", np.ones((3, 2))), "b": spec("target/b", params["b"])}
    pack(tmp_path, {"version": 2, "optimizer": {"target": leaves}})
    with pytest.raises(ValueError) as error:
        t5x_checkpoints.read(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: cannot read a (got shape [2, 3], expected [3, 2]); b (got uint16, bfloat16 "
        "as t5x wrote it before version 3; expected bfloat16)"
    )


def test_other_files_are_refused(tmp_path):
    folder = by_hand(tmp_path, flat(unboxed(T5_1_1))) / "checkpoint_100"
    whole = (folder / "checkpoint").read_bytes()
    for content, message in {
        whole[:200]: "checkpoint: 200 bytes that are no whole msgpack file",
        b'model_checkpoint_path: "model.ckpt-1"': "is of TensorFlow, expected one of t5x; t5x's",
        b"\x03": "checkpoint: got int, expected a tree of names",
        flax.serialization.msgpack_serialize({"target": {"dense": np.ones(3)}}): (
            r"expected the parameters of a T5, with matrices .*; got 1 arrays: \['dense'\]"
        ),
    }.items():
        (folder / "checkpoint").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            pretrained.read(tmp_path)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "o" / "1", {"target": {"x": np.ones(3)}})
    (tmp_path / "o" / "1" / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match="/o/1: cannot be read"):
        pretrained.read(tmp_path / "o")


def test_steps_are_found_or_listed(tmp_path):
    for step in (9, 10):
        t5x_checkpoints.write(tmp_path, step, {"a": np.full(3, step)}, {})
    (tmp_path / "checkpoint_11").mkdir()  # of a save that was killed
    for step, found in ((None, 10), (9, 9)):
        assert t5x_checkpoints.read(tmp_path, step=step)["a"][0] == found
    with pytest.raises(FileNotFoundError) as error:
        pretrained.read_t5x(tmp_path, step=11)
    assert str(error.value) == (
        f"{tmp_path}: expected step 11 of t5x or orbax; found steps [9, 10]"
    )
    with pytest.raises(FileNotFoundError, match="expected a checkpoint of t5x or orbax; found non"):
        pretrained.read_t5x(tmp_path / "nowhere")


def test_the_format_is_that_of_the_folder(tmp_path, monkeypatch):
    pretrained.write_hf(tmp_path / "hf", T5_1_0, unboxed(T5_1_0))
    pretrained.write_t5x(tmp_path / "t5x", T5_1_0, unboxed(T5_1_0))
    same(pretrained.read(tmp_path / "hf")[1], pretrained.read(str(tmp_path / "t5x"))[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError) as error:
        pretrained.read(tmp_path / "empty")
    assert str(error.value) == (
        f"{tmp_path / 'empty'}: got [], expected config.json and model.safetensors (Hugging Face) "
        "or checkpoint_<step> (t5x, orbax)"
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="'google/flan-t5-base' is no folder here"):
        pretrained.read("google/flan-t5-base")


def test_settings_that_cannot_be(tmp_path):
    params = unboxed(T5_1_1)
    for settings, message in {
        ("layout", "hf"): r"^layout: got 'hf', expected one of \['t5x', 'orbax'\]$",
        ("dtype", "float16"): r"^write_t5x.dtype: got 'float16', expected one of \['bfloat16', 'f",
    }.items():
        with pytest.raises(ValueError, match=message):
            pretrained.write_t5x(tmp_path, T5_1_1, params, **dict([settings]))
    assert not list(tmp_path.iterdir())


def test_buckets():
    assert t5x_checkpoints.kvstore(epath.Path("gs://my-data/models/t5") / "target.a") == {
        "driver": "gcs",
        "bucket": "my-data",
        "path": "models/t5/target.a/",
    }
    assert t5x_checkpoints.kvstore("s3://my-data/t5")["driver"] == "s3"
    with pytest.raises(ValueError, match="^hdfs://x/y: got hdfs://, expected a local folder or gs"):
        t5x_checkpoints.kvstore("hdfs://x/y")


class Bucket:
    """A path gs://my-data/..., whose files lie in a local folder."""

    local: epath.Path

    def __init__(self, source):
        self.inside = str(source).removeprefix("gs://my-data/")

    def __fspath__(self):
        return f"gs://my-data/{self.inside}"

    __str__ = __fspath__

    def __truediv__(self, name):
        return Bucket(f"{self}/{name}")

    @property
    def parent(self):
        return Bucket(self.inside.rpartition("/")[0])

    def iterdir(self):
        return [self / path.name for path in (self.local / self.inside).iterdir()]

    def __getattr__(self, name):  # exists, read_bytes ...
        return getattr(self.local / self.inside, name)


def test_a_bucket_is_written_and_read(tmp_path, monkeypatch):
    stores, ts_open = [], t5x_checkpoints.ts.open

    def open_local(spec, **more):
        stores.append(spec["kvstore"])
        place = {"driver": "file", "path": f"{tmp_path}/{spec['kvstore']['path']}"}
        return ts_open(spec | {"kvstore": place}, **more)

    monkeypatch.setattr(Bucket, "local", tmp_path, raising=False)
    monkeypatch.setattr(t5x_checkpoints.epath, "Path", Bucket)
    monkeypatch.setattr(t5x_checkpoints.ts, "open", open_local)
    pretrained.write_t5x("gs://my-data/run", T5_1_1, unboxed(T5_1_1), step=2)
    same(pretrained.read("gs://my-data/run")[1], unboxed(T5_1_1))
    place = "run/checkpoint_2/target.token_embedder.embedding/"
    assert stores.count({"driver": "gcs", "bucket": "my-data", "path": place}) == 2
    assert {store["bucket"] for store in stores} == {"my-data"}
    content = (tmp_path / "run" / "checkpoint_2" / "checkpoint").read_bytes()
    target = flax.serialization.msgpack_restore(content)["optimizer"]["target"]
    embedding = unboxed(T5_1_1)["token_embedder"]["embedding"]
    expected = spec("target/token_embedder/embedding", embedding, driver="gcs")
    assert target["token_embedder"]["embedding"] == expected
