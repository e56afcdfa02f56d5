import numpy as np
import pytest

from svdlib.study.evidence.claims import claims_table
from svdlib.study.evidence.statistics import interval


def test_a_row_a_claim_with_what_was_measured():
    table = claims_table(
        {
            "an interval": (interval([1.0, 2.0, 3.0]), np.bool_(True)),
            "a number": (np.float32(0.012345), False),
            "a text": ("3 of 4", True),
        }
    )
    assert table.measured.tolist() == ["2.00 [-0.48, 4.48]", "≈ 0.0123", "3 of 4"]
    assert table.holds.tolist() == [True, False, True] and table.holds.dtype == bool


def test_times_are_marked_for_nbval():
    table = claims_table({"time: fast": (1.5, True), "time: too": (interval([1.0, 1.0]), False)})
    assert table.measured.tolist() == ["≈ 1.5", "≈ 1.00 [1.00, 1.00]"]
    assert table.holds.tolist() == ["≈ True", "≈ False"]


def test_of_a_single_run_nothing_is_known():
    table = claims_table({"costs little": (interval([0.5]), False), "costs": (interval([1, 2]), 1)})
    assert table.values.tolist()[0] == ["costs little", "0.50", "unknown"]
    assert table.holds.tolist()[1] is True


def test_a_claim_needs_both_parts():
    with pytest.raises(TypeError):
        claims_table({"nothing measured": True})
