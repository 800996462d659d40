"""`--as NAME`: settings that go together, laid over a recipe between the recipe and the command's own overrides."""

import pytest

from fastdeit import cli
from fastdeit.cli import VERBS
from fastdeit.recipe import differences, overlays
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.overlays import OVERLAYS
from fastdeit.run import build
from fastdeit.verbs import dry_run

# Recipes whose fields an overlay is made for.
FITTING = {name: "augreg_small" if name.startswith("augreg") else "deit_base_distilled" for name in OVERLAYS}


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_setting_is_what_the_recipe_then_says(name):
    """A name or a value that no recipe knows is refused by `load`; a setting that changes nothing is none."""
    recipe = FITTING[name]
    loaded = recipes.load(recipe, overlays.overrides(recipe, [name], []))
    for setting in OVERLAYS[name].settings:
        if setting.where(recipes.load(recipe)):
            assert recipes.override(loaded, [f"{setting.field}={setting.value}"]) == loaded


def test_public_code_changes_what_the_header_lists():
    lines = [*overlays.differences("deit_base_distilled", ["public-code"], [])]
    differs = [one.field for one in differences.of(recipes.load("deit_base_distilled")) if one.field]
    assert sorted(line.split(" ")[2] for line in lines) == sorted(differs)
    assert overlays.overrides("deit_base_distilled", ["public-code"], []) == [
        "optim.schedule=deit-exact",
        "optim.decay_dist_token=true",
        "optim.ema_decay=0.99996",
        "method.fuse=logit",
        "engine.precision=fp16",
    ]
    assert lines[0].startswith("--as public-code: method.fuse is 'logit', in the recipe 'softmax': ")
    left = recipes.load("deit_base_distilled", overlays.overrides("deit_base_distilled", ["public-code"], []))
    assert differences.lines(left)[0] == "differs from DeiT's public code in 11 points:"


def test_what_the_recipe_has_already_is_no_difference():
    lines = [*overlays.differences("deit_tiny", ["public-code"], ["optim.schedule=deit-exact"])]
    assert lines
    assert not any("optim.schedule" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        ("deit_tiny", "engine.precision=auto", ("engine.precision", "bf16 on a GPU that has it")),
        ("deit_tiny", "engine.precision=fp32", ("engine.precision", "fp32")),
        ("deit_tiny", "optim.ema_decay=0.9999", ("optim.ema_decay", "the average has a decay of its own")),
        ("deit_tiny_distilled", "method.fuse=class", ("method.fuse", "two heads: the class head alone")),
        ("deit_tiny", "model.dropout=0.1", ("dropout", "before the heads")),
        ("deit_tiny_soft", "method.alpha=0.2", ("distillation", "one head learns from label and teacher")),
        ("deit3_base", "optim.clip_grad=0.5", ("clipping with LAMB", "gradients times limit / (norm + 1e-6)")),
        ("deit3_base", "optim.clip_grad=null", None),
        ("vitc_1gf", "optim.ema_decay=null", None),
        ("vitc_1gf", "data.augment=none", None),
        ("vitc_1gf", "data={mixup: 0, cutmix: 0}", None),
        ("augreg_small", "data.augment=v0", None),
    ],
)
def test_a_difference_is_told_as_the_setting_is(name, override, said):
    """What a setting that is laid over the recipe's makes untrue is not told."""
    told, before = (list(differences.of(recipes.load(name, words))) for words in ([override], []))
    if said is None:
        assert set(told) < set(before)
    else:
        assert [(one.subject, one.ours) for one in told if one.subject == said[0]] == [said]


@pytest.mark.parametrize("name", [name for name in recipes.names() if recipes.load(name).about.follows])
def test_differences_are_a_table_that_fits_a_window(name):
    recipe = recipes.load(name)
    title, heads, *rows = differences.lines(recipe)
    assert f" in {len(rows)} points" in title
    assert [" ".join(row.split()) for row in rows] == [
        f"{one.subject} {one.ours} {one.theirs}" for one in differences.of(recipe)
    ]
    here, there = heads.index("here"), heads.index("there")
    assert all(row[here - 1] == row[there - 1] == " " and " " not in (row[here], row[there]) for row in rows)
    assert max(map(len, rows)) <= 124


def test_the_command_s_own_overrides_win():
    texts = overlays.overrides("deit_tiny", ["public-code"], ["engine.precision=fp32"])
    assert not any(text.startswith("engine.precision") for text in texts)
    assert "optim.schedule=deit-exact" in texts


