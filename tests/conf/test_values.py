"""Checks of single values: what passes, and the one wording of what does not."""

import math
from functools import partial

import pytest

from conf import values
from conf.errors import UserError

FIX = "set x.y"


@pytest.mark.parametrize(
    ("check", "good", "bad", "what"),
    [
        (values.whole, [1, 7], [0, -3, 2.0, "3", True, None, math.nan], "a whole number of at least 1"),
        (partial(values.whole, at_least=0), [0, 7], [-1, False], "a whole number of at least 0"),
        (values.odd, [1, 7], [0, 2, -1, 3.0, "3", True], "odd and positive"),
        (partial(values.odd, or_none=True, what="odd"), [0, 3], [2, -1, False], "odd"),
        (values.number, [0, 0.5, 7], [-1, "1", True, None, math.nan, math.inf], "a number of at least 0"),
        (values.fraction, [0, 0.5, 1], [-0.1, 1.1, "1", True, math.nan], r"in \[0, 1\]"),
        (partial(values.fraction, below_one=True), [0, 0.5], [1, 1.0, -1], r"in \[0, 1\)"),
        (values.flag, [True, False], [1, 0, "no", None], "true or false"),
        (partial(values.choice, known=("a", "b")), ["a", "b"], ["c", None, 1, ["a"]], "one of a, b"),
    ],
)
def test_a_value_comes_back_or_is_refused_in_the_same_words(check, good, bad, what):
    for value in good:
        assert check("who", "name", value, fix=FIX) is value
    for value in bad:
        with pytest.raises(UserError, match=rf"^who: name must be {what}, got .*; set x\.y$") as error:
            check("who", "name", value, fix=FIX)
        assert f"got {value!r};" in str(error.value)


def test_a_pair_comes_from_one_number_or_two():
    assert values.pair("who", "name", 7, fix=FIX) == values.pair("who", "name", [7, 7], fix=FIX) == (7, 7)
    for value in (0, [7], [7, 0], (7, 7, 7), "77", 2.5, True, None):
        with pytest.raises(
            UserError, match=r"^who: name must be a whole number of at least 1, or two, got .*; set x\.y$"
        ):
            values.pair("who", "name", value, fix=FIX)


def test_a_setting_that_asks_for_itself_is_named_once():
    with pytest.raises(UserError, match=r"^seed: must be a whole number of at least 0, got -1; set seed=0$"):
        values.whole("seed", "", -1, 0, fix="set seed=0")
