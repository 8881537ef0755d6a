"""The code blocks of a page of the documentation, and running them in their order.

A fence is run by its language:

============  ====================================================================================
``python``    executed; all of a page share one namespace
``pycon``     a session, whose outputs are compared as doctest does
``sh``        commands: ``qkit`` in this process, anything else by bash
``console``   commands behind ``$ ``, and below each its output, compared as doctest does
``json``      parsed
``text``      formulas, layouts and messages; nothing is run
============  ====================================================================================

In compared output ``...`` stands for anything, and spaces and line ends are alike. A fence with a
``:caption:`` is a file of that name, whatever its language. Comments of Markdown say the rest:
``<!-- needs: start -->`` (the files that another page leaves), ``<!-- exits: 5 -->`` (how the next
block ends) and ``<!-- not run: REASON -->`` (what cannot run wherever the tests do).
"""

from __future__ import annotations

import doctest
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

DOCS = Path(__file__).resolve().parents[1] / "docs"
LANGUAGES = ("python", "pycon", "sh", "console", "json", "yaml", "text")
# Directives that show no code of ours; with any other, a block could hide in one.
DIRECTIVES = ("toctree", "include", "figure", "eval-rst")
LOOSELY = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_MARK = re.compile(r"<!-- (needs|exits|not run): (.+?) -->")
_SHELL = set("|<>&;$`")


@dataclass(frozen=True)
class Block:
    """A fence: ``file`` is the name that its caption gives, ``reason`` why it is not run."""

    language: str
    text: str
    line: int
    file: str | None = None
    reason: str | None = None
    exits: int = 0


@dataclass(frozen=True)
class Page:
    """A page by its name (its path below ``docs`` without the suffix), and its blocks."""

    name: str
    needs: str | None
    blocks: tuple[Block, ...]


def pages() -> list[Page]:
    """All pages but generated pieces of them."""
    names = [path.relative_to(DOCS) for path in sorted(DOCS.rglob("*.md"))]
    return [read(DOCS / name) for name in names if not name.parts[0].startswith("_")]


def read(path: Path) -> Page:
    """The page in ``path``; ``AssertionError`` for a fence that nothing here knows."""
    name = str(path.relative_to(DOCS).with_suffix(""))
    needs, marks, blocks = None, {}, []
    for token in MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8")):
        if token.type == "html_block":
            marks |= dict(_MARK.findall(token.content))
            needs = marks.pop("needs", needs)
        if token.type != "fence":
            continue
        assert token.map
        line = token.map[0] + 1
        block = _block(token.info.strip(), token.content, f"{name}:{line}")
        if block is not None:
            language, file, text = block
            reason, exits = marks.pop("not run", None), int(marks.pop("exits", "0"))
            blocks.append(Block(language, text, line, file, reason, exits))
    assert not marks, f"{name}: nothing follows {marks}"
    return Page(name, needs, tuple(blocks))


def _block(info: str, text: str, where: str) -> tuple[str, str | None, str] | None:
    """Language, file name and text of a fence; None for a directive that is no code."""
    if directive := re.fullmatch(r"\{([\w-]+)\}(?: (.*))?", info):
        if directive[1] in DIRECTIVES:
            assert "```" not in text, f"{where}: a block inside a directive"
            return None
        assert directive[1] == "code-block", f"{where}: unknown directive {info}"
        info = directive[2] or ""
    options: dict[str, str] = {}
    while option := re.match(r":([\w-]+): *(.*)\n", text):
        options[option[1]] = option[2]
        text = text[option.end() :]
    assert info in LANGUAGES, f"{where}: a block in an unknown language {info!r}"
    return info, options.get("caption"), text.removeprefix("\n")


@dataclass
class Runner:
    """Runs the blocks of a page in the working directory."""

    page: Page
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__docs__"})

    def run(self) -> int:
        """Run all; how many were run. Raises what the first bad one raises."""
        blocks = [block for block in self.page.blocks if block.reason is None]
        with modules_of(Path.cwd()):
            for block in blocks:
                self._one(block)
        return len(blocks)

    def _one(self, block: Block) -> None:
        where = f"docs/{self.page.name}.md:{block.line}"
        if block.file is not None:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            # As many lines before it as in the page, so that a traceback names the right one.
            padded = "\n" * block.line + block.text
            with warnings.catch_warnings():  # ExecuTorch's, at the import of its runtime
                warnings.filterwarnings("ignore", "This API is experimental")
                exec(compile(padded, where, "exec", dont_inherit=True), self.names)
        elif block.language == "pycon":
            self._session(block, where)
        elif block.language in ("sh", "console"):
            self._commands(block, where)
        elif block.language == "json":
            json.loads(block.text)
        else:
            assert block.language == "text", f"{where}: a {block.language} block without a caption"

    def _session(self, block: Block, where: str) -> None:
        case = doctest.DocTestParser().get_doctest(block.text, {}, where, where, block.line)
        case.globs = self.names
        told = io.StringIO()
        done = doctest.DocTestRunner(optionflags=LOOSELY).run(
            case, out=told.write, clear_globs=False
        )
        assert done.attempted, f"{where}: no >>> in it"
        assert not done.failed, told.getvalue()

    def _commands(self, block: Block, where: str) -> None:
        steps = list(_steps(block))
        assert steps, f"{where}: no command in it"
        for place, (command, want) in enumerate(steps):
            code, out = execute(command)
            last = place == len(steps) - 1
            assert code == (block.exits if last else 0), f"{where}: exit {code} of {command}\n{out}"
            if block.language == "console":
                same = doctest.OutputChecker().check_output(want, out, LOOSELY)
                assert same, f"{where}: {command} says\n{out}\nwanted\n{want}"


def _steps(block: Block) -> Iterator[tuple[str, str]]:
    """Each command of a block, and the output below it."""
    text = block.text.replace("\\\n", " ")
    if block.language == "sh":
        lines = [line.strip() for line in text.splitlines()]
        yield from ((line, "") for line in lines if line and not line.startswith("#"))
        return
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, want = part.partition("\n")
        yield command, want


def execute(command: str) -> tuple[int, str]:
    """The exit code and what was said: first on standard output, then on standard error."""
    words = shlex.split(command, comments=True)
    if words[0] == "qkit" and not _SHELL & set("".join(words)):
        return _qkit(words[1:])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(shell, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def _qkit(args: list[str]) -> tuple[int, str]:
    """The command line in this process, which has imported torch already."""
    from qkit.cli import main

    out, err = io.StringIO(), io.StringIO()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as qkit.cli.run has it
            code = main(args)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, out.getvalue() + err.getvalue()


@contextmanager
def modules_of(folder: Path) -> Iterator[None]:
    """Modules in ``folder`` can be imported inside the block, and are forgotten behind it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]
