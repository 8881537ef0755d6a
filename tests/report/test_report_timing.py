"""``measure`` times interleaved rounds; a clock that only the functions move makes it exact."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qkit.report import Latency, measure


class Clock:
    """``perf_counter`` for a world in which only the measured functions take time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def function(self, name: str, *seconds: float):
        """A function that takes ``seconds``, one after the other, and the last one for ever."""
        left = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    return clock


def test_rounds_alternate_after_the_warmup(clock):
    functions = {"a": clock.function("a", 0.01), "b": clock.function("b", 0.01)}
    measure(functions, seconds=0, min_repeats=3, warmup=2)
    assert "".join(clock.calls) == "aabb" + "ab" + "ba" + "ab"


def test_three_functions_alternate(clock):
    functions = {name: clock.function(name, 0.01) for name in "abc"}
    measure(functions, seconds=0, min_repeats=2, warmup=0)
    assert "".join(clock.calls) == "abc" + "cba"


@pytest.mark.parametrize(
    ("seconds", "least", "most", "want"),
    [
        (0, 5, 200, 5),  # at least
        (1e9, 5, 7, 7),  # at most
        (0.95, 1, 200, 10),  # for as long as asked: ten rounds of 0.1 s
        (0, 5, 3, 3),
    ],
)
def test_number_of_rounds(seconds, least, most, want, clock):
    functions = {"a": clock.function("a", 0.06), "b": clock.function("b", 0.04)}
    result = measure(functions, seconds=seconds, min_repeats=least, max_repeats=most)
    assert {name: latency.repeats for name, latency in result.items()} == {"a": want, "b": want}


def test_the_warmup_is_not_measured_nor_counted_as_time(clock):
    functions = {"a": clock.function("a", 50.0, 50.0, 0.1)}
    latency = measure(functions, seconds=0.95, min_repeats=1, warmup=2)["a"]
    assert latency.repeats == 10
    assert latency.p90 == pytest.approx(100.0)


def test_median_and_percentiles(clock):
    times = [0.009, 0.001, 0.002, 0.1, 0.003]
    latency = measure({"a": clock.function("a", *times)}, seconds=0, min_repeats=5, warmup=0)["a"]
    want = np.percentile(np.array(times) * 1e3, [50, 10, 90])
    assert [latency.median, latency.p10, latency.p90] == pytest.approx(list(want))
    assert latency.median == pytest.approx(3.0)
    assert latency.p10 <= latency.median <= latency.p90


def test_one_round(clock):
    latency = measure({"a": clock.function("a", 0.002)}, max_repeats=1)["a"]
    assert latency.median == latency.p10 == latency.p90 == pytest.approx(2.0)


def test_functions_are_told_apart(clock):
    functions = {"slow": clock.function("slow", 0.02), "fast": clock.function("fast", 0.001)}
    result = measure(functions, seconds=0)
    assert result["slow"].median == pytest.approx(20.0)
    assert result["fast"].median == pytest.approx(1.0)


def test_no_functions(clock):
    assert measure({}, seconds=0) == {}


def test_an_error_is_not_hidden(clock):
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure({"a": broken})


def test_json():
    data = Latency(1.23456, 1.0, 2.00004, 7).to_json()
    assert data == {"median": 1.2346, "p10": 1.0, "p90": 2.0, "repeats": 7}
    json.dumps(data, allow_nan=False)


def test_the_real_clock():
    latency = measure({"a": lambda: sum(range(1000))}, seconds=0.01)["a"]
    assert latency.repeats >= 5
    assert latency.median > 0
