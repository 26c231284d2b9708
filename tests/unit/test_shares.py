"""Shares of sources by step: what a config may say, and the shares from each step on."""

from __future__ import annotations

import pytest

from pretrain.config import ConfigError, load
from pretrain.shares import by_step


def test_shares_hold_until_the_next_step() -> None:
    words = ["data.sources={photos: 0.8, art: {0: 0.2, 20000: 0.5}}", "data.sources.text={'0': 0, 100: 1}"]
    sources = load("demo_256", words)[0].data.sources
    assert sources == {"photos": 0.8, "art": {0: 0.2, 20000: 0.5}, "text": {0: 0.0, 100: 1.0}}
    assert by_step(sources) == {
        0: {"art": 0.2, "photos": 0.8, "text": 0.0},
        100: {"art": 0.2, "photos": 0.8, "text": 1.0},
        20000: {"art": 0.5, "photos": 0.8, "text": 1.0},
    }
    assert by_step({"b": 2.0, "a": 1.0}) == {0: {"a": 1.0, "b": 2.0}}


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ("{a: 1, b: 0}", "data.sources.b: must be a share above 0, or shares by step such as .*, not 0$"),
        ("{a: x}", "data.sources.a: must be a share above 0, or shares by step such as .*, not 'x'$"),
        ("{a: .inf}", "data.sources.a: must be a share above 0, or shares by step such as .*, not inf$"),
        ("{a: true}", "data.sources.a: must be a share above 0, or shares by step such as .*, not True$"),
        ("{a: {}}", r"data.sources.a: must begin at step 0, such as .*, not {}$"),
        ("{a: {5: 1}}", r"data.sources.a: must begin at step 0, such as .*, not {5: 1}$"),
        ("{a: {0: 1, 9: 1, 5: 2}}", "data.sources.a: must have rising steps, such as .*, not {0: 1, 9: 1, 5: 2}$"),
        ("{a: {0: 1, later: 2}}", "data.sources.a: must have whole numbers as steps, such as .*, not {0: 1, 'later': 2}$"),
        ("{a: {0: 1, 5: -1}}", "data.sources.a: must have shares of 0 or more, such as .*, not {0: 1, 5: -1}$"),
        ("{a: 1, b: {0: 0, 5: 0}}", "data.sources.b: must have a share above 0 at some step, or be left out, not {0: 0, 5: 0}"),
        ("{a: {0: 1, 5: 0}, b: {0: 0, 9: 1}}", "data.sources: all shares are 0 from step 5 on; give a source a share there$"),
    ],
)  # fmt: skip
def test_shares_that_cannot_be(sources: str, said: str) -> None:
    """One line each."""
    with pytest.raises(ConfigError, match=said) as error:
        load("demo_256", [f"data.sources={sources}"])
    assert len(str(error.value).splitlines()) == 2, "the config's path, and the problem"
