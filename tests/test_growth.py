import pytest

from benchmarks import growth


def measured(passages, queries):
    """Stages of a corpus. Teach takes n seconds, and n / 100,000 for each of 10 n queries."""
    seconds = {stage: passages / 10 for stage in growth.STAGES}
    seconds["start"] = passages**1.1
    teach = lambda asked: passages + passages / 100_000 * asked
    seconds |= {"teach": teach(queries), "few teach": teach(10), "few candidates": passages / 10}
    stages = {name: {"processor": s + 2, "peak": 1 + s / 1000} for name, s in seconds.items()}
    stages["commands"] = {"processor": 2.0, "peak": 0.1}
    stages["prepare"]["examples"] = 10 * passages
    stages["candidates"]["queries"] = queries
    for name in ("few teach", "few candidates"):
        stages[name]["queries"] = 10
    return stages


FOUND = {10_000: measured(10_000, 1000), 100_000: measured(100_000, 2000)}


def test_seconds_are_those_of_all_queries_and_go_on_as_they_grew():
    wanted = {"prepare": 1e5, "start": 1e6**1.1, "candidates": 1e5, "teach": 1e6 + 1e8}
    for stage, expected in wanted.items():
        seconds = [growth.own_seconds(FOUND[n], stage) for n in FOUND]
        assert growth.beyond(list(FOUND), seconds, 10**6) == pytest.approx(expected)


@pytest.mark.slow
def test_a_plot_is_drawn(tmp_path):
    growth.draw(str(tmp_path / "growth.png"), FOUND)
    assert (tmp_path / "growth.png").stat().st_size > 5000
