import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdlib.study.pictures.explorer import sketch


@settings(max_examples=40, deadline=None)
@given(
    st.integers(20, 60), st.integers(20, 60), st.floats(0, 2), st.integers(1, 100),
    st.integers(0, 100), st.integers(0, 4),
)  # fmt: skip
def test_any_choice_of_the_sliders_has_an_answer(m, n, decay, rank, p, q):
    drawn = sketch(m, n, decay, rank, p, q)
    side = min(m, n)
    rank = min(rank, side - 1)
    assert drawn.best == pytest.approx((rank + 1) ** -decay)
    assert len(drawn.found) == rank
    if rank + p >= side:
        assert "exact" in drawn.note or "no rank above" in drawn.note
        torch.testing.assert_close(drawn.found, drawn.sigma[:rank])
        assert drawn.error == 0
    else:  # no Q of k + p columns leaves less than σ_{k+p+1}; none leaves more than σ_1
        assert drawn.sigma[rank + p] * (1 - 1e-6) <= drawn.error <= 1 + 1e-6


def test_the_bound_holds_for_the_mean_and_needs_two_of_each():
    draws = [sketch(60, 50, 1.0, 10, 5, 0, seed) for seed in range(30)]
    mean = sum(drawn.error for drawn in draws) / len(draws)
    assert draws[0].best < mean < draws[0].bound < 1  # a basis that ignores A leaves about 1
    assert len({drawn.error for drawn in draws}) == 30
    for rank, p in ((1, 5), (10, 1)):
        drawn = sketch(60, 50, 1.0, rank, p, 0)
        assert drawn.bound is None and "k ≥ 2 and p ≥ 2" in drawn.note


def test_power_iterations_help_where_the_spectrum_is_slow():
    errors = [sketch(80, 60, 0.3, 10, 2, q).error for q in (0, 1, 3)]
    assert errors[0] > errors[1] > errors[2]