def test_overlays_add_up_or_are_refused():
    both = overlays.overrides("augreg_small", ["augreg-light2", "augreg-regularised"], [])
    assert both == ["data.augment=augreg-light2", "data.mixup=0.2", "model.drop_path=0.1", "model.dropout=0.1"]
    assert overlays.overrides("augreg_small", ["augreg-light2"] * 2, []) == both[:2]
    with pytest.raises(recipes.RecipeError, match="--as augreg-none and --as augreg-light2 do not go together"):
        overlays.overrides("augreg_small", ["augreg-light2", "augreg-none"], [])


def test_beside_a_whole_section():
    section = "method={use: distill, teacher: runs/x}"
    with pytest.raises(recipes.RecipeError) as refused:
        overlays.overrides("deit_tiny_distilled", ["public-code"], ["optim.lr=1", section])
    assert str(refused.value) == (
        f"--as public-code sets method.fuse, but {section!r} sets the whole section; give its fields one by one, as in "
        "method.fuse=VALUE"
    )
    assert overlays.overrides("augreg_small", ["augreg-none"], ["method={use: supervised}"])


def test_a_student_with_one_head_is_distilled_as_by_the_public_code():
    """Its one head is its answer, whatever the overlay says of two."""
    recipe = recipes.load("deit_tiny_soft", overlays.overrides("deit_tiny_soft", ["public-code"], []))
    student = build.model(recipes.override(recipe, ["model.image_size=32"]), 10, print)
    build.method(recipe, student, 10, 1, lambda config: None)


def test_a_name_that_is_none():
    with pytest.raises(recipes.RecipeError, match="there is no such overlay; did you mean public-code"):
        overlays.overrides("deit_tiny", ["public_code"], [])
    with pytest.raises(recipes.RecipeError, match="there are public-code, augreg-none"):
        overlays.overrides("deit_tiny", ["xyz"], [])


def test_recipes_show(capsys):
    assert cli.main(["recipes", "show", "deit_tiny", "--resolved", "--as", "public-code"]) == 0
    assert "schedule: deit-exact" in capsys.readouterr().out
    assert cli.main(["recipes", "show", "deit_tiny", "--as", "public-code"]) == 2
    assert "--as public-code needs --resolved" in capsys.readouterr().err


def test_train_says_each_difference(capsys):
    words = ["train", "deit_base", "--as", "public-code", "data.source=synthetic", "engine.precision=fp32", "--dry-run"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert (
        "--as public-code: optim.schedule is 'deit-exact', in the recipe 'cosine': every epoch, one late; cosine from"
        in out
    )
    told = out.partition("differs from DeiT's public code in 12 points, ")[2].partition("estimate")[0]
    assert "  RandAugment            Posterize keeps at least 1 bit " in told
    assert "optim.schedule" not in told  # it is as theirs now
    assert "engine.precision" not in out.partition("--as")[0] + out[out.rindex("--as public-code") :].partition("\n")[0]


@pytest.mark.parametrize("words", [["--resume", "x"], ["--from", "x"], ["--run-dir", "x", "--resume"]])
def test_a_run_that_is_there_has_its_recipe(words, capsys):
    assert cli.main(["train", "--as", "public-code", *words]) == 2
    assert "--as public-code is laid over a recipe, and none is named here" in capsys.readouterr().err


def test_a_recipe_that_is_given_again_is_laid_over_again(tmp_path, monkeypatch, capsys):
    """So a job that is started again and again has one command: it begins the run, and goes on with it."""
    recipe, run = recipes.load("digits", overlays.overrides("digits", ["public-code"], [])), tmp_path / "run"
    (run / "teacher" / "checkpoints" / "step_00000001").mkdir(parents=True)  # begun: the run is there
    (run / "recipe.yaml").write_text(recipes.dump(recipe))
    asked = []
    monkeypatch.setattr(dry_run, "show", lambda request, processes: asked.append(request))
    words = ["train", "digits", "--run-dir", str(run), "--resume", "--dry-run"]
    assert cli.main([*words, "--as", "public-code"]) == 0
    assert asked[0].resume
    assert asked[0].recipe.optim == recipe.optim
    assert cli.main(words) == 2
    assert "optim.schedule: the run has 'deit-exact', asked for 'cosine'" in capsys.readouterr().err


def test_the_parsers_know_the_flag():
    for verb in ("train", "plan", "recipes show"):
        assert VERBS[verb].parse(["deit_tiny", "--as", "public-code", "--as", "augreg-none"]).overlays == [
            "public-code",
            "augreg-none",
        ]
