"""Flags of timm's and DeiT's scripts: what is typed here instead, everywhere they may be given."""

import pytest

from fastdeit import cli
from fastdeit.recipe import describe, flags
from fastdeit.recipe import resolve as recipes


def test_every_row_stands_for_a_field_or_a_flag_that_there_is():
    fields = {
        field.path for section in describe.SECTIONS for table in describe.tables(section) for field in table.fields
    }
    known = fields | set(cli.VERBS["train"].parser.flags)
    assert [flag.ours for flag in flags.FLAGS if flag.ours not in known] == []


def test_a_word_has_one_meaning():
    for who in ("timm", "deit"):
        names = [name for flag in flags.FLAGS for name in getattr(flag, who)]
        assert sorted(names) == sorted(set(names))


def test_what_is_typed_instead_is_a_recipe():
    """Where the flag has no value, the table has it, and it must be one that the field takes."""
    whole = ["method.smoothing=0", "method.loss=bce"]
    for flag in flags.FLAGS:
        if flag.value is not None:
            base = whole if flag.ours == "method.loss" else [flags.written(flag, "")]
            recipes.load("deit_tiny", ["data.source=synthetic", *base])


@pytest.mark.parametrize(
    ("argv", "typed"),
    [
        (["--epochs", "3"], "type train.epochs=3"),
        (["--epochs=3"], "type train.epochs=3"),
        (["--drop-path", "0.1"], "type model.drop_path=0.1"),
        (["--lr", "5e-4"], "type optim.lr=5e-4 (ours is used as it is: DeiT multiplies its own by"),
        (["--batch-size", "64"], "type train.batch_size=64 (theirs is of one GPU, ours of all"),
        (["--model", "deit_tiny_patch16_224"], "type model.name=deit_tiny_patch16_224 (model.timm=NAME"),
        (["--mixup", "0"], "type data.mixup=0"),
        (["--aa", "rand-m9-mstd0.5-inc1"], "type data.augment=rand-m9-mstd0.5-inc1"),
        (["--amp"], "type engine.precision=bf16"),
        (["--workers", "8"], "type data.threads=8"),
        (["--num_workers", "8"], "type data.threads=8"),
        (["-b", "64"], "type train.batch_size=64"),
        (["--layer-decay", "0.7"], "type optim.layer_decay=0.7"),
        (["--clip-mode", "agc"], "type optim.clip_mode=agc"),
        (["--drop", "0.1"], "type model.dropout=0.1"),
        (["--sync-bn"], "type engine.sync_batchnorm=true"),
        (["--grad-checkpointing"], "type engine.checkpoint_blocks=true"),
        (["--attn-only"], "type model.freeze=[all_but_attention]"),
        (["--ThreeAugment"], "type data.augment=three_augment"),
        (["--data-path", "/x"], "type --data /x"),
        (["--output_dir"], "type --run-dir ..."),
        (["--epochs", "--resume"], "type train.epochs=..."),
        (["--optim.lr", "3"], "fields of a recipe have no dashes: type optim.lr=3"),
    ],
)
def test_a_flag_of_theirs_is_answered_by_what_to_type(capsys, argv, typed):
    for verb in (["train", "digits"], ["plan", "digits"], ["eval", "runs/x"], ["bench", "data"]):
        if argv[0].strip("-") in " ".join(cli.VERBS[" ".join(verb[:1] if verb[0] != "bench" else verb)].parser.flags):
            continue
        assert cli.main([*verb, *argv]) == 2
        assert typed in capsys.readouterr().err


def test_a_verb_without_a_recipe_knows_no_fields(capsys):
    assert cli.main(["doctor", "--epochs", "3"]) == 2
    assert capsys.readouterr().err == "fastdeit: fastdeit doctor has no flag --epochs (flags: -h, --help)\n"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("wd=0.1", "did you mean optim.weight_decay=0.1?"),
        ("opt=lamb", "did you mean optim.name=lamb?"),
        ("amp=true", "did you mean engine.precision=bf16?"),
        ("workers=8", "did you mean data.threads=8?"),
        ("data.aa=none", "did you mean data.augment=none?"),
        ("train.wd=0.1", "did you mean optim.weight_decay=0.1?"),
        ("epochs=3", "did you mean train.epochs?"),
        ("drop_path=0.1", "did you mean model.drop_path?"),
        ("opt.lr=0.1", "did you mean optim"),
    ],
)
def test_a_field_of_theirs_is_answered_by_ours(override, hint):
    with pytest.raises(recipes.RecipeError) as refused:
        recipes.load("digits", [override])
    assert hint in str(refused.value)


def test_explained_from_the_other_side():
    assert flags.theirs("data.eval_crop_ratio") == ["timm: --crop-pct", "deit: --eval-crop-ratio"]
    assert flags.theirs("data.repeats")[-1] == "deit: --no-repeated-aug for 1"
    assert flags.theirs("optim.schedule") == ["timm and deit: --sched"]
    assert flags.theirs("engine.checkpoint_every") == []
