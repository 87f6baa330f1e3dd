"""Rows go to an expert one by one, but only out of clusters that look like its own as a whole."""

import numpy as np
import pytest
from learning import NOVELTY, MemoryIndex

from dylora_stream.core.ledger import LedgerRow, RowState
from dylora_stream.core.messages import SampleReason
from dylora_stream.learn.claims import claims
from dylora_stream.learn.knowledge import Knowledge, Match

KNOWN, NEW = Match("e-1", 0.4), Match("e-1", 0.01)


@pytest.fixture
def knowledge() -> Knowledge:
    """Nothing is loaded: the matches are given."""
    return Knowledge(lambda _version: pytest.fail("nothing is loaded here"), MemoryIndex, NOVELTY)


def row(number: int, cluster: str | None, text: str = "") -> LedgerRow:
    """A waiting row."""
    return LedgerRow(
        position=f"t:0:{number}", request_id=None, tenant="default", input=text or f"text {number}", output="a",
        choices=(), reason=SampleReason.NOVEL, time_ms=number, is_correct=False, served_by=None, served_version=0,
        state=RowState.CLUSTERED, features=np.zeros(2, dtype=np.float32), cluster_id=cluster,
    )  # fmt: skip


@pytest.mark.parametrize(("known", "claimed"), [(30, 30), (28, 28), (18, 0), (0, 0)])
def test_a_cluster_of_which_an_expert_knows_too_little_keeps_its_rows(
    knowledge: Knowledge, known: int, claimed: int
) -> None:
    """Of thirty rows of its own an expert would know all but a few."""
    rows = [row(number, "c-1") for number in range(30)]
    found = claims(rows, [KNOWN] * known + [NEW] * (30 - known), knowledge)
    assert len(found) == claimed
    assert set(found.values()) <= {"e-1"}


def test_rows_without_a_cluster_are_claimed_one_by_one(knowledge: Knowledge) -> None:
    """A row that waits for its answer has no company yet."""
    rows = [row(number, None) for number in range(4)]
    assert claims(rows, [KNOWN, NEW, KNOWN, NEW], knowledge) == {"t:0:0": "e-1", "t:0:2": "e-1"}


def test_a_text_that_comes_again_and_again_has_one_voice(knowledge: Knowledge) -> None:
    """A known text, a hundred times, does not hand over a cluster of others."""
    rows = [row(number, "c-1", "the same") for number in range(100)]
    rows += [row(number, "c-1") for number in range(100, 110)]
    assert claims(rows, [KNOWN] * 100 + [NEW] * 10, knowledge) == {}


def test_a_cluster_of_thousands_is_judged(knowledge: Knowledge) -> None:
    """No number overflows."""
    rows = [row(number, "c-1") for number in range(5000)]
    assert claims(rows, [NEW] * 5000, knowledge) == {}
    assert len(claims(rows, [KNOWN] * 5000, knowledge)) == 5000
