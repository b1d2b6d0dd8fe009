"""The size that two hands tell of one object."""

from types import SimpleNamespace

import numpy as np
import pytest

from handhold.stages.track_hands import _common_scale


def test_hands_that_disagree_are_averaged_and_told_of_once():
    hands = {"right": SimpleNamespace(scale=1.0, scale_std=0.02), "left": SimpleNamespace(scale=2.0, scale_std=0.02)}
    told = []
    both = [_common_scale(hands, np.eye(4)[None], r) for r in (None, SimpleNamespace(note=told.append))]
    assert both == [pytest.approx(2**0.5)] * 2
    assert len(told) == 1 and "100 %" in told[0]
