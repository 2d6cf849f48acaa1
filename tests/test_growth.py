import pytest

from benchmarks import growth


def measured(passages, queries):
    """Stages of a corpus: teach takes n^2 / 10,000 seconds for all of its 10 n queries."""
    seconds = {stage: passages / 10 for stage in growth.STAGES}
    seconds["start"] = passages**0.5
    seconds["teach"] = passages**2 / 10_000 * queries / (10 * passages)
    stages = {name: {"processor": s + 2, "peak": 1 + s / 1000} for name, s in seconds.items()}
    stages["commands"] = {"processor": 2.0, "peak": 0.1}
    stages["prepare"]["examples"] = 10 * passages
    stages["candidates"]["queries"] = queries
    return stages


FOUND = {100: measured(100, 1000), 1000: measured(1000, 2000)}


def test_seconds_are_those_of_all_queries_and_go_on_as_they_grew():
    wanted = {"prepare": 1000.0, "start": 100.0, "teach": 10_000.0}
    for stage, expected in wanted.items():
        seconds = [growth.own_seconds(FOUND[n], stage) for n in FOUND]
        assert growth.beyond(list(FOUND), seconds, 10_000) == pytest.approx(expected)


@pytest.mark.slow
def test_a_plot_is_drawn(tmp_path):
    growth.draw(str(tmp_path / "growth.png"), FOUND)
    assert (tmp_path / "growth.png").stat().st_size > 5000
