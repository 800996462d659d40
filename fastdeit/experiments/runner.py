"""`fastdeit experiments run`: train every variant with every seed, one after the other, in this process.

A row is written as soon as a training is done, and what has a row is not trained again. So an experiment that was
interrupted, or that is wanted with more seeds, goes on where it was.
"""

import shlex
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from fastdeit import training
from fastdeit.data.sources import digits
from fastdeit.errors import Interrupted
from fastdeit.experiments import probes, rows
from fastdeit.experiments.experiment import Experiment, Variant
from fastdeit.experiments.rows import Row
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build, directory
from fastdeit.run.weights import network, open_weights


def run(experiment: Experiment, seeds: int, out: Path, overrides: Sequence[str] = ()) -> list[Row]:
    """Train what has no row yet in `out`/NAME.jsonl, for the seeds 0 to `seeds` - 1, and return all rows.

    The runs lie in `out`/NAME, with all that they say in a file beside each. Raises UsageError where the rows are of
    other settings, RecipeError for overrides that do not fit, Interrupted after a signal.
    """
    path = out / f"{experiment.name}.jsonl"
    found = rows.read(path)
    rows.check(path, found, experiment, overrides)
    for variant in experiment.variants:  # before hours are spent on the first of them
        recipe_of(variant, overrides, 0, {name: Path(name) for name in variant.needs})
    command = ["fastdeit", "experiments", "run", experiment.name, "--seeds", str(seeds), "--out", str(out), *overrides]
    done = {(row.variant, row.seed) for row in found}
    (out / experiment.name).mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        missing = {each.name for each in experiment.variants if (each.name, seed) not in done}
        runs = {each.name: out / experiment.name / f"{each.name}-seed{seed}" for each in experiment.variants}
        for variant in experiment.variants:
            gone = directory.finished(runs[variant.name]) is None and _is_needed(variant, experiment, missing)
            if variant.name not in missing and not gone:
                continue
            row = _train(variant, overrides, seed, runs, f"`{shlex.join(command)}`")
            if variant.name in missing:
                rows.append(path, row)
                found.append(row)
                shown = f"top-1 {row.metrics['top1']:.2f} %"
                print(f"{experiment.name}: {variant.name}, seed {seed} of {seeds}: {shown}", flush=True)
    return found


def recipe_of(variant: Variant, overrides: Sequence[str], seed: int, runs: dict[str, Path]) -> recipes.Recipe:
    """The recipe of a variant, whose overrides come before those of the command. RecipeError where it is none."""
    places = {name: str(path.absolute()) for name, path in runs.items()}
    if "digits" in variant.needs:
        places["digits"] = str(digits.prepare())
    return recipes.override(recipes.load(variant.recipe, variant.words(places)), [*overrides, f"train.seed={seed}"])


def _is_needed(variant: Variant, experiment: Experiment, missing: set[str]) -> bool:
    """Whether a variant that has no row yet reads the run of `variant`."""
    users = [each for each in experiment.variants if variant.name in each.needs]
    return any(each.name in missing or _is_needed(each, experiment, missing) for each in users)


def _train(variant: Variant, overrides: Sequence[str], seed: int, runs: dict[str, Path], again: str) -> Row:
    """Train and measure one variant; `again` is the command to go on with."""
    recipe, place = recipe_of(variant, overrides, seed, runs), runs[variant.name]
    log = place.with_suffix(".log")
    with open(log, "a") as said, redirect_stdout(said):
        try:
            summary = training.alone(recipe, place, resume=True)
        except Interrupted as error:
            raise Interrupted(f"stopped in {place}; everything is saved, go on with {again}") from error
        measured = probes.measure(variant.probes, probes.Trained(recipe, place, runs))
        images = [len(source) for source in build.sources(recipe)]
        parameters = sum(each.numel() for each in network(open_weights(str(place))).parameters())
    top1 = [(name, value) for name, value in summary.items() if name.startswith("top1_")]
    facts = {
        "parameters": parameters,
        "training_images": images[0],
        "held_out_images": images[1],
        "steps": summary["steps"],
        "batch_size": recipe.train.batch_size,
    }
    metrics = {"top1": top1[0][1], **dict(top1), **measured}
    return Row(variant.name, seed, rows.settings(variant, overrides), metrics, facts)
