"""Entropy-coded sections of an earlier day are still read, and still written the same."""

from __future__ import annotations

import pytest
from golden.make_golden_entropy import CASES, HERE, golden_bytes, path
from oracle_entropy import decode_oracle

from qkit.packing import entropy


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", CASES)
def test_todays_bytes_equal_the_file(name):
    assert golden_bytes(name) == path(name).read_bytes()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", CASES)
def test_file_decodes_to_the_codes(name):
    codes, data = CASES[name][0], path(name).read_bytes()
    for decoded in (entropy.decode(data), decode_oracle(data)):
        assert (decoded.shape, decoded.dtype) == (codes.shape, codes.dtype)
        assert (decoded == codes).all()


def test_there_is_one_file_for_each_case():
    assert {file.name for file in HERE.glob("*.qent")} == {path(name).name for name in CASES}
