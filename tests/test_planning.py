"""Plans: what is read from compiled programs, estimated sizes, formulas, and their print."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dgr_jax import plan
from dgr_jax.capacity import chips, hlo, planning, programs, tables
from dgr_jax.capacity.chips import Topology
from dgr_jax.capacity.counting import TAKEN
from dgr_jax.capacity.sizes import abstract_trie, estimated_sizes, model_config
from dgr_jax.config import cli, gin_files
from dgr_jax.decoding import trie
from dgr_jax.identifiers.scheme import TableSizes
from dgr_jax.partitioning import Mesh, make_mesh
from tests import toy

# reading a program


def test_dots_count_once_for_every_run_of_a_loop():
    def layers(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    x, kernels = jnp.zeros((4, 16)), jnp.zeros((5, 16, 16))
    text = jax.jit(layers).lower(x, kernels).compile().as_text()
    found = hlo.cost(text)
    assert found.flops == 5 * 2 * 4 * 16 * 16
    assert found.unknown == 0


def test_a_loop_that_ends_by_its_data_runs_as_often_as_it_is_told():
    def search(x):
        return jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: x @ x, x)

    text = jax.jit(search).lower(jnp.zeros((8, 8))).compile().as_text()
    assert hlo.cost(text).unknown == 1
    assert hlo.cost(text, unknown_trips=7).flops == 7 * 2 * 8**3
    with pytest.raises(ValueError, match="instruction of XLA: got .*, expected 'body="):
        hlo.cost(text.replace("body=", "what="))


def test_the_dearest_branch_counts():
    def choose(i, x):
        return jax.lax.switch(i, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    text = jax.jit(choose).lower(0, jnp.zeros((8, 8))).compile().as_text()
    assert hlo.cost(text).flops == 2 * 2 * 8**3


def _convolution(window, labels, left, right, out):
    return f"""HloModule m
