"""Nothing but RecipeError, whatever a recipe file says."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdeit.recipe import resolve as recipes
from fastdeit.recipe import sections
from fastdeit.recipe.resolve import Recipe, RecipeError
from tests.recipe_texts import DISTILL

# fmt: off
SCRAPS = [
    "&a", "*a", "!!int", "!x", "<<:", "[", "]", "{", "}", "?", ":", "-", "|", ">-", "---", "...", "'", '"', "#", ",",
    "\\", "@", "`", "=", "~", "null", ".nan", "-.inf", "1e999", "0x", "0o8", "0b1", "1_", "+", "-0", "true", "lr",
    "use", "distill", "2024-01-01", "1:30", "9" * 30, '"\\ud800"', '"\\x"', "\ufeff", "\x85", "\u2028", "é",
]
# fmt: on
SCRAPS += ["\t", "\r", "\n", "\n  ", "- ", ": ", "? ", "|\n", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! x\n"]
SCRAPS += ["base: digits\n", "base: ./r.yaml\n", "method:\n", "use: ", "teacher: {", "recipe: ", "engine: {sinks: ["]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(SCRAPS)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    (section, field)
    for section, model in sections.SECTIONS.items()
    for field in (model.model_fields if model else ("use", "teacher", "loss", "smoothing"))
]
edits = st.lists(
    st.tuples(st.integers(0, len(DISTILL)), st.integers(0, 8), st.sampled_from(SCRAPS) | st.text(max_size=4)),
    min_size=1,
    max_size=5,
)


def only_recipe_errors(path, overrides=()):
    try:
        recipe = recipes.load(path, overrides)
    except RecipeError:
        return
    assert isinstance(recipe, Recipe)


def of_edits(path, edits):
    text = DISTILL
    for at, length, scrap in edits:
        text = text[:at] + scrap + text[at + length :]
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    only_recipe_errors(str(path))


def of_values(path, fields):
    document = {"optim": {"lr": 1}, "train": {"epochs": 1, "batch_size": 64}, "method": {"use": "supervised"}}
    for (section, field), value in fields:
        document.setdefault(section, {})[field] = value
    path.write_text(json.dumps(document))
    only_recipe_errors(str(path))


def of_bytes(path, data):
    path.write_bytes(data)
    only_recipe_errors(str(path))


def of_overrides(path, words):
    path.write_text(DISTILL)
    only_recipe_errors(str(path), words)


contents = st.lists(st.sampled_from(SCRAPS), max_size=12).map(lambda scraps: "".join(scraps).encode())
names = st.sampled_from(FIELDS).map(".".join) | st.text(max_size=6)
words = st.tuples(names, st.sampled_from(SCRAPS) | st.text(max_size=8)).map("=".join) | st.text(max_size=10)
KINDS = {
    "edits": (of_edits, edits),
    "values": (of_values, st.lists(st.tuples(st.sampled_from(FIELDS), values), min_size=1, max_size=4)),
    "bytes": (of_bytes, st.binary(max_size=40) | contents),
    "overrides": (of_overrides, st.lists(words, min_size=1, max_size=4)),
}
"""What is made of an example, and the examples."""


@pytest.mark.parametrize("examples", [100, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_recipe_file_holds(tmp_path, kind, examples):
    check, strategy = KINDS[kind]

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def holds(example):
        check(tmp_path / "r.yaml", example)

    holds()
