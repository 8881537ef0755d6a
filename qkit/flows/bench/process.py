"""The living process of one contender, which rests while it is not its turn.

Threads of OpenMP, ONNX Runtime and XNNPACK go on spinning for milliseconds after a call, on the
cores that the next contender is timed on. So a process is stopped (SIGSTOP) as soon as it has
answered, and goes on (SIGCONT) when it is asked again.
"""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from contextlib import suppress
from typing import Any

from qkit.targets.trial import fresh_command


class ContenderError(Exception):
    """What a contender cannot do, in words; ``alive`` says whether its process lives on."""

    def __init__(self, reason: str, *, alive: bool) -> None:
        super().__init__(reason)
        self.alive = alive


class Running:
    """A process for a ``job``: the fields of a :class:`~qkit.flows.bench.plan.Plan`, ``threads``,
    ``model``, ``source`` (a file with the architecture), ``trust_pickle``, ``source_trusted``,
    ``runtime_cache``."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (close closes it)
        self._process = subprocess.Popen(
            fresh_command("qkit.flows.bench.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )
        self._write(job)

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """The answer to a question (:mod:`qkit.flows.bench.worker`).

        Raises :class:`ContenderError` if there is none.
        """
        self._process.send_signal(signal.SIGCONT)
        self._write({"do": do} | given)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ContenderError(self._last_words(), alive=False)
        self._process.send_signal(signal.SIGSTOP)
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ContenderError(found["error"], alive=True)
        return found

    def _write(self, data: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which reading will tell
            self._process.stdin.write(json.dumps(data) + "\n")
            self._process.stdin.flush()

    def _last_words(self) -> str:
        """Why the process has ended."""
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"by signal {-code}" if code < 0 else f"with exit {code}"
        return f"its process ended {how}" + (f": {lines[-1][:300]}" if lines else "")

    def close(self) -> None:
        """End the process, and wait for it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            with suppress(BrokenPipeError):  # a question that was not read
                stream.close()
