"""``qkit.bench``: what is slower is found, what is the same is not, and what fails is a row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_models import Ends, OnlyOne, Sleepy, Twice, total
from torch import nn

import qkit
from qkit.errors import InputError, UnsafeCodeError, UsageError
from qkit.flows.bench import check_bench_destination, save_bench
from qkit.flows.bench.campaign import Campaign, Cell, Findings, Setting
from qkit.flows.bench.feed import known_inputs, samples
from qkit.flows.bench.plan import plans
from qkit.flows.bench.process import ContenderError, Running
from qkit.flows.bench.results import baseline_series, contenders
from qkit.flows.data import in_memory
from qkit.models import Inputs
from qkit.report import BenchReport, compare
from qkit.report.bench_text import as_markdown
from qkit.targets.weights import save_tensors

ROUNDS = 12


@pytest.fixture(scope="module")
def importable() -> None:
    """Fresh processes find the models of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        yield


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {
        "base": Sleepy(2.0),
        "twin": Sleepy(2.0),
        "slow": Sleepy(6.0),
        "noisy": Sleepy(2.0, 0.9),
        "int8": qkit.quantize(Sleepy(2.0), "w8a16", latency=False)[0],
        "only one": OnlyOne(0.1),
        "ends": Ends(0.1),
        "twice": Twice(0.1),
    }


@pytest.fixture(scope="module")
def report(importable: None, models: dict[str, nn.Module], x: torch.Tensor) -> BenchReport:
    return qkit.bench(
        models,
        x,
        batches=(1, 3),
        threads=(1,),
        repeats=ROUNDS,
        starts=1,
        metric="bench_models:total",
    )


@pytest.fixture
def rows(report):
    return {each.name: each for each in report.contenders}


def test_what_sleeps_longer_is_slower(rows):
    for batch in (1, 3):
        timing = rows["slow"].timing(batch, 1)
        assert timing.speed.verdict == "slower"
        assert 0.2 < timing.speed.ratio < 0.9
        assert timing.median >= 6.0
        assert timing.speed.low <= timing.speed.ratio <= timing.speed.high < 1


def test_the_same_is_not_told_apart(rows):
    assert {rows["twin"].timing(batch, 1).speed.verdict for batch in (1, 3)} == {
        "not distinguishable"
    }


def test_figures_belong_together(report, rows):
    assert [each.name for each in report.contenders] == list(rows)
    assert report.baseline == "base"
    for name in ("base", "twin", "slow", "noisy", "int8"):
        row = rows[name]
        assert row.failure is None
        assert [(t.batch, t.threads) for t in row.timings] == [(1, 1), (3, 1)]
        for timing in row.timings:
            assert [len(rounds) for rounds in timing.rounds] == [ROUNDS]
            assert timing.n >= ROUNDS
            assert timing.median == pytest.approx(np.median(timing.rounds), abs=1e-4)
            assert timing.ci_low <= timing.median <= timing.ci_high
            assert timing.p90 >= timing.median * 0.99
            assert timing.throughput == pytest.approx(1e3 * timing.batch / timing.median, rel=1e-3)
            assert (timing.speed is None) == (name == "base")
        assert row.load_ms > 0
        assert row.cold_start_ms >= (0.2 if name == "noisy" else 2.0)  # what it sleeps at least
        assert 20 << 20 < row.base_memory_bytes <= row.peak_memory_bytes
        assert row.runtime == f"torch {torch.__version__}, eager"
    assert report.inputs["shapes"] == {"0": "float32 4x12"}
    assert report.seconds > 1


def test_errors_are_those_of_the_outputs(rows, models, x):
    exact = rows["twin"].error
    assert (exact.sqnr_db, exact.max_abs, exact.top1_agreement) == (None, 0.0, 1.0)
    assert exact.kl_divergence == 0.0
    with torch.no_grad():
        wanted = compare([models["base"](x)], [models["int8"](x)])
    error = rows["int8"].error
    assert (error.samples, error.batch) == (4, 1)
    assert error.sqnr_db == pytest.approx(wanted.sqnr_db, abs=0.1)
    assert error.cosine == pytest.approx(wanted.cosine)
    assert 0 < error.kl_divergence < 0.01


