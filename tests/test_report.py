"""The HTML file of a finished experiment, and of two: what it says, fetches nothing, is escaped."""

import base64
import html.parser
import json
import re
import shutil
import tarfile

import numpy as np
import pytest

from dgr_jax import report as report_command
from dgr_jax.analysis import beside, query_values, report
from dgr_jax.analysis.inspection import Inspection
from dgr_jax.corpora import store
from dgr_jax.corpora.types import Passage
from tests.test_old_model_dir import KEPT

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    with tarfile.open(KEPT) as archive:
        archive.extractall(folder, filter="data")
    return folder / "model"


@pytest.fixture(scope="module")
def other(model_dir):
    """A copy whose student answers as BM25 does, in a collection with dangerous texts."""
    folder = model_dir.parent / "<i>other"
    shutil.copytree(model_dir, folder)
    for stage in ("prepare", "evaluate"):
        record = folder / stage / "stage.json"
        described = json.loads(record.read_text(encoding="utf-8"))
        del described["files_made"]  # what follows changes them
        record.write_text(json.dumps(described), encoding="utf-8")
    evaluate = folder / "evaluate"
    shutil.copy(evaluate / "bm25.test.trec", evaluate / "distill.test.trec")
    measured = json.loads((evaluate / "metrics.json").read_text(encoding="utf-8"))
    measured["distill"] = measured["bm25"]
    (evaluate / "metrics.json").write_text(json.dumps(measured), encoding="utf-8")
    costs = {"found": {"index MB": 1.5, "ms a query": 7.25}}
    (evaluate / "costs-distill.json").write_text(json.dumps(costs), encoding="utf-8")
    passages = [
        Passage(p.pid, f"{SCRIPT}{p.text}", f"{SCRIPT}{p.title}")
        for p in store.PassageStore(model_dir / "prepare" / "passages")
    ]
    shutil.rmtree(folder / "prepare" / "passages")
    store.write(passages, folder / "prepare" / "passages")
    queries = folder / "prepare" / "collection" / "queries.jsonl"
    text = queries.read_text(encoding="utf-8").replace('"text": "', f'"text": "{SCRIPT}')
    (folder / "prepare" / "dangerous.jsonl").write_text(text, encoding="utf-8")
    config = folder / "config.gin"
    lines = config.read_text(encoding="utf-8").replace("DISTILL_STEPS = 3", f"X = '{SCRIPT}'")
    config.write_text(lines, encoding="utf-8")
    return folder


