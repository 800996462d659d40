"""Finding one's way on the command line: help, examples, home folders, explanations."""

import os
import shlex
from pathlib import Path

import pytest

from fastdeit import cli
from fastdeit.bench import data_peers, names, parity
from fastdeit.bench import peers as bench_peers
from fastdeit.data.sources import digits
from fastdeit.errors import UsageError
from fastdeit.recipe import describe
from fastdeit.recipe import resolve as recipes
from fastdeit.verbs import explain


def said(capsys, *argv):
    assert cli.main(argv) == 0
    return capsys.readouterr().out


# ---- help ------------------------------------------------------------------------------------------------------------


def test_every_verb_has_its_own_help_with_examples_that_work(capsys):
    for name, verb in cli.VERBS.items():
        text = said(capsys, *name.split(), "--help")
        assert text.startswith(f"usage: fastdeit {name}")
        assert verb.examples, name
        for example in verb.examples:
            assert f"  {example}\n" in text
            words = shlex.split(example, comments=True)
            words = words[words.index("fastdeit") + 1 :]
            words = words[: words.index(">")] if ">" in words else words
            assert " ".join(words).startswith(name)
            verb.parse(words[len(name.split()) :])


def test_help_of_a_verb_says_nothing_of_its_sisters(capsys):
    assert "--recipe" not in said(capsys, "bench", "step", "--help")
    assert "--teacher" not in said(capsys, "bench", "forward", "--help")
    assert "--arch" not in said(capsys, "kernels", "--help")


def test_help_lists_verbs_in_groups_and_families(capsys):
    text = said(capsys, "--help")
    for group, verbs in cli.GROUPS.items():
        assert f"\n{group}:\n  {next(iter(verbs))} " in text
    assert all(f"\n  {name} " in text for name in cli.VERBS)
    family = said(capsys, "data", "--help")
    assert family.startswith("verbs of data:\n  data check ")
    assert "bench" not in family


def test_the_command_line_has_the_peers_that_there_are():
    assert set(names.STEP_PEERS) == bench_peers.PEERS.keys()
    assert (*parity.CASES,) == names.PARITY_CASES
    assert {*names.DATA_PEERS, "all", "none"} == data_peers._PEERS.keys()


# ---- ~ ---------------------------------------------------------------------------------------------------------------

PATHS = {
    "train": {"words": "~/r.yaml", "--data": "~/d", "--run-dir": "~/run"},
    "eval": {
        "words": "~/run",
        "--data": "~/d",
        "--classes": "~/c",
        "--confusion": "~/c",
        "--calibration": "~/c",
        "--images": "~/i",
    },
    "predict": {"words": "~/run"},
    "show attention": {"words": "~/run", "--out": "~/a.png"},
    "export": {"words": "~/run"},
    "plan": {"words": "~/r.yaml"},
    "recipes show": {"words": "~/r.yaml"},
    "data check": {"path": "~/d"},
    "data pack": {"path": "~/d", "out": "~/packed"},
    "data show": {"words": "~/r.yaml", "--data": "~/d", "--out": "~/a.png"},
    "data preview": {"words": "~/r.yaml", "--data": "~/d", "--out": "~/a.png"},
    "data make": {"name": "glyphs", "--from": "~/packages", "--out": "~/glyphs"},
    "kernels lint": {"--json": "~/facts"},
    "kernels bench": {"--out": "~/rows"},
    "bench step": {"--out": "~/rows"},
    "bench train": {"--recipe": "~/r.yaml", "--out": "~/rows"},
    "bench data": {"--recipe": "~/r.yaml", "--out": "~/rows"},
    "bench suite": {"--out": "~/rows"},
    "bench report": {"folder": "~/docs", "--results": "~/rows"},
}


