"""scripts/compare_seeds.py: folders that are no seeds of one experiment are not pooled."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from dgr_jax.corpora import store, trec
from dgr_jax.corpora.beir import write_beir
from dgr_jax.corpora.types import Passage, Qrel, Query, RankList, ScoredPassage
from dgr_jax.model_dir import kept
from dgr_jax.stages import pipeline

main = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "compare_seeds.py"))["main"]
PIDS = ("a", "b", "c")


def finished(folder, seed, *, text="text", steps=5, asked=("q1", "q2"), grade=2):
    """A MODEL_DIR with what the script reads of it: distill finds 'a' first, generate last."""
    prepare = {"prepare": {"seed": seed, "size": 9}, "files": {"collection": {"x": str(folder)}}}
    settings = {
        "evaluate": {"min_relevance": 2, "max_queries": len(asked) % 2, "seed": seed},
        "distill": {"distill": {"steps": steps, "seed": seed}, "prepare": prepare},
    }
    out = folder / "evaluate"
    out.mkdir(parents=True)
    pipeline.write_record(out, status="done", fingerprint="", settings=settings)
    for system, pids in (("generate", PIDS[::-1]), ("distill", PIDS)):
        lists = [
            RankList(qid, tuple(ScoredPassage(p, -float(i)) for i, p in enumerate(pids)))
            for qid in asked
        ]
        trec.write_run(out / f"{system}.test.trec", lists, tag="x")
    measured = {name: {"test": {"RR@10": 0.5 + seed}} for name in ("generate", "distill")}
    (out / "metrics.json").write_text(json.dumps(measured))
    store.write((Passage(pid, text, "") for pid in PIDS), folder / "prepare" / "passages")
    queries = [Query(qid, "words") for qid in ("q1", "q2")]
    qrels = {"test": [Qrel("q1", "a", grade), Qrel("q2", "a", grade), Qrel("q2", "c", 1)]}
    write_beir(folder / "prepare" / "collection", (), queries, qrels)
    return str(folder)


def test_seeds_of_one_experiment_are_pooled(tmp_path, capsys):
    folders = [finished(tmp_path / f"s{seed}", seed) for seed in (0, 1)]
    main([*folders, "--measures=RR@10"])
    said = capsys.readouterr().out
    assert "distill    RR@10 1.000 ± 0.500" in said
    # The passage of grade 1 is no positive: Evaluate.min_relevance is 2.
    assert "distill and generate: RR@10 1.0000 against 0.3333" in said


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 0}, "got the same seeds, expected another --gin.SEED for each folder"),
        ({"seed": 1, "steps": 6}, r"got other settings \(distill.distill.steps\), expected those"),
        ({"seed": 1, "text": "longer text"}, "got other passages, expected one collection"),
        ({"seed": 1, "grade": 3}, "got other judgements, expected one collection"),
    ],
)
def test_what_is_no_other_seed_is_refused(other, message, tmp_path):
    folders = [finished(tmp_path / "one", 0), finished(tmp_path / "other", **other)]
    with pytest.raises(SystemExit, match=f"^error: .*one and .*other: {message}"):
        main(folders)


def test_a_seed_from_before_files_were_signed_is_one(tmp_path, capsys):
    folders = [finished(tmp_path / f"s{seed}", seed) for seed in (0, 1)]
    record = tmp_path / "s1" / "evaluate" / "stage.json"
    made = json.loads(record.read_text())
    made["settings"]["distill"]["prepare"]["files"]["tasks/beir.py"] = {"bytes": 3}
    record.write_text(json.dumps(made))
    main(folders)
    assert "distill and generate" in capsys.readouterr().out


def test_a_run_that_was_edited_is_refused(tmp_path):
    folders = [finished(tmp_path / f"s{seed}", seed) for seed in (0, 1)]
    stage = tmp_path / "s1" / "evaluate"
    record = json.loads((stage / "stage.json").read_text())
    pipeline.write_record(stage, **record, files_made=kept.sign(stage))
    run = stage / "distill.test.trec"
    run.write_text("".join(reversed(run.read_text().splitlines(keepends=True))))
    with pytest.raises(SystemExit, match=r"^error: .*distill\.test\.trec: got other contents"):
        main(folders)


def test_other_queries_are_refused(tmp_path):
    folders = [
        finished(tmp_path / qid, seed, asked=(qid,)) for seed, qid in enumerate(["q1", "q2"])
    ]
    with pytest.raises(SystemExit, match="were asked other queries, .* Evaluate.seed one value"):
        main(folders)


def test_folders_and_splits_that_are_not_there_are_named(tmp_path):
    one, other = (finished(tmp_path / f"s{seed}", seed) for seed in (0, 1))
    with pytest.raises(SystemExit, match="^error: got one folder, .*s0, expected one a seed$"):
        main([one])
    with pytest.raises(
        SystemExit, match="^error: .*none: got no finished stage evaluate, expected"
    ):
        main([one, str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="^error: --split: got 'dev', expected one of test$"):
        main([one, other, "--split=dev"])
    (tmp_path / "s1" / "evaluate" / "metrics.json").write_text("{")
    with pytest.raises(SystemExit, match="^error: .*metrics.json: cannot be read"):
        main([one, other])