def test_the_metric_is_the_user_s(rows, models):
    for name in ("base", "twin", "int8", "twice"):
        with torch.no_grad():
            assert rows[name].metric == pytest.approx(total(models[name]), rel=1e-4)


def test_kernels_are_counted(rows):
    assert sum(rows["int8"].kernels.values()) == 1
    assert "qkit::linear" in next(iter(rows["int8"].kernels))
    assert rows["base"].kernels == {}


def test_who_fails_is_a_row(report, rows):
    assert [each.name for each in report.failed] == ["only one", "ends"]
    failed = rows["only one"]
    assert failed.failure.startswith("batch 3, 1 thread: the model fails on the inputs")
    assert "one sample, please" in failed.failure
    assert failed.timing(1, 1).n >= ROUNDS
    assert failed.timing(3, 1) is None
    assert failed.error.sqnr_db is None  # compared one by one
    ended = rows["ends"]
    assert ended.failure == ("batch 1, 1 thread: its process ended with exit 9: out of patience")
    assert ended.timings == ()
    assert ended.load_ms > 0


def test_other_outputs_are_a_remark(rows):
    assert rows["twice"].error is None
    assert rows["twice"].failure is None
    assert "cannot be compared" in rows["twice"].remarks[0]


def test_the_report_comes_back_from_its_text(report):
    assert BenchReport.from_json(json.loads(report.dumps())) == report


def test_the_folder(report, tmp_path):
    out = tmp_path / "out"
    save_bench(report, out)
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.md"]
    assert BenchReport.from_json(json.loads((out / "bench.json").read_text())) == report
    assert (out / "bench.md").read_text() == as_markdown(report)
    with pytest.raises(UsageError, match="exists"):
        check_bench_destination(out)
    check_bench_destination(out, overwrite=True)
    save_bench(report, out, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="left alone"):
        save_bench(report, tmp_path / "other", overwrite=True)


# The process


@pytest.fixture(scope="module")
def job(importable: None, tmp_path_factory: pytest.TempPathFactory, x) -> dict:
    folder = tmp_path_factory.mktemp("job")
    (plan,) = plans([Sleepy(0.1)], folder, trust_code=False)
    common = {"model": None, "source": None, "source_trusted": False}
    common |= {"trust_pickle": False, "runtime_cache": False, "threads": 2}
    return common | {"kind": plan.kind, "file": str(plan.file), "trusted": True}


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is that of Linux")
def test_who_has_not_its_turn_is_stopped(job):
    process = Running(job)
    try:
        with pytest.raises(ContenderError, match=r"(?i)no such file") as caught:
            process.ask("load", file="/nowhere/at/all")
        assert caught.value.alive
        pid = process._process.pid
        end = time.monotonic() + 10
        while state(pid) != "T" and time.monotonic() < end:
            time.sleep(0.01)
        assert state(pid) == "T"
    finally:
        process.close()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends orphans")
