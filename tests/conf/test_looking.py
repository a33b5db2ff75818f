"""Options of probes are judged without torch: by the kind that their file gives."""

import pytest

from conf import looking
from conf.errors import UserError

MAP = {"_target_": "models.probes.attention_map.attention_map", "images": 4, "max_tokens": 9, "point": None}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"images": "abc"},
            "attention_map: images must be a whole number of at least 1, got 'abc'; set probe.images=4",
        ),
        ({"images": 0}, "images must be a whole number of at least 1, got 0"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number of at least 0, got 1.5"),
        ({"point": [0.5, 2]}, "point must be two fractions from 0 to 1, from the left and from the top, got"),
    ],
)
def test_a_wrong_kind(wrong, said):
    looking.check(MAP | {"layers": [0, "x"], "heads": 3})
    with pytest.raises(UserError) as caught:
        looking.check(MAP | wrong)
    assert said in str(caught.value)


def test_kinds_of_other_probes():
    with pytest.raises(UserError, match="throughput: seconds must be a number of at least 0, got 'long'"):
        looking.check({"_target_": "models.probes.throughput.throughput", "seconds": "long"})
    with pytest.raises(UserError, match="cost: blocks must be true or false, got 3; set probe"):
        looking.check({"_target_": "models.probes.cost.cost", "blocks": 3})
    looking.check({"_target_": "somewhere.of.mine"})
