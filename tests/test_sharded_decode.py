"""Decoding on a mesh: the same passages as on one device, and little that travels."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dgr_jax import partitioning
from dgr_jax.partitioning import Mesh
from dgr_jax.retrieval.generative import Decoder, Search
from dgr_jax.retrieval.retriever import Retriever
from tests import students, toy

ROWS = {"rq": students.codes(300), "text": students.texts(300), "adaptive": students.codes(300)}
ADAPTIVE = dataclasses.replace(students.CONFIG, prefix_adaptive_layers=1)
BEAMS, LENGTH, BATCH = 5, 11, 8
QUERIES = students.queries(13, LENGTH)
WHOLE, CUT = 1 << 30, 0
slow = pytest.mark.slow


@functools.cache
def compiled(kind: str, data: int, model: int, limit: int) -> tuple[Decoder, str]:
    """A decoder on a mesh of data x model devices, and its compiled program."""
    toy.devices(data * model)
    search = Search(
        num_beams=BEAMS,
        depth=BEAMS,
        batch_size=BATCH,
        query_length=LENGTH,
        max_replicated_bytes=limit,
    )
    mesh = Mesh(data=data, model=model)
    config = ADAPTIVE if kind == "adaptive" else students.CONFIG
    decoder = students.decoder(ROWS[kind], search, mesh=mesh, devices=data * model, config=config)
    batch = jax.ShapeDtypeStruct(
        (BATCH, LENGTH), jnp.int32, sharding=partitioning.batch_sharding(decoder.mesh)
    )
    program = decoder._decode.lower(decoder.params, decoder._constraint, batch).compile()
    decoder._decode = program
    return decoder, program.as_text()


@pytest.mark.parametrize(
    ("kind", "data", "model", "limit"),
    [
        pytest.param("rq", 2, 4, CUT, marks=slow),
        pytest.param("rq", 8, 1, WHOLE, marks=slow),
        pytest.param("rq", 1, 8, WHOLE, marks=slow),
        pytest.param("text", 4, 2, CUT, marks=slow),
        pytest.param("adaptive", 2, 4, CUT, marks=slow),
    ],
)
def test_the_same_passages_on_every_mesh(kind, data, model, limit):
    decoder, _ = compiled(kind, data, model, limit)
    held = [leaf.sharding.spec for leaf in jax.tree.leaves(decoder._constraint)]
    assert (PartitionSpec("model") in held) == (limit == CUT)
    passages, scores = decoder.passages(QUERIES)
    expected_passages, expected_scores = compiled(kind, 1, 1, WHOLE)[0].passages(QUERIES)
    assert (expected_passages >= 0).all()
    np.testing.assert_array_equal(passages, expected_passages)
    np.testing.assert_allclose(scores, expected_scores, rtol=2e-6, atol=1e-5)


# what the compiled program moves


def shapes_of(text: str) -> set[tuple[int, ...]]:
    """Shapes of all arrays in a compiled program."""
    found = re.findall(r"\b(?:f|s|u|bf|pred)\d*\[([\d,]+)\]", text)
    return {tuple(int(size) for size in dims.split(",")) for dims in found}


def collectives(text: str) -> list[tuple[str, set[tuple[int, ...]], list[list[int]], str]]:
    """(operation, shapes of its results, groups of devices, line) of all that travels."""
    found = []
    for line in text.splitlines():
        match = re.search(r"= (.*?) (all-\w+|reduce-scatter|collective-permute)(?:-start)?\(", line)
        if match:
            found.append((match[2], shapes_of(match[1]), groups_of(line), line))
    return found


def groups_of(line: str) -> list[list[int]]:
    """Devices that exchange something, from any of XLA's ways to write them."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{(.*?)\}\}", line):
        return [[int(i) for i in group.split(",")] for group in match[1].split("},{")]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims, order = (
            [int(i) for i in (part or "").split(",") if i] for part in match.groups()
        )
        devices = np.arange(np.prod(dims)).reshape(dims)
        return devices.transpose(order or None).reshape(shape).tolist()
    match = re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line)
    sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", match[1])}
    exchanged = [list(sizes).index(name.strip()) for name in match[2].split(",")]
    devices = np.arange(np.prod(list(sizes.values()))).reshape(*sizes.values())
    last = range(len(sizes) - len(exchanged), len(sizes))
    devices = np.moveaxis(devices, exchanged, last)
    return devices.reshape(-1, np.prod([devices.shape[axis] for axis in last])).tolist()


def repeated(shapes: set[tuple[int, ...]], rows: int) -> list[tuple[int, ...]]:
    """Arrays that hold keys or values of every query token for every beam of a query."""
    width = students.CONFIG.head_dim
    heads = [width * n for n in (1, 2, 4)]
    return [
        shape
        for shape in shapes
        if LENGTH in shape
        and any(beams in shape for beams in (BEAMS, rows * BEAMS))
        and any(size in shape for size in heads)
    ]


MESHES = [("rq", 2, 4, CUT), pytest.param("text", 4, 2, WHOLE, marks=slow)]


