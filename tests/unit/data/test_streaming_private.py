"""."""

from __future__ import annotations

import numpy as np

from pretrain.data.streaming_private import times_before


def test_times_before() -> None:
    assert times_before(np.array([5, 3, 5, 5, 3, 0])).tolist() == [0, 0, 1, 2, 1, 0]
    assert times_before(np.array([], np.int64)).tolist() == []
