"""`fastdeit experiments list` and `experiments run`."""

import argparse
from pathlib import Path

from fastdeit.errors import UsageError
from fastdeit.experiments import page
from fastdeit.experiments.claims import CLAIMS
from fastdeit.experiments.experiment import Experiment
from fastdeit.experiments.table import EXPERIMENTS
from fastdeit.text import did_you_mean


def show_list(folder: str, must_have_rows: bool) -> None:
    """Print every experiment with its claims, its size and what lies of it in the folder, and the tested claims.

    Raises UsageError for a folder that has no rows, if it must have some.
    """
    found = page.read(Path(folder))
    if must_have_rows and not found:
        raise UsageError(
            f"{folder} has no rows of an experiment; `fastdeit experiments run NAME --out {folder}` makes some"
        )
    width = max(map(len, EXPERIMENTS))
    for name, experiment in EXPERIMENTS.items():
        seeds = len({row.seed for row in found.get(name, ())})
        claims = ", ".join(map(str, experiment.claims))
        print(f"{name:{width}}  {experiment.question}")
        print(f"{'':{width}}  claims {claims}; {len(experiment.variants)} trainings for each seed; seeds run: {seeds}")
    print("\nclaims:")
    for claim in CLAIMS:
        names = [name for name, experiment in EXPERIMENTS.items() if claim.number in experiment.claims]
        checks = [*(["tests"] if claim.tests else []), *(f"experiment {name}" for name in names)]
        print(f"{claim.number:{width}}  {claim.says} ({', '.join(checks)})")


def find(name: str) -> Experiment:
    """The experiment of that name. Raises UsageError where there is none."""
    if name not in EXPERIMENTS:
        known = f"experiments: {', '.join(EXPERIMENTS)}"
        raise UsageError(f"there is no experiment {name!r} ({known}){did_you_mean(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]


def run(args: argparse.Namespace) -> None:
    """Train what is missing, then write page, picture and index into `args.out`."""
    experiment, out = find(args.name), Path(args.out)
    from fastdeit.experiments import runner

    write(experiment, runner.run(experiment, args.seeds, out, args.overrides), out)
    print(f"page in {out / experiment.name}.md, claims in {out / page.INDEX}")


def write(experiment: Experiment, rows: list[page.Row], out: Path) -> None:
    """Page and picture of the experiment, and the index of all that lie in `out`."""
    from fastdeit.experiments import picture

    picture.draw(experiment, rows, out / f"{experiment.name}.png")
    (out / f"{experiment.name}.md").write_text(page.page(experiment, rows))
    (out / page.INDEX).write_text(page.index(page.read(out)))
