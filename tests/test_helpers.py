"""The helpers notice what they are there to notice."""

import pytest
import torch
from helpers import assert_close


@pytest.mark.parametrize("wrong", [[1.0, 2.001], [1.0, float("nan")], [1.0, float("inf")], [1.0]])
def test_assert_close_fails_on_a_wrong_value(wrong):
    with pytest.raises(AssertionError):
        assert_close(torch.tensor(wrong), torch.tensor([1.0, 2.0]))


def test_assert_close_lets_rounding_pass():
    assert_close(torch.tensor([1.0, 2.00001]), torch.tensor([1.0, 2.0]))


def test_assert_close_wants_the_same_infinities():
    inf = float("inf")
    assert_close(torch.tensor([inf, -inf, 1.0]), torch.tensor([inf, -inf, 1.0]))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([-inf]), torch.tensor([inf]))
