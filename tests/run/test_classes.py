"""Class lists compared in order."""

import itertools

import pytest

from fastdeit.run.classes import Match, comparable, difference, match

PETS = ("cat", "dog", "eel")


def test_every_order_is_found():
    for theirs in itertools.permutations(PETS):
        found = match(theirs, PETS)
        assert found.kind == ("equal" if theirs == PETS else "permuted")
        assert tuple(theirs[index] for index in found.permutation) == PETS
    assert match(list(PETS), PETS) == Match("equal", (0, 1, 2))


@pytest.mark.parametrize(
    ("theirs", "kind"),
    [
        (("cat", "dog"), "other_count"),
        ((*PETS, "fox"), "other_count"),
        ((), "other_count"),
        (("cat", "dog", "fox"), "other_names"),
        (("Cat", "dog", "eel"), "other_names"),
        (("cat", "cat", "dog"), "other_names"),
    ],
)
def test_other_lists(theirs, kind):
    assert match(theirs, PETS) == Match(kind)


def test_a_name_that_stands_there_twice_tells_no_order():
    twice = ("crane", "ox", "crane")
    assert match(twice, twice).kind == "equal"
    assert match(twice, ("crane", "crane", "ox")) == Match("other_names")


def test_ids_and_words_are_not_compared():
    ids = ("n01440764", "n01443537")
    assert comparable(ids, ids)
    assert comparable(PETS, PETS)
    assert not comparable(ids, ("tench", "goldfish"))
    assert not comparable(("tench", "goldfish"), ids)
    assert comparable(("n01440764", "goldfish"), ("tench", "goldfish"))


def test_the_first_difference_is_told():
    told = difference(PETS, ("cat", "fox", "owl"))
    assert told == "class 1 is 'dog' of the weights and 'fox' of the data; they do not know fox, owl"
    assert difference(PETS, ("cat", "cat", "dog")) == "class 1 is 'dog' of the weights and 'cat' of the data"
