"""What ``qkit bench`` measured: contenders side by side on the same inputs.

As JSON (:meth:`BenchReport.to_json`, ``bench.json``) it is the object of the fields below, with
``format`` and ``kind``; lists for tuples, null for what is not known. Times are in milliseconds,
sizes in bytes, a throughput in samples per second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qkit.errors import InputError
from qkit.report.noise import Noise
from qkit.report.statistics import LEVEL, Interval
from qkit.report.text import as_text

FORMAT, KIND = 1, "bench"


@dataclass(frozen=True)
class Speed:
    """How many times as fast as the baseline: the ``ratio`` of the medians of the same rounds, with
    its interval, and what may be said of it (faster, slower, or not distinguishable)."""

    ratio: float
    low: float
    high: float
    verdict: str

    @staticmethod
    def of(interval: Interval) -> Speed:
        """The figures of an interval of a ratio."""
        return Speed(interval.value, interval.low, interval.high, interval.verdict)


@dataclass(frozen=True)
class Timing:
    """The latency of one call with ``batch`` samples on ``threads`` threads.

    ``median`` is that of the rounds, a round being the median of some calls in a row; ``ci_low``
    and ``ci_high`` its interval; ``p90`` that of all calls, of which there are ``n``. ``rounds``
    are the rounds themselves, for each start of the process. ``speed`` is None for the baseline,
    and where that was not measured.
    """

    batch: int
    threads: int
    median: float
    p90: float
    ci_low: float
    ci_high: float
    n: int
    throughput: float
    speed: Speed | None = None
    rounds: tuple[tuple[float, ...], ...] = ()

    @property
    def place(self) -> str:
        """What it was measured with, in words."""
        return place(self.batch, self.threads)


def place(batch: int, threads: int) -> str:
    """A pair of a batch and a number of threads, in words.

    >>> place(8, 1)
    'batch 8, 1 thread'
    """
    return f"batch {batch}, {threads} thread{'s' if threads != 1 else ''}"


@dataclass(frozen=True)
class Difference:
    """The outputs against those of the baseline on ``samples`` samples, ``batch`` in a call.

    ``sqnr_db``, ``cosine``, ``max_abs`` as :class:`~qkit.report.ErrorStats` has them in JSON:
    ``sqnr_db`` is None where there is no error, and, if ``max_abs`` is None too, where it is
    infinite. ``top1_agreement`` and ``kl_divergence`` as :class:`~qkit.report.ClassStats` has them,
    None where the outputs do not look like those of a classifier.
    """

    sqnr_db: float | None
    cosine: float
    max_abs: float | None
    top1_agreement: float | None
    kl_divergence: float | None
    samples: int
    batch: int


@dataclass(frozen=True)
class Contender:
    """One model or artifact. What could not be measured is None; ``failure`` says why.

    ``kind`` is how it was run (model, qkit, coded, onnx, xnnpack, inductor, compressed-tensors,
    quanto), ``scheme`` that of an artifact of qkit, ``runtime`` what ran it, ``size_bytes`` the
    files that hold its weights. Of fresh processes: ``load_ms`` until it could be called, with the
    import of its runtime, without that of torch; ``cold_start_ms`` the first call after that
    (medians of the starts); ``peak_memory_bytes`` the largest resident memory up to the end of the
    timing, with Python, torch and the inputs, ``base_memory_bytes`` the resident memory before it
    was loaded. ``metric`` is what the user's function said of it, ``kernels`` the implementations
    that ran, or that the runtime's program calls, with how often; empty where they have no names.
    """

    name: str
    kind: str
    path: str
    size_bytes: int | None = None
    scheme: str | None = None
    runtime: str | None = None
    load_ms: float | None = None
    cold_start_ms: float | None = None
    timings: tuple[Timing, ...] = ()
    peak_memory_bytes: int | None = None
    base_memory_bytes: int | None = None
    error: Difference | None = None
    metric: float | None = None
    kernels: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    failure: str | None = None

    def timing(self, batch: int, threads: int) -> Timing | None:
        """The latency at one place, if it was measured."""
        found = (t for t in self.timings if (t.batch, t.threads) == (batch, threads))
        return next(found, None)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Contender:
        """The contender that JSON holds as the object of its fields."""
        nested = {
            "timings": tuple(_timing(each) for each in data["timings"]),
            "error": data["error"] and Difference(**data["error"]),
            "remarks": tuple(data["remarks"]),
        }
        return Contender(**{**data, **nested})


def _timing(data: Mapping[str, Any]) -> Timing:
    nested = {
        "speed": data["speed"] and Speed(**data["speed"]),
        "rounds": tuple(tuple(each) for each in data["rounds"]),
    }
    return Timing(**{**data, **nested})


@dataclass(frozen=True)
class BenchReport:
    """One run. ``to_json`` has exactly the keys of the fields below.

    ``baseline`` is the name of the contender that ratios and errors refer to; ``inputs`` their
    origin, samples and shapes by name; ``level`` that of all intervals; ``metric`` the name of the
    user's function; ``command`` what repeats the run; ``date`` when it began (UTC).
    """

    baseline: str
    contenders: tuple[Contender, ...]
    noise: Noise
    batches: tuple[int, ...]
    threads: tuple[int, ...]
    inputs: Mapping[str, Any]
    starts: int
    level: float = LEVEL
    metric: str | None = None
    remarks: tuple[str, ...] = ()
    command: str | None = None
    date: str = ""
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> list[Contender]:
        """The contenders of which something could not be measured."""
        return [each for each in self.contenders if each.failure is not None]

    def to_json(self) -> dict[str, Any]:
        """This report as plain data."""
        return {"format": FORMAT, "kind": KIND} | asdict(self)

    def dumps(self) -> str:
        """This report as JSON text (strict: no NaN, no infinity)."""
        return as_text(self.to_json())

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> BenchReport:
        """The report that :meth:`to_json` described, also after it was text.

        Raises :class:`~qkit.errors.InputError` for anything else.
        """
        stated = (data.get("format"), data.get("kind"))
        if stated != (FORMAT, KIND):
            raise InputError("unknown report format", got=stated, wanted=(FORMAT, KIND))
        fields = {key: value for key, value in data.items() if key not in ("format", "kind")}
        try:
            fields["contenders"] = tuple(map(Contender.from_json, fields["contenders"]))
            fields["noise"] = Noise.from_json(fields["noise"])
            lists = ("batches", "threads", "remarks")
            return BenchReport(**fields | {name: tuple(fields[name]) for name in lists})
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not the report of a bench: {error}") from error
