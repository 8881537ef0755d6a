"""Every family by every scheme: quantized, compared, saved, loaded in a fresh process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import verify_in_this_process
from families import page, trial
from families.fresh import fresh
from families.trial import LEAST_COSINE, MUST_COVER, Cell, Trial
from families.zoo import FAMILIES

pytestmark = [pytest.mark.filterwarnings(f"ignore:{told}") for told in trial.TOLD]


def matrix() -> list:
    return [
        pytest.param(f, s, id=f"{f}-{s}", marks=[] if s in MUST_COVER else [pytest.mark.slow])
        for s in LEAST_COSINE
        for f in FAMILIES
    ]


@pytest.fixture(scope="module")
def saved() -> dict[tuple[str, str], tuple[Path, list[torch.Tensor]]]:
    """The artifacts of this run, and what any process must compute from them."""
    return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For the artifacts; one thread, as in the process that loads them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        verify_in_this_process(patch)
        yield tmp_path_factory.mktemp("artifacts")
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("family", "scheme"), matrix())
def test_quantized(family: str, scheme: str, folder: Path, saved: dict) -> None:
    made = trial.attempt(FAMILIES[family], scheme)
    page.FOUND[family, scheme] = made.cell if isinstance(made, Trial) else made
    if isinstance(made, Cell):
        assert scheme not in MUST_COVER, made.reason
        return
    saved[family, scheme] = trial.save(made, folder), made.outputs
    trial.check_report(made)
    trial.check_reference(made)
    assert made.cell.covered >= MUST_COVER.get(scheme, 0.0), trial.left(made)
    assert made.cell.cosine >= trial.least_cosine(made.family, scheme)


def test_a_fresh_process_computes_the_same_bits(saved: dict, tmp_path: Path) -> None:
    """From every artifact that the tests above have saved."""
    assert saved
    outputs = fresh([[*key, str(path), False] for key, (path, _) in saved.items()], tmp_path)
    for key, (_, wanted) in saved.items():
        assert len(outputs[key]) == len(wanted)
        assert all(map(torch.equal, outputs[key], wanted)), key
