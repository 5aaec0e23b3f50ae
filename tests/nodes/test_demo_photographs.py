"""The photographs that come with Retort: whole, of the size that the node names, and no others."""

from __future__ import annotations

import pytest

from retort.models import demo_photographs
from retort.nodes.embedded import RetortDemoPhotograph


@pytest.mark.parametrize(("name", "size"), [("cat", (300, 451)), ("coffee", (400, 600))])
def test_a_photograph_is_an_image(name, size):
    image = RetortDemoPhotograph.execute(name).args[0]
    assert image.shape == (1, *size, 3) and image.min() >= 0 and image.max() <= 1 and image.std() > 0.1
    height, width = size
    (option,) = RetortDemoPhotograph.GET_SCHEMA().inputs
    assert f"{width} x {height} pixels" in option.tooltip and name in option.options


def test_others_are_refused():
    with pytest.raises(ValueError, match="no photograph '../x'; choose cat or coffee"):
        demo_photographs.photograph("../x")