@pytest.mark.parametrize(("kind", "data", "model", "limit"), MESHES)
def test_in_the_loop_nothing_travels_between_data_shards(kind, data, model, limit):
    _, text = compiled(kind, data, model, limit)
    inside = [found for found in collectives(text) if "while/body" in found[-1]]
    assert len(inside) > 5
    for _, _, groups, line in inside:
        assert all(len({device // model for device in group}) == 1 for group in groups), line


@pytest.mark.parametrize(("kind", "data", "model", "limit"), MESHES)
def test_parameters_and_a_cut_index_stay_where_they_are(kind, data, model, limit):
    decoder, text = compiled(kind, data, model, limit)
    arrays = jax.tree.leaves((decoder.params, decoder._constraint))
    cut = {leaf.shape for leaf in arrays if not leaf.sharding.is_fully_replicated}
    assert len(cut) > 5
    gathered = {s for name, shapes, *_ in collectives(text) if name == "all-gather" for s in shapes}
    assert not cut & gathered


@pytest.mark.parametrize(("kind", "data", "model", "limit"), MESHES)
def test_logits_are_cut_over_the_vocabulary_and_keys_are_not_repeated(kind, data, model, limit):
    _, text = compiled(kind, data, model, limit)
    shapes, rows = shapes_of(text), BATCH // data
    assert {
        (rows, BEAMS, students.VOCAB // model),
        (rows * BEAMS, students.VOCAB // model),
    } & shapes
    heads, width = students.CONFIG.num_heads // model, students.CONFIG.head_dim
    assert any(sorted(shape) == sorted((rows, LENGTH, heads, width)) for shape in shapes)
    assert not repeated(shapes, rows)


def test_repeated_keys_would_be_found():
    def attend(q, k):
        return jnp.einsum("bmhd,bmqhd->bmhq", q, jnp.repeat(k[:, None], BEAMS, 1) * 2)

    width = students.CONFIG.head_dim
    q, k = jnp.zeros((2, BEAMS, 1, width)), jnp.zeros((2, LENGTH, 1, width))
    assert repeated(shapes_of(jax.jit(attend).lower(q, k).compile().as_text()), 2)


def test_groups_are_read_in_all_notations():
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups_of("replica_groups={{0,1},{2,3},{4,5},{6,7}}, x") == pairs
    assert groups_of("source_target_pairs={{0,1},{2,3}}, x") == pairs[:2]
    assert groups_of("replica_groups=[4,2]<=[8], x") == pairs
    assert groups_of("replica_groups=mesh['a'=4,'b'=1,'c'=2] {'c'}, x") == pairs
    across = [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert groups_of("replica_groups=[2,4]<=[4,2]T(1,0), x") == across
    assert groups_of("replica_groups=mesh['a'=4,'b'=1,'c'=2] {'a'}, x") == across
    assert groups_of("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','b'}, x") == across


# where an index lies


def sizes(mesh: Mesh, limit: int) -> dict[str, PartitionSpec]:
    arrays = {
        "small": np.zeros(256, np.int8),
        "large": np.zeros((256, 2), np.int32),
        "odd": np.zeros(301, np.int32),
        "short": np.zeros(64, np.int8),
        "none": np.zeros(0, np.int32),
        "scalar": np.zeros((), np.int32),
    }
    placed = partitioning.make_mesh(mesh, toy.devices(8))
    found = partitioning.index_shardings(arrays, placed, max_replicated_bytes=limit)
    return {name: sharding.spec for name, sharding in found.items() if sharding.spec}


def test_an_index_is_cut_only_where_it_is_too_large(caplog):
    rest = 301 * 4 + 64 + 4  # 'odd', 'short', 'scalar'
    assert sizes(Mesh(data=2, model=4), rest + 256 + 2048) == {}
    assert sizes(Mesh(data=2, model=4), rest + 256 + 2047) == {"large": PartitionSpec("model")}
    assert sizes(Mesh(data=2, model=4), rest + 256 + 512) == {"large": PartitionSpec("model")}
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        cut = sizes(Mesh(data=2, model=4), 100)
    assert cut == {name: PartitionSpec("model") for name in ("large", "small")}
    assert [record.getMessage() for record in caplog.records] == [
        f"the index takes {rest + 64 + 512} bytes on each device, more than "
        "Search.max_replicated_bytes=100; Mesh.model=4 parts cut it no further"
    ]
    assert sizes(Mesh(), 100) == {}


@slow
def test_a_finished_experiment_answers_on_a_mesh(tiny_model_dir):
    toy.devices(8)
    questions = {
        str(n): text for n, text in enumerate(["Why do bees dance?", "Who built it?", "x"])
    }
    alone = Retriever.load(tiny_model_dir).run(questions)
    shared = Retriever.load(tiny_model_dir, mesh=Mesh(data=4, model=2), max_replicated_bytes=0).run(
        questions
    )
    for qid, passages in alone.items():
        assert [p.pid for p in shared[qid]] == [p.pid for p in passages]
        np.testing.assert_allclose(
            [p.score for p in shared[qid]], [p.score for p in passages], atol=1e-5
        )