class Page(html.parser.HTMLParser):
    """The tags of a page, what it would fetch, its text, and its tables: caption -> rows."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.text = [], [], ""
        self.feed(text)
        self.tables = {}
        for caption, rows in re.findall(r"<p><b>(.*?)</b></p><table>(.*?)</table>", text):
            cells = [
                re.findall(r"<t[hd].*?>(.*?)</t[hd]>", r) for r in re.findall("<tr>.*?</tr>", rows)
            ]
            self.tables[html.unescape(caption)] = cells

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for name, v in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.text += data

    def table(self, begins):
        (rows,) = (rows for caption, rows in self.tables.items() if caption.startswith(begins))
        return rows


@pytest.fixture(scope="module")
def alone(model_dir):
    return report.page([Inspection.load(model_dir)])


@pytest.fixture(scope="module")
def both(model_dir, other):
    return report.page([Inspection.load(model_dir), Inspection.load(other)])


def test_the_measures_are_those_of_the_evaluation_with_their_intervals(model_dir, alone):
    measured = json.loads((model_dir / "evaluate" / "metrics.json").read_text(encoding="utf-8"))
    made = Inspection.load(model_dir)
    for system, by_split in measured.items():
        values = query_values.per_query(made, system, "test")
        for name, mean in by_split["test"].items():
            assert len(values[name]) == 12
            assert np.mean(list(values[name].values())) == pytest.approx(mean)
    rows = Page(alone).table("test: 12 queries, relevant from grade 2")
    assert rows[0][:2] == ["system", "Success@1"]
    assert [row[0] for row in rows[1:]] == ["bm25", "generate", "control", "distill"]
    assert rows[1][1] == "0.250 (0.000 to 0.500)"


def test_an_interval_of_the_bootstrap():
    assert query_values.interval([0.5] * 9) == (0.5, 0.5, 0.5)
    values = np.arange(400) % 2
    mean, low, high = query_values.interval(values)
    normal = 1.96 * np.sqrt(0.25 / 400)
    assert mean == 0.5
    assert low == pytest.approx(0.5 - normal, abs=0.01)
    assert high == pytest.approx(0.5 + normal, abs=0.01)


def test_tests_wins_identifiers_teacher_and_costs(alone):
    page = Page(alone)
    tests = page.table("test: paired over the queries")
    assert ["distill against bm25", "Success@1", "0.000", "0.250", "-0.250", "0.250",
            "0", "3", "9"] in tests  # fmt: skip
    (win,) = page.table("test: 1 queries answered higher up by generate than by distill")[1:]
    assert win[0] == "What do trees recover from their leaves before losing them?"
    assert win[1].startswith("Autumn leaf colour: As days shorten, broadleaved trees stop renewing")
    assert win[2:] == ["2", "8", "–", "–"]
    assert ["passages sharing an identifier", "0"] in page.table("Identifiers: rq")
    assert page.table("Use of codes")[1][:3] == ["1", "25", "16"]
    assert ["positive in candidates", "0.312", "0.188", "0.188"] in page.table("Teacher")
    assert page.table("Stages: 0.4 minutes in all")[0][-1] == "seconds"


def test_it_holds_its_plots_and_fetches_nothing(model_dir, alone, both):
    for text, count in ((alone, 2), (both, 4)):
        page = Page(text)
        assert len(page.fetched) == count
        assert all(source.startswith("data:image/png;base64,") for source in page.fetched)
        assert "default-src 'none'" in text and "http:" not in text and "https:" not in text
        assert not {"script", "link", "iframe", "object"} & set(page.tags)
    first = base64.b64decode(Page(alone).fetched[0].partition(",")[2])
    assert first == (model_dir / "evaluate" / "success_at_k.png").read_bytes()


def test_every_text_of_the_data_is_escaped(both):
    page = Page(both)
    assert "script" not in page.tags and "i" not in page.tags
    assert f"{SCRIPT}Autumn leaf colour" in page.text  # a title, as text
    assert f"+X = '{SCRIPT}'" in page.text and "<i>other" in page.text


def test_a_query_is_escaped_too(model_dir, other, tmp_path):
    folder = shutil.copytree(other, tmp_path / "dangerous")
    (folder / "prepare" / "dangerous.jsonl").replace(
        folder / "prepare" / "collection" / "queries.jsonl"
    )
    text = report.page([Inspection.load(model_dir), Inspection.load(folder)])
    page = Page(text)
    assert "script" not in page.tags and f"{SCRIPT}What do trees recover" in page.text
    # Questions of other texts are other questions.
    assert "they were measured on no query that both judge in the same way" in page.text


def test_two_are_tested_against_each_other(both):
    page = Page(both)
    rows = page.table("test: a against b, paired over the 12 queries with equal judgements")
    assert rows[0] == ["system", "measure", "a", "b", "a - b", "p", "better", "worse", "equal"]
    assert ["distill", "Success@1", "0.000", "0.250", "-0.250", "0.250", "0", "3", "9"] in rows
    assert ["bm25", "Success@1", "0.250", "0.250", "0.000", "1.000", "0", "0", "12"] in rows
    lost = page.table("test: 5 queries answered higher up by b than by a (distill)")
    assert lost[0] == ["query", "passage that answers it", "a", "b"]
    assert [row[2:] for row in lost[1:]][0] == ["–", "1"]
    assert "-DISTILL_STEPS = 3" in page.text
    assert page.table("Costs, on the device")[1] == ["distill", "1.500", "7.250"]


def test_only_queries_that_both_were_asked_are_compared(model_dir, other):
    a, b = Inspection.load(model_dir), Inspection.load(other)
    b.settings["seed"] = 1
    shared = {*query_values.asked(a, "test")} & {*query_values.asked(b, "test")}
    assert 0 < len(shared) < 12
    tests = beside.compared(a, b, "test")
    assert {sum(row[-3:]) for row in tests.rows} == {len(shared)}
    b.settings["max_queries"] = 0
    assert len(query_values.asked(b, "test")) == 41
    assert "the 12 queries" in beside.compared(a, b, "test").caption


def test_another_rule_of_relevance_is_not_compared(model_dir, other):
    a, b = Inspection.load(model_dir), Inspection.load(other)
    b.settings["min_relevance"] = 1
    assert beside.compared(a, b, "test").rows == []
    assert beside.settings(a, a) == []


def test_an_experiment_that_measured_nothing(model_dir, other, tmp_path):
    folder = shutil.copytree(other, tmp_path / "unlabelled")
    systems = {"bm25": {}, "distill": {}}
    (folder / "evaluate" / "metrics.json").write_text(json.dumps(systems), encoding="utf-8")
    text = report.page([Inspection.load(folder)])
    assert "Nothing was measured: there was no test split." in text
    text = report.page([Inspection.load(model_dir), Inspection.load(folder)])
    assert "They were measured on no split of one name" in text


def test_the_command_writes_it(model_dir, alone, tmp_path):
    output = tmp_path / "report.html"
    report_command.command([f"--model_dir={model_dir}", f"--output={output}"])
    assert output.read_text(encoding="utf-8") == alone


def test_what_cannot_be_reported(model_dir, tmp_path):
    def refused(*folders, output=tmp_path / "x.html"):
        return [*(f"--model_dir={folder}" for folder in folders), f"--output={output}"]

    with pytest.raises(ValueError, match="--model_dir: got 3 of them, expected one or two"):
        report_command.command(refused("a", "b", "c"))
    with pytest.raises(ValueError, match="--model_dir: got .* twice, expected two experiments"):
        report_command.command(refused(model_dir, f"{model_dir}/"))
    with pytest.raises(FileNotFoundError, match="no finished experiment in .*found no stage"):
        report_command.command(refused(tmp_path))
    with pytest.raises(IsADirectoryError):
        report_command.command(refused(model_dir, output=tmp_path))
    assert not list(tmp_path.iterdir())
