"""The documentation: its code runs, and the site builds without a warning and loads nothing."""

from __future__ import annotations

import pkgutil
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command import verify_in_this_process
from docs_blocks import DOCS, Block, Page, Runner, pages, read
from qkit.cli import COMMANDS

import qkit

PAGES = {page.name: page for page in pages()}
START = "start"
# The first page verifies as a user's command does, in a process of its own; the others are about
# something else, and starting one takes seconds each time.
FRESH = (START,)
# Blocks that no test can run, and how many of them a page has.
NOT_RUN = {"start": 1}


def run(page: Page, folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if page.name not in FRESH:
            verify_in_this_process(patch)
        return Runner(page).run()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the first page leaves, with which others begin."""
    folder = tmp_path_factory.mktemp("start")
    assert run(PAGES[START], folder)
    return folder


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if page.blocks])
def test_the_code_of(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    page = PAGES[name]
    assert page.needs in (None, START)
    if name == START:
        request.getfixturevalue("started")
        return
    folder = tmp_path / "page"
    if page.needs:
        shutil.copytree(request.getfixturevalue("started"), folder)
    else:
        folder.mkdir()
    assert run(page, folder) or NOT_RUN.get(name)


TEXTS = {name: (DOCS / f"{name}.md").read_text(encoding="utf-8") for name in PAGES}
PATH = re.compile(r"`((?:qkit|kernels|benchmarks|tests|docs|cli)/[\w./-]*)`")
NAME = re.compile(r"`(qkit(?:\.\w+)+)(?<!\.json)`")


@pytest.mark.parametrize("name", TEXTS)
def test_paths_and_names_are_those_of_the_code(name: str) -> None:
    for path in PATH.findall(TEXTS[name]):
        assert (DOCS.parent / path).exists(), path
    for path in NAME.findall(TEXTS[name]):
        assert found(path) is not None, path


def found(path: str) -> object:
    """What a dotted name stands for: a module, or what is in one."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None


def test_what_is_not_run_is_counted_and_says_why() -> None:
    left = {name: [b for b in page.blocks if b.reason] for name, page in PAGES.items()}
    assert {name: len(blocks) for name, blocks in left.items() if blocks} == NOT_RUN


BAD = {
    "a python block that fails": Block("python", "assert 1 == 2", 1),
    "a session with another output": Block("pycon", ">>> 1 + 1\n3\n", 1),
    "a session without a prompt": Block("pycon", "1 + 1\n", 1),
    "a command that fails": Block("sh", "qkit schemes no-such-scheme", 1),
    "a command that should have failed": Block("sh", "qkit schemes w8a16", 1, exits=2),
    "a shell command that fails": Block("sh", "false", 1),
    "a command with another output": Block("console", "$ qkit schemes w8a16\nw4a16 ...\n", 1),
    "a block without a command": Block("sh", "# nothing\n", 1),
    "what is no JSON": Block("json", "{", 1),
    "a file without a name": Block("yaml", "a: 1", 1),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_blocks_are_found(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, ValueError)):
        Runner(Page("bad", None, (BAD[case],))).run()


def test_fences_that_nothing_knows_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("docs_blocks.DOCS", tmp_path)
    for text in ("```c\nx\n```", "```{note}\nx\n```", "```\nx\n```", "<!-- exits: 5 -->\n\nend"):
        (tmp_path / "page.md").write_text(text)
        with pytest.raises(AssertionError):
            read(tmp_path / "page.md")
    (tmp_path / "page.md").write_text(
        "<!-- needs: start -->\n\n<!-- not run: a GPU -->\n```sh\nnvidia-smi\n```\n"
        "```{code-block} yaml\n:caption: a.yaml\n\na: 1\n```\n"
    )
    page = read(tmp_path / "page.md")
    assert (page.needs, page.blocks[0].reason) == ("start", "a GPU")
    assert (page.blocks[1].file, page.blocks[1].text) == ("a.yaml", "a: 1\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Warnings are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E"]
    command += ["-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


class Loads(HTMLParser):
    """What a browser fetches by itself for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in ("next", "prev", "index", "search", "canonical"):
            return
        name = {"link": "href", "object": "data"}.get(tag, "src")
        if tag != "a" and (value := given.get(name)):
            self.found.append(value)


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    found = sorted(site.rglob("*.html"))
    assert len(found) > len(PAGES)
    for path in found:
        loads = Loads()
        loads.feed(path.read_text(encoding="utf-8"))
        local = [url.split("?")[0] for url in loads.found if not url.startswith("data:")]
        assert local
        for url in local:
            assert "//" not in url, f"{path.name} loads {url}"
            assert (path.parent / url).exists(), f"{path.name} loads {url}, which is not there"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", style.read_text(encoding="utf-8"))


def test_every_command_and_public_name_has_its_reference(site: Path) -> None:
    import click
    from qkit.cli import group

    commands = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    with click.Context(group) as context:
        for name in COMMANDS:
            command = group.get_command(context, name)
            assert f'id="qkit-{name.replace(" ", "-")}"' in commands
            for option in (p for p in command.params if isinstance(p, click.Option)):
                assert option.opts[-1] in commands
    names = (site / "reference" / "api.html").read_text(encoding="utf-8")
    assert [name for name in qkit.__all__ if f'id="qkit.{name}"' not in names] == []


def test_pictures_are_the_same_each_time_and_on_a_page(site: Path, tmp_path: Path) -> None:
    script = DOCS / "site" / "pictures.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    files = sorted(tmp_path.iterdir())
    assert len(files) >= 9
    for path in files:
        text = path.read_text(encoding="utf-8")
        built = DOCS / "_generated" / "pictures" / path.name
        assert text == built.read_text(encoding="utf-8"), path.name
        assert "<path" in text
        assert any(f"pictures/{path.name}" in page for page in TEXTS.values()), path.name


def test_figures_of_the_decision_table_come_from_the_results(tmp_path: Path) -> None:
    """Another result gives another page; one that is missing stops the build."""
    root = tmp_path / "root"
    (root / "docs" / "site").mkdir(parents=True)
    shutil.copy(DOCS / "site" / "decision.py", root / "docs" / "site")
    shutil.copytree(DOCS.parent / "benchmarks", root / "benchmarks")

    def page() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(root / "docs" / "site" / "decision.py")]
        return subprocess.run(command, capture_output=True, text=True)

    before = page()
    assert before.returncode == 0, before.stderr
    path = root / "benchmarks" / "results" / "streaming.jsonl"
    text = path.read_text()
    path.write_text(re.sub(r'"peak_rss_bytes": \d+', '"peak_rss_bytes": 987654321', text))
    assert "988 MB" in page().stdout
    assert "988 MB" not in before.stdout
    path.write_text("")
    assert page().returncode != 0