@pytest.mark.parametrize("name", PATHS)
def test_a_home_folder_is_expanded_wherever_a_path_is_taken(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    argv = [part for flag, text in PATHS[name].items() for part in ([flag] if flag[0] == "-" else []) + [text]]
    args = cli.VERBS[name].parse([*argv, *(["--sample", "1"] if name == "data show" else [])])
    said = str(vars(args))
    assert "~" not in said
    assert said.count("/home/me/") >= sum("~" in text for text in PATHS[name].values())


def test_every_argument_that_names_a_file_or_folder_is_a_path():
    """`words` and the address of weights are expanded by the verb."""
    for name, verb in cli.VERBS.items():
        for action in verb.parser._actions:
            if action.metavar in ("DIR", "FILE", "PATH", "OUT", "PICTURE"):
                assert action.type is cli.parser.path, f"{name} {action.dest}"


def test_a_home_folder_in_a_recipe_and_in_an_override(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text(recipes.text("deit_tiny"))
    (tmp_path / "mine.yaml").write_text("base: ~/base.yaml\ndata: {root: ~/images}\nmodel: {weights: ~/run@best}\n")
    loaded = recipes.load("~/mine.yaml")
    assert (loaded.data.root, loaded.model.weights) == (f"{tmp_path}/images", f"{tmp_path}/run@best")
    assert recipes.load("deit_tiny", ["data.root=~/x"]).data.root == f"{tmp_path}/x"
    teacher = ["method.teacher.timm=regnety_160", "method.teacher.weights=~/t.pth"]
    assert recipes.load("deit_tiny_distilled", teacher).method.teacher[0].weights == f"{tmp_path}/t.pth"


def test_a_home_folder_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FASTDEIT_CACHE", "~/c")
    (tmp_path / "c" / f"digits-{digits.VERSION}").mkdir(parents=True)
    assert digits.prepare() == Path(os.environ["HOME"]) / "c" / f"digits-{digits.VERSION}"


# ---- explain ---------------------------------------------------------------------------------------------------------


def explained(word):
    return "\n".join(explain.explained(word))


def test_a_field_is_explained():
    assert explained("data.eval_crop_ratio") == (
        "data.eval_crop_ratio\n"
        "  Side of the central crop in evaluation over the side of the resized image.\n"
        "  values     number ≥ 0.01 and ≤ 1\n"
        "  default    0.875\n"
        "  elsewhere  timm: --crop-pct\n"
        "  elsewhere  deit: --eval-crop-ratio"
    )


def test_every_field_is_explained_and_has_a_meaning():
    for section in describe.SECTIONS:
        listed = explained(section)
        for table in describe.tables(section):
            for field in table.fields:
                assert field.path in listed
                assert explained(field.path.replace("NAME", "local_0")).startswith(field.path)
                assert field.meaning or field.path.endswith(".use"), field.path


def test_what_methods_and_optimizers_have_alike_is_said_once():
    assert explained("method.smoothing").startswith("method.smoothing, with use: supervised or use: distill\n")
    assert explained("optim.momentum").startswith("optim.momentum, with name: sgd\n")
    assert explained("optim.weight_decay").count("optim.weight_decay") == 2


def test_a_field_without_its_section_and_a_flag_of_timm():
    assert explained("crop_scale").startswith("data.crop_scale\n")
    assert "data.views.NAME.crop_scale" in explained("crop_scale")
    assert explained("drop-path").startswith(
        "drop-path, in timm's or DeiT's training script: model.drop_path=...\n\nmodel."
    )
    assert explained("--data-path").endswith("a flag of fastdeit train: --data")


def test_sections_are_listed_without_a_word(capsys):
    lines = said(capsys, "explain").splitlines()
    assert [line.split()[0] for line in lines[:7]] == list(describe.SECTIONS)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("data.crp", "did you mean data.crop"),
        ("dat", "did you mean data"),
        ("optim.lr.x", "there is no field 'optim.lr.x'; did you mean optim.lr"),
        ("", "the sections are about, model"),
        ("zzzzzzzzz", "the sections are about, model"),
    ],
)
def test_an_unknown_field_is_answered(word, hint):
    with pytest.raises(UsageError, match=r"^there is no field") as refused:
        explained(word)
    assert hint in str(refused.value)


# ---- recipes show ----------------------------------------------------------------------------------------------------


def test_a_resolved_recipe_is_one_that_can_be_loaded(capsys, tmp_path):
    argv = ["recipes", "show", "deit_base", "--resolved", "optim.lr=5e-4"]
    path = tmp_path / "deit_base.yaml"
    path.write_text(said(capsys, *argv))
    assert recipes.load(str(path)) == recipes.load("deit_base", ["optim.lr=5e-4"])
    assert "base:" not in path.read_text()


def test_overrides_of_a_file_that_is_printed_as_it_is(capsys):
    assert cli.main(["recipes", "show", "digits", "optim.lr=1"]) == 2
    assert "overrides need --resolved" in capsys.readouterr().err