ENTRY %main (a: f32[{left}], b: f32[{right}]) -> f32[{out}] {{
  %a = f32[{left}]{{2,1,0}} parameter(0)
  %b = f32[{right}]{{2,1,0}} parameter(1)
  ROOT %c = f32[{out}]{{2,1,0:T(8,128)S(1)}} convolution(%a, %b), {window}dim_labels={labels}
}}
"""


def test_convolutions_that_tpus_make_of_dots():
    dense = _convolution(
        "window={size=1}, ", "b0f_io0->b0f", "128,64,768", "768,192,1", "128,64,192"
    )
    assert hlo.cost(dense).flops == 2 * 128 * 64 * 768 * 192
    batched = _convolution(
        "window={size=8 stride=7 lhs_dilate=8}, ", "0bf_0io->0bf", "8,4,16", "8,16,5", "8,4,5"
    )
    assert hlo.cost(batched).flops == 8 * 2 * 4 * 16 * 5
    padded = _convolution("window={size=3 pad=1_1}, ", "b0f_0io->b0f", "2,5,4", "3,4,6", "2,5,6")
    assert hlo.cost(padded).flops == 2 * 2 * 4 * 6 * (3 * 5 - 2)
    # the result lies on the chip: S(1)
    assert hlo.cost(dense).bytes == 4 * (128 * 64 * 768 + 768 * 192)


def test_slices_of_a_stack_count_as_slices():
    def layers(x, kernels):
        return jax.lax.fori_loop(0, 10, lambda i, x: x * kernels[i], x)

    x, kernels = jnp.zeros(1000), jnp.zeros((10, 1000))
    text = jax.jit(layers).lower(x, kernels).compile().as_text()
    assert 10 * 2 * 4000 <= hlo.cost(text).bytes <= 10 * 6 * 4000


@functools.cache
def _mesh():
    return make_mesh(Mesh(data=2, model=4), toy.devices(8))


def test_what_travels():
    cut = NamedSharding(_mesh(), PartitionSpec(None, "model"))
    whole = NamedSharding(_mesh(), PartitionSpec())
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=cut)
    gather = jax.jit(lambda x: x * 2, out_shardings=whole).lower(x).compile().as_text()
    assert hlo.cost(gather).sent() == {"all-gather": 3 * 16 * 8 * 4}
    reduce = jax.jit(lambda x: x @ x.T, out_shardings=whole).lower(x).compile().as_text()
    assert hlo.cost(reduce).sent() == {"all-reduce": 2 * 3 / 4 * 16 * 16 * 4}
    assert hlo.cost(reduce).flops == 2 * 16 * 16 * 8


def test_groups_in_all_notations():
    assert hlo.group_size("replica_groups={{0,4},{1,5}}, x") == 2
    assert hlo.group_size("replica_groups=[4,8]<=[32], x") == 8
    assert hlo.group_size("replica_groups=mesh['a'=4,'b'=2] {'a'}") == 4
    ordered = "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([4,2]T(1,0)) {'a','c'}, x"
    assert hlo.group_size(ordered) == 8
    assert hlo.group_size("replica_groups={}") == 0


def test_text_that_is_no_program():
    with pytest.raises(ValueError) as error:
        hlo.cost("module { }")
    assert str(error.value) == (
        "program text: got no ENTRY computation, expected an optimised HLO module"
    )


# sizes


@pytest.mark.parametrize(
    ("levels", "closing"), [((16,) * 5, False), ((64,) * 4, True), ((200, 200, 4), False)]
)
def test_the_trie_is_as_large_as_that_of_random_rows(levels, closing):
    random = np.random.default_rng(0)
    rows = 3 + np.stack([random.integers(0, n, 20_000) for n in levels], 1)
    rows = np.unique(rows + np.cumsum([0, *levels[:-1]]), axis=0)
    arrays, layout = abstract_trie(TableSizes(len(rows), levels, closing), 1024)
    lengths = np.full(len(rows), len(levels))
    lengths[::50] -= closing  # rows of one length would need no closing token
    built = trie.build(rows, lengths, eos_id=1 if closing else None, vocab_size=1024)
    words = layout.bitmap_words if closing else built.layout.bitmap_words  # codes end below
    assert layout == dataclasses.replace(built.layout, bitmap_words=words)
    expected = sum(a.nbytes for _, a in built.padded().items())
    assert sum(a.nbytes for _, a in arrays.items()) == pytest.approx(expected, rel=0.2)
    assert all(a.strides in ((), (0,), (0, 0)) for _, a in arrays.items())  # no memory


@functools.cache
def experiment(*bindings, name="msmarco.gin"):
    parser = cli.parser("plan", "")
    args, given = cli.parse(parser, [f"--gin_file={name}", *bindings])
    return gin_files.load_experiment(args, given, keep=False)


def test_an_experiment_without_its_data_has_sizes():
    sizes = estimated_sizes(experiment(), TAKEN)
    assert sizes.vocab_size == 32_128 + 8 * 256
    assert sizes.identifiers.tables == (TableSizes(8_800_000, (256,) * 8),)


# plans


SMALL = (
    "--gin_file=models/tiny.gin", "--gin.T5Config.scan_layers=True", "--gin.BATCH_SIZE=8",
    "--gin.LIST_BATCH_SIZE=8", "--gin.QUERY_LENGTH=8", "--gin.NUM_BEAMS=4",
    "--gin.SEARCH_BATCH_SIZE=8", "--gin.T5Config.dtype=float32",
)  # fmt: skip


@functools.cache
def _small(name, adaptive=0):
    """A plan by the compiler, of host devices, and the same by formula."""
    small = experiment(*SMALL, f"--gin.T5Config.prefix_adaptive_layers={adaptive}")
    sizes = dataclasses.replace(
        estimated_sizes(small, TAKEN._replace(passages=5000)), vocab_size=2304
    )
    config = model_config(small, sizes)
    made = programs.program(name, small, sizes, _mesh(), small.mesh.rules)
    formula = planning.analytic(made, _mesh(), Topology("v5e", (2, 4)), config)
    return planning.compiled(made, formula), formula


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "adaptive"), [*((name, 0) for name in programs.PROGRAMS), ("decode", 2)]
)
def test_the_formula_counts_what_the_program_does(name, adaptive):
    found, formula = _small(name, adaptive)
    assert found.source == "compiled" and formula.source == "formula"
    assert found.flops == pytest.approx(formula.flops, rel=0.15)
    assert {**found.parts, "temporaries": 0} == {**formula.parts, "temporaries": 0}
    assert found.queries == {"generate": 8, "distill": 16, "decode": 8}[name]
    assert found.sent["all-reduce"] > 0


def _plan(**changes):
    usual = dict(
        program="generate", mesh={"data": 16, "fsdp": 1, "model": 4},
        topology=chips.topology("v5p:4x4x4"),
        parts={"parameters": 1e9, "optimizer": 1e8, "temporaries": 2e11},
        flops=459e12, moved=2765e9 * 2, sent={"all-reduce": 300e9, "all-gather": 600e9},
        queries=100,
    )  # fmt: skip
    return planning.CapacityPlan(**usual | changes)


def test_bounds():
    found = _plan()
    assert found.times == pytest.approx({"compute": 1.0, "memory": 2.0, "network": 1.5})
    assert (found.bound, found.queries_per_second) == ("memory", 50)
    near = _plan(topology=chips.topology("h100:8"), sent={"all-reduce": 450e9})
    far = dataclasses.replace(near, topology=chips.topology("h100:16"))
    assert (near.times["network"], far.times["network"]) == (1.0, 9.0)


def test_the_peak_is_that_of_the_products():
    """On TPUs JAX multiplies float32 in one bfloat16 pass by default, on GPUs in TF32."""
    made = {dtype: experiment(f"--gin.T5Config.dtype={dtype}") for dtype in ("float32", "bfloat16")}
    for name, ratio in (("h100:8", 989 / 494), ("a100:8", 312 / 156), ("v5p:2x2x2", 1.0)):
        slow, fast = (
            planning.plan("generate", one, estimated_sizes(one, TAKEN._replace(passages=1000)),
                          chips.topology(name), Mesh(data=8), compile=False)
            for one in made.values()
        )  # fmt: skip
        assert slow.flops == fast.flops and [slow.products, fast.products] == list(made)
        assert slow.times["compute"] / fast.times["compute"] == pytest.approx(ratio)
    peaks = {
        name: [chips.CHIPS[name].peak(kind) for kind in chips.PRODUCTS] for name in ("v5e", "h100")
    }
    assert peaks == {
        "v5e": [(197e12, "bfloat16"), (197e12, "one bfloat16 pass"),
                (197e12 / 6, "six bfloat16 passes")],
        "h100": [(989e12, "bfloat16"), (494e12, "TF32"), (67e12, "float32")],
    }  # fmt: skip


def test_what_to_change():
    assert not _plan().fits
    assert planning.advice(_plan(), experiment()) == [
        "--gin.T5Config.remat=minimal",
        "--gin.Training.microbatches larger, or --gin.BATCH_SIZE smaller",
        "--gin.T5Config.scan_layers=True",
        "--mesh=1,4,16: parameters cut over the data shards as well (fsdp)",
    ]
    full = _plan(program="decode", parts={"parameters": 2e11, "temporaries": 1, "trie": 1})
    assert planning.advice(full, experiment()) == ["more chips in the model axis of --mesh"]
    assert planning.advice(_plan(parts={"parameters": 1}), experiment()) == []


# the command


def test_the_command_plans_gpus_by_formula(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan.command(["--gin_file=msmarco.gin", "--topology=h100:8", "--mesh=4,2"])
    out = capsys.readouterr().out
    assert "estimated: 8,800,000 passages, vocabulary of 34,176, identifiers of 8 tokens" in out
    for line in ("parameters", "optimizer", "trie", "temporaries", "bound by network", "queries/s"):
        assert line in out
    assert "upper bounds of training steps: each query and identifier counts as the longest" in out
    assert "though short ones share rows (Training.pack_queries)" in out
    assert "8,800,000 passages, those of MS MARCO, as the collection lacks" in out
    assert out.count("bfloat16  bfloat16  bfloat16") == 1
    assert "989.00 T" in out.partition("FLOP/s at best")[2].split("\n")[0]
    assert list(tmp_path.iterdir()) == []


def test_the_passages_of_a_corpus_that_is_at_hand_are_counted(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan.command(["--gin_file=quickstart.gin", "--topology=h100:1", "--programs=decode"])
    out = capsys.readouterr().out
    assert "240 passages, as counted in QuickstartCollection" in out and "TF32" in out
    plan.command(["--gin_file=quickstart_dense.gin", "--topology=h100:1", "--programs=search",
                  "--passages=1000"])  # fmt: skip
    out = capsys.readouterr().out
    assert "1,000 passages, as given by --passages" in out
    assert "products in" in out and "float32" in out.partition("products in")[2].split("\n")[0]
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_ranks_all_meshes(capsys):
    plan.command(
        ["--gin_file=msmarco.gin", "--topology=h100:2", "--programs=generate", "--sweep",
         "--gin.BATCH_SIZE=300000", "--gin.T5Config.num_heads=3"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "generate: meshes by formula" in out
    rows = [line.split() for line in out.splitlines() if line.strip()[:2] in ("1,", "2,")]
    assert {row[0] for row in rows} == {"2,1,1", "1,1,2"}  # 3 heads are not cut in 2
    assert [row[2] for row in rows] == ["no", "no"]
    rates = [float(row[-1].replace(",", "")) for row in rows]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--topology=v9:2x2",),
            "--topology: got 'v9:2x2', expected one of v4, v5e, v5p, v6e, h100, a100, a colon, and "
            "a grid, such as v5p:4x4x4, v5e:4x4 or h100:8",
        ),
        (
            ("--topology=v5p:4x4",),
            "--topology: got 'v5p:4x4', expected 3 numbers for v5p, such as v5p:4x4x4",
        ),
        (("--topology=h100:8", "--mesh=8"),
         "--mesh: got '8', expected DATA,MODEL or DATA,MODEL,FSDP: 16,4"),
        (("--topology=h100:8", "--programs=train"),
         "--programs: got 'train', expected some of generate, distill, decode"),
        (("--topology=h100:8", "--passages=1"),
         "--passages: got 1.0, expected 2 to 2,147,483,647"),
        (("--topology=h100:8", "--passages=2e9", "--gin.IDENTIFIERS=@Atomic()",
          "--gin.SentencePiece.size=500000000", "--gin.SentencePiece.path="),
         "Atomic: got 2,000,000,000 codes for 2,000,000,000 passages in a vocabulary of "
         "2,500,000,128, expected at most 2,147,483,647 tokens, whose ids are int32: take smaller "
         "settings of IDENTIFIERS, a smaller SentencePiece.size, or fewer passages"),
        (("--topology=h100:6", "--mesh=6,1"),
         "generate: got a batch of 512, expected a multiple of 6, microbatches x data shards of "
         "the mesh; set BATCH_SIZE, LIST_BATCH_SIZE or --mesh"),
    ],
)  # fmt: skip
def test_errors(flags, message):
    with pytest.raises(ValueError) as error:
        plan.command(["--gin_file=msmarco.gin", *flags])
    assert str(error.value) == message


def test_without_libtpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ImportError) as error:
        chips.topology("v5p:2x2x1").devices()
    assert str(error.value) == (
        "planning for TPUs needs the extra 'dgr_jax[tpu]': pip install 'dgr_jax[tpu]'"
    )


@pytest.mark.slow
def test_a_tpu_program_is_compiled_without_a_tpu():
    pytest.importorskip("libtpu", reason="planning for TPUs needs the extra 'dgr_jax[tpu]'")
    small = experiment(*SMALL)
    sizes = dataclasses.replace(
        estimated_sizes(small, TAKEN._replace(passages=5000)), vocab_size=2304
    )
    found = planning.plan(
        "generate", small, sizes, chips.topology("v5e:2x2"), Mesh(data=2, model=2)
    )
    assert found.source == "compiled" and found.fits
    formula = planning.plan(
        "generate", small, sizes, found.topology, Mesh(data=2, model=2), compile=False
    )
    assert found.flops == pytest.approx(formula.flops, rel=0.15)
    assert tables.as_dict(found)["sent"]["all-reduce"] > 0
