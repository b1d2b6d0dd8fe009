"""Work on all cores gives what work one after the other gives."""

from __future__ import annotations

import pytest
import torch

from handhold.parallel import cores, each, one_thread, together


def test_each_keeps_the_order_and_says_how_far_it_is():
    seen: list[int] = []
    assert each(lambda x: x * x, range(50), tick=seen.append) == [x * x for x in range(50)]
    assert seen == list(range(1, 51))
    assert each(str, []) == []


def test_torch_has_one_thread_in_each_and_its_own_number_after():
    before = torch.get_num_threads()
    assert set(each(lambda _: torch.get_num_threads(), range(2 * cores()))) == {1}
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_what_one_raises_is_raised_and_the_rest_is_not_begun():
    begun: list[int] = []

    def job(x: int) -> None:
        begun.append(x)
        raise ValueError(f"at {x}")

    with pytest.raises(ValueError, match="at 0"):
        each(job, range(1000), workers=1)
    assert len(begun) < 1000


def test_together():
    assert together(lambda: 1, lambda: "two") == [1, "two"]
