"""Readers of a MODEL_DIR whose stages are made again: the same answers, or a word, never others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest

from dgr_jax.model_dir import records
from dgr_jax.retrieval.retriever import Retriever
from tests.conftest import ROOT, kept_programs

QUESTIONS = ["Why do bees dance?", "What is a button cell?", "How does a lighthouse shine?"]


def answers(folder):
    retriever = Retriever.load(folder)
    return [[(hit.pid, hit.score) for hit in hits] for hits in retriever.search(QUESTIONS, k=5)]


@pytest.fixture
def copied(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_identifiers_of_another_seed_do_not_change_the_answers_of_a_student(
    copied, command, caplog
):
    before = answers(copied)
    assert not caplog.messages
    command("dgr_jax.prepare", f"--model_dir={copied}", "--gin.SEED=1")
    assert answers(copied) == before
    assert "(changed: prepare.seed)" in caplog.text
    command("dgr_jax.prepare", f"--model_dir={copied}", "--gin.SEED=2")
    asked = ["dgr_jax.retrieve", f"--model_dir={copied}", "--query=Why do bees dance?"]
    done = command(*asked, check=False)
    assert done.returncode == 2
    assert "was trained on other identifiers than" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_readers_beside_a_writer_get_the_answers_of_one_whole_version(copied, together):
    """The writer prepares with other seeds by turns, and trains a student of the newest."""
    before = answers(copied)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        **kept_programs(together),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # of one device
    }
    code = (
        "import sys; from dgr_jax import prepare, train\n"
        "for seed in (1, 0, 1):\n"
        "    prepare.command([f'--model_dir={sys.argv[1]}', f'--gin.SEED={seed}'])\n"
        "train.command([f'--model_dir={sys.argv[1]}', '--gin.SEED=1', '--stages=generate'])\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(copied)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    seen = []
    try:
        while writer.poll() is None:
            seen.append(answers(copied))
            time.sleep(0.05)
    finally:
        writer.kill()
        errors = writer.communicate()[1]
    assert writer.returncode == 0, errors
    assert len(seen) > 5
    assert all(answer == before for answer in seen)
    assert records.read_record(copied / "prepare")["settings"]["prepare"]["seed"] == 1
