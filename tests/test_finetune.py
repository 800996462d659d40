"""docs/finetune.md: its commands run from the first photo to an evaluated model, and its table is the rule."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.length import epochs_for, length

PAGE = (Path(__file__).parent.parent / "docs" / "finetune.md").read_text()
BLOCK = re.compile(r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_page_runs_from_start_to_end(tmp_path):
    for block in BLOCK.finditer(PAGE):
        if block["language"] == "python":
            (tmp_path / block["title"]).write_text(block["text"])
            continue
        for line in block["text"].splitlines():
            program, *words = shlex.split(line)
            command = [sys.executable, *(["-m", "fastdeit"] if program == "fastdeit" else []), *words]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert {len(list(folder.iterdir())) for folder in (tmp_path / "photos" / "val").iterdir()} == {16}
    assert len(list((tmp_path / "photos" / "train").iterdir())) == 8
    summary = json.loads((tmp_path / "runs" / "photos" / "summary.json").read_text())
    assert summary["best"] > 50  # of eight classes a guess has 12.5 %


def test_the_table_of_the_page_is_the_rule():
    rows = re.findall(
        r"^\| (?:below|from) .*\| ([\d,]+) \| .*?([\d,]+|ImageNet-1k)(?: photos)?: (\d+) epochs \|$", PAGE, re.M
    )
    assert len(rows) == 3
    for shown, photos, epochs in rows:
        images = 1_281_167 if photos == "ImageNet-1k" else int(photos.replace(",", ""))
        assert epochs_for(images) == int(epochs) == -(-int(shown.replace(",", "")) // images)
    assert (epochs_for(2585), epochs_for(2586)) == (100, 99)


def test_the_recipe_follows_the_size_of_the_data_set():
    recipe = recipes.load("finetune")
    assert (recipe.train.epochs, recipe.train.steps, recipe.optim.warmup_epochs) == (None, None, None)
    found = length(recipe, 5000, 5000 // recipe.train.batch_size)
    assert (found.epochs, found.warmup_epochs) == (52, pytest.approx(2.6))
