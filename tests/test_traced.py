"""Traced programs are kept, read again without tracing, and made anew where they do not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dgr_jax import partitioning, traced
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval.search_programs import BeamResult


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(traced, "folder", None)
    traced.keep_in(tmp_path)
    return tmp_path


def program(traces, factor=2.0):
    """params, tokens -> BeamResult; how often it was traced is counted."""

    def search(params, tokens):
        traces.append(tokens.shape)
        scores = factor * params["kernel"][tokens]
        return BeamResult(tokens, scores, scores > 0, tokens)

    return traced.kept("search", factor, jax.jit(search))


def asked(search, length=3):
    return search({"kernel": jnp.arange(-2.0, 4.0)}, jnp.arange(length)[None] + 1)


def test_without_a_folder_a_program_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(traced, "folder", None)
    jitted = jax.jit(lambda x: x)
    assert traced.kept("same", (), jitted) is jitted


def test_the_next_command_does_not_trace(folder):
    first, second = [], []
    before, after = asked(program(first)), asked(program(second))
    assert (len(first), len(second)) == (1, 0) and len(list(folder.iterdir())) == 1
    assert isinstance(after, BeamResult) and after.bonus is None
    np.testing.assert_array_equal(after.log_probs, [[-2.0, 0.0, 2.0]])
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_other_shapes_settings_and_sources_are_traced(folder, monkeypatch):
    traces = []
    search = program(traces)
    asked(search), asked(search), asked(search, length=2)
    assert traces == [(1, 3), (1, 2)]
    np.testing.assert_array_equal(asked(program(traces, 3.0)).log_probs, [[-3.0, 0.0, 3.0]])
    monkeypatch.setattr(traced, "_package", lambda: "other sources")
    asked(program(traces))
    assert len(traces) == 4 and len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("place", [None, 10, -200])
def test_a_damaged_file_is_said_and_made_again(folder, caplog, place):
    asked(program([]))
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    if place is None:
        del content[100:]
    else:
        content[place] ^= 4  # what is read then may still look like a program
    path.write_bytes(content)
    traces = []
    assert asked(program(traces)).log_probs[0, 2] == 2.0 and len(traces) == 1
    assert f"{path}: cannot be read" in caplog.text
    asked(program(traces))
    assert len(traces) == 1


def test_what_cannot_be_kept_is_traced_as_usual(folder):
    host = jax.jit(lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((2,), jnp.float32), x))
    np.testing.assert_allclose(traced.kept("host", (), host)(jnp.zeros(2)), 0.0)
    devices = jax.devices()
    if len(devices) > 1:
        spread = jax.device_put(
            jnp.arange(2.0), jax.NamedSharding(jax.make_mesh((2,), ("x",)), jax.P("x"))
        )
        np.testing.assert_array_equal(traced.kept("add", (), jax.jit(jnp.add))(spread, 1.0), [1, 2])
    assert not list(folder.iterdir())


def test_shapes_of_parameters_are_kept(folder, monkeypatch, caplog):
    model = Transformer(T5Config(vocab_size=20, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=8))
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    read = lambda: partitioning.abstract_params(model, mesh)
    first, (path,) = read(), folder.iterdir()
    partitioning._boxed_shapes.cache_clear()
    with monkeypatch.context() as untraced:
        untraced.setattr(partitioning, "boxed_params", None)
        assert read() == first
    path.write_text("{")
    partitioning._boxed_shapes.cache_clear()
    assert read() == first and f"{path}: cannot be read" in caplog.text
    other = traced.kept_shapes("a list", lambda: [jax.ShapeDtypeStruct((2,), jnp.int32)])
    assert other[0].shape == (2,) and list(folder.iterdir()) == [path]