def test_a_killed_bench_leaves_no_process_behind(job):
    code = (
        "import json, os, signal, sys\n"
        "from qkit.flows.bench.process import ContenderError, Running\n"
        "process = Running(json.loads(sys.argv[1]))\n"
        "try:\n    process.ask('load', file='/nowhere')\nexcept ContenderError:\n    pass\n"
        "print(process._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(job)], capture_output=True, text=True
    )
    pid, end = int(done.stdout), time.monotonic() + 10
    while _runs(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return state(pid) != "Z"  # where nobody waits for orphans, they stay as zombies
    except FileNotFoundError:
        return False


# Rounds, with processes that are made up


class Fake:
    """A process that answers at once, ``ms`` in each turn."""

    log: list[str] = []

    def __init__(self, job: dict) -> None:
        self.name, self.dead = Path(job["file"]).stem, False

    def ask(self, do: str, **given) -> dict:
        self.log.append(f"{do} {self.name}")
        if do == "turn":
            if self.name == "c" and sum(e == "turn c" for e in self.log) > 4:
                raise ContenderError("tired", alive=True)
            return {"ms": [1.0, 3.0, 2.0] if self.name == "a" else [4.0]}
        if do == "outputs":
            save_tensors({"0.0": torch.ones(2)}, Path(given["out"]))
        return {"kernels": {}} if do == "kernels" else {"metric": 1.0}

    def close(self) -> None:
        self.log.append(f"close {self.name}")


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A campaign of made-up processes: names of the contenders and settings in."""
    monkeypatch.setattr("qkit.flows.bench.campaign.Running", Fake)
    monkeypatch.setattr(Fake, "log", [])

    def make(names: str, **change) -> Campaign:
        for name in names:
            torch.save(nn.Linear(1, 1), tmp_path / f"{name}.pt")
        chosen = plans([tmp_path / f"{name}.pt" for name in names], tmp_path, trust_code=False)
        setting = {
            "files": {1: tmp_path / "1"},
            "compared": tmp_path / "x",
            "threads": (1,),
            "starts": 1,
            "seconds": 1.0,
            "repeats": 6,
            "metric": None,
            "job": {},
            "folder": tmp_path,
            "told": lambda text: None,
        }
        return Campaign(chosen, Setting(**setting | change))

    return make


def test_who_is_first_changes(fake):
    campaign = fake("ab")
    found = campaign.run()
    turns = [each.removeprefix("turn ") for each in Fake.log if each.startswith("turn")]
    assert "".join(turns) == "abba" * 3
    assert found["a.pt"].cells[1, 1] == Cell({0: [2.0] * 6}, [1.0, 3.0, 2.0] * 6)
    assert found["b.pt"].cells[1, 1] == Cell({0: [4.0] * 6}, [4.0] * 6)
    assert Fake.log.index("memory a") > Fake.log.index("turn b")
    assert [each for each in Fake.log if each.startswith("close")] == ["close b", "close a"]


def test_every_start_and_number_of_threads_has_its_processes(fake):
    found = fake("a", starts=3, threads=(1, 2), repeats=7).run()
    assert Fake.log.count("load a") == Fake.log.count("close a") == 6
    assert Fake.log.count("outputs a") == 1
    assert {
        at: {s: len(r) for s, r in cell.rounds.items()} for at, cell in found["a.pt"].cells.items()
    } == {
        (1, 1): {0: 3, 1: 3, 2: 3},
        (1, 2): {0: 3, 1: 3, 2: 3},
    }


def test_rounds_go_on_for_as_long_as_asked(fake, monkeypatch):
    now = [0.0]

    def clock() -> float:
        now[0] += 0.1
        return now[0]

    monkeypatch.setattr("qkit.flows.bench.campaign.time.perf_counter", clock)
    found = fake("ab", repeats=None, seconds=2.0, starts=2).run()
    rounds = found["a.pt"].cells[1, 1].rounds
    # Half of the seconds for each start, of each of two contenders: two seconds of the clock.
    assert 18 <= len(rounds[0]) <= 22
    assert len(rounds[1]) == len(rounds[0])


def test_who_gives_up_leaves_the_others(fake):
    campaign = fake("abc", repeats=8, starts=2)
    found = campaign.run()
    assert found["c.pt"].failure == "batch 1, 1 thread: tired"
    # The first start had four rounds each, in the second it gave up at once.
    assert found["c.pt"].cells[1, 1].rounds == {0: [4.0] * 4}
    assert {s: len(r) for s, r in found["a.pt"].cells[1, 1].rounds.items()} == {0: 4, 1: 4}
    rows = {row.name: row for row in contenders(campaign.plans, found, "a.pt", 1, 1)}
    assert rows["c.pt"].timings == ()  # four rounds say nothing
    assert rows["b.pt"].timings[0].speed.ratio == 0.5


def test_pairs_are_of_the_same_starts(fake):
    found = {"a.pt": Findings(), "b.pt": Findings()}
    found["a.pt"].cells[1, 1] = Cell({0: [1.0] * 6, 1: [9.0] * 6}, [1.0])
    found["b.pt"].cells[1, 1] = Cell({1: [9.0] * 5}, [9.0])
    campaign = fake("ab")
    row = contenders(campaign.plans, found, "a.pt", 1, 1)[1]
    assert row.timings[0].speed.ratio == 1.0
    assert row.timings[0].speed.verdict == "not distinguishable"
    assert baseline_series(found["a.pt"])["batch 1, 1 thread"].shape == (2, 6)


# What is measured, on what


def test_names(tmp_path):
    for name in ("a/net.pt", "b/net.pt", "b/other.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(nn.Linear(2, 2), tmp_path / name)
    a, b, other = (str(tmp_path / name) for name in ("a/net.pt", "b/net.pt", "b/other.pt"))

    def names(*models) -> list[str]:
        return [plan.name for plan in plans(models, tmp_path, trust_code=False)]

    assert names(a, other) == ["net.pt", "other.pt"]
    assert names(a, b) == [a, b]
    assert names(a, other, a) == [f"{a} #1", "other.pt", f"{a} #2"]
    assert names(nn.Linear(2, 2), nn.Linear(2, 2)) == ["Linear #1", "Linear #2"]
    assert [p.name for p in plans({"x": a}, tmp_path, trust_code=False)] == ["x"]


def test_what_is_wrong_is_told_before_anything_runs(tmp_path, x):
    torch.save(nn.Linear(12, 2), net := tmp_path / "net.pt")
    torch.save(nn.Linear(12, 2).state_dict(), state := tmp_path / "state.pt")
    (tmp_path / "text.pt").write_text("no model")
    for models, kind, told, more in [
        ([], UsageError, "nothing to measure", {}),
        ([tmp_path / "gone.onnx"], InputError, "no such file", {}),
        ([tmp_path / "text.pt"], InputError, "not a model", {}),
        ([net], UsageError, "no contender of this name", {"baseline": "net"}),
        ([net], UsageError, "not possible: batch", {"batches": (0,)}),
        ([net], UsageError, "not possible: batch", {"batches": ()}),
        ([net], UsageError, "not possible: threads", {"threads": (2, 2)}),
        ([net], UsageError, "too little would be measured", {"seconds": 0}),
        ([net], UsageError, "too little would be measured", {"repeats": 4}),
    ]:
        with pytest.raises(kind, match=told):
            qkit.bench(models, x, **more)
    with pytest.raises(UsageError, match="no inputs are known"):
        qkit.bench([state])


def test_native_code_is_run_with_trust_only(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "net.pt2", "w") as archive:
        archive.writestr("net/data/aotinductor/model/x.so", b"")
    with pytest.raises(UnsafeCodeError, match="--trust-code"):
        plans([tmp_path / "net.pt2"], tmp_path, trust_code=False)
    (plan,) = plans([tmp_path / "net.pt2"], tmp_path, trust_code=True)
    assert plan.kind == "inductor"


def test_samples_are_the_first_ones_and_again_from_the_first():
    given = Inputs((torch.arange(3),), {"m": torch.arange(6).view(3, 2), "s": torch.ones(())}, "x")
    assert samples(given, 2).args[0].tolist() == [0, 1]
    many = samples(given, 7)
    assert many.args[0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert many.kwargs["m"].shape == (7, 2)
    assert many.kwargs["s"].shape == ()
    assert samples(given, 3).kwargs["m"].tolist() == given.kwargs["m"].tolist()


def test_inputs_come_from_who_knows_them(tmp_path, x, same_process):
    torch.save(nn.Sequential(nn.Linear(12, 2)), tmp_path / "net.pt")
    qmodel, _ = qkit.quantize(nn.Linear(12, 2), "w8a16", inputs=x, latency=False)
    qkit.save(qmodel, tmp_path / "out", inputs=x)
    both = plans([tmp_path / "net.pt", tmp_path / "out"], tmp_path, trust_code=False)

    def known(given, some):
        return known_inputs(given, some, 1, None, False)

    assert torch.equal(known(None, both[1:]).args[0], x)
    assert "inferred" in known(None, both).origin
    assert torch.equal(known(x, both).args[0], x)
    assert torch.equal(known(in_memory(x), both).args[0], x)


def test_the_number_of_samples_is_remarked(report):
    assert not any("repeated" in each for each in report.remarks)
    assert os.getloadavg()[0] >= 0  # where there is one, the report has it too
    assert report.noise.load is not None or not Path("/proc/loadavg").exists()
