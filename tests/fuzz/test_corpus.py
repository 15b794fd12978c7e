"""Every input that fuzzing has found worth keeping, again: what holds of any bytes holds of these."""

from __future__ import annotations

import pytest

from tests.fuzz import corpus

MAX_CORPUS = 2 << 20
"""Bytes, of all parsers."""


@pytest.mark.parametrize("name", corpus.PARSERS)
def test_what_fuzzing_found_still_holds(name: str) -> None:
    parser = corpus.parser(name)
    inputs = [*parser.seeds(), *corpus.kept(name)]
    for data in inputs:
        parser.check(data)


def test_the_inputs_stay_small() -> None:
    kept = {path.stem: path.stat().st_size for path in corpus.FOLDER.iterdir()}
    assert kept.keys() == set(corpus.PARSERS)
    assert sum(kept.values()) < MAX_CORPUS
