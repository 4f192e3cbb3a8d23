"""A freeze depth: parsed once, resolved for a model with any number of layers."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.recipe import FreezeDepth, FrozenRange


def test_a_depth_is_resolved_for_the_layers_of_a_model() -> None:
    expected = {
        0: FrozenRange(False, 0, False),
        "0%": FrozenRange(False, 0, False),
        "stem": FrozenRange(True, 0, False),
        3: FrozenRange(True, 3, False),
        "1%": FrozenRange(True, 0, False),
        "50%": FrozenRange(True, 5, False),
        "100%": FrozenRange(True, 11, False),
        "all": FrozenRange(True, 11, True),
    }
    assert {written: FreezeDepth.parse(written).resolve(11) for written in expected} == expected


def test_a_depth_says_what_is_left_to_train() -> None:
    nothing = [written for written in (0, "0%", "stem", 1, "1%", "all") if FreezeDepth.parse(written).freezes_nothing]
    body = [written for written in (0, "stem", 1, "100%", "all") if FreezeDepth.parse(written).freezes_body]
    assert (nothing, body) == ([0, "0%"], ["all"])


@pytest.mark.parametrize("written", ["", "deep", "3", "%", "half%", -1, True, 1.5, None, [1]])
def test_other_values_are_refused(written: Any) -> None:
    with pytest.raises(ValueError, match="is not a freeze depth"):
        FreezeDepth.parse(written)
