"""The pages of the experiments, Markdown made of rows alone: one for each experiment, and the index of all claims."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastdeit.experiments import rows as files
from fastdeit.experiments.claims import CLAIMS, Claim
from fastdeit.experiments.experiment import Experiment, Term, Variant
from fastdeit.experiments.rows import Row
from fastdeit.experiments.statistics import Finding, Interval, interval, judge, values
from fastdeit.experiments.table import EXPERIMENTS

INDEX = "index.md"
_HOW = (
    "Intervals are 95 % intervals by Student's t over seeds. Differences are taken seed by seed, because variants with "
    "one seed see the same images in the same order. No interval is corrected for the number of comparisons. *Shown* "
    "means that the whole interval fulfils the condition, *the opposite is shown* that none of it does. What is not "
    "shown at this scale may be true at another: networks, data and trainings are far smaller than the paper's."
)


def page(experiment: Experiment, rows: Sequence[Row]) -> str:
    """The page of an experiment of which there is at least one row."""
    command = " ".join(("fastdeit experiments run", experiment.name, *given(experiment, rows)))
    lines = [
        f"# {experiment.name}",
        "",
        experiment.question,
        "",
        f"Source: {experiment.source}.",
        "",
        *_conditions(experiment, rows),
        "",
        *_measured(experiment, rows),
        "",
        f"![Means with their intervals, a dot for each seed]({experiment.name}.png)",
        "",
        "## What is expected, and what came out",
        "",
        *_expected(experiment, rows),
        "",
        _HOW,
        "",
        f"`{command}` has written this page from {experiment.name}.jsonl.",
    ]
    return "\n".join(lines) + "\n"


def _conditions(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    """Sizes, seeds and overrides, as the rows have them."""
    seeds = sorted({row.seed for row in rows})
    found = [f"Seeds: {', '.join(map(str, seeds))}."]
    if changed := given(experiment, rows):
        found.append(f"Changed by the command: `{' '.join(changed)}`.")
    lines = [" ".join(found), "", "| variant | recipe and overrides | parameters | images | steps | batch |"]
    lines.append("|---|---|---|---|---|---|")
    for variant in experiment.variants:
        facts = next((row.facts for row in rows if row.variant == variant.name), None)
        if facts is not None:
            words = " ".join((variant.recipe, *variant.overrides)).replace("|", "\\|")
            images = f"{facts['training_images']:,} + {facts['held_out_images']:,}"
            sizes = f"{facts['parameters']:,} | {images} | {facts['steps']:,} | {facts['batch_size']}"
            lines.append(f"| {variant.name} | `{words}` | {sizes} |")
    return lines


def given(experiment: Experiment, rows: Sequence[Row]) -> tuple[str, ...]:
    """The overrides of the command, which stand behind the variant's own."""
    row = rows[0]
    variant = next(each for each in experiment.variants if each.name == row.variant)
    return row.overrides[len(variant.overrides) :]


def _measured(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    names = list(experiment.metrics)
    lines = [f"| variant | what it is | {' | '.join(experiment.metrics.values())} | seeds |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for variant in experiment.variants:
        count = sum(row.variant == variant.name for row in rows)
        cells = [_cell(rows, variant, name) for name in names]
        lines.append(f"| {variant.name} | {variant.says} | {' | '.join(cells)} | {count} |")
    return lines


def _cell(rows: Sequence[Row], variant: Variant, metric: str) -> str:
    found = list(values(rows, Term(variant.name, metric)).values())
    return shown(interval(found)) if found else ""


def shown(found: Interval) -> str:
    """`mean ± half`, of one value the value alone; accuracies have two digits behind the point, small numbers four."""
    digits = 2 if abs(found.mean) >= 1 else 4
    return f"{found.mean:.{digits}f}" + ("" if found.half is None else f" ± {found.half:.{digits}f}")


def _expected(experiment: Experiment, rows: Sequence[Row]) -> list[str]:
    lines = ["| claim | expected | condition | difference | 95 % interval | found |", "|---|---|---|---|---|---|"]
    for expectation in experiment.expectations:
        found = judge(expectation, rows)
        start = f"| {expectation.claim} | {expectation.says} | {expectation.formula} |"
        lines.append(f"{start} {_difference(found)} | {found.verdict} |")
    return lines


def _difference(found: Finding) -> str:
    difference = found.difference
    if difference is None:
        return " | "
    if difference.low is None:
        return f"{difference.mean:+.4g} | one seed"
    return f"{difference.mean:+.4g} | {difference.low:+.4g} to {difference.high:+.4g}"


# ---- the index -------------------------------------------------------------------------------------------------------


def index(rows: Mapping[str, Sequence[Row]]) -> str:
    """The page of all claims. rows: of each experiment that was run, by its name."""
    lines = [
        "# The paper's claims",
        "",
        "What the DeiT paper (Touvron et al., arXiv:2012.12877v2) claims, and what checks it here. A mechanism is held "
        "by a test (`pytest -m slow` runs those that train). A comparison of trainings is an experiment on small data, "
        "with seeds and confidence intervals.",
        "",
        "`fastdeit experiments run NAME` trains on the digits, which need no download. On a larger set an experiment "
        "says more: `fastdeit experiments run NAME --data FOLDER data.source=folder train.epochs=100 --out OTHER`; "
        "transfer takes `--data` alone. An experiment that was interrupted, or is run again with more `--seeds`, goes "
        "on where it was.",
        "",
        "| | claim | where | checked by | state |",
        "|---|---|---|---|---|",
        *(_line(claim, rows) for claim in CLAIMS),
        "",
        "| experiment | claims | trainings for each seed | run here |",
        "|---|---|---|---|",
    ]
    for name, experiment in EXPERIMENTS.items():
        claims = ", ".join(map(str, experiment.claims))
        seeds = len({row.seed for row in rows.get(name, ())})
        here = f"[{seeds} seeds]({name}.md)" if seeds else f"no: `fastdeit experiments run {name}`"
        lines.append(f"| {name} | {claims} | {len(experiment.variants)} | {here} |")
    return "\n".join([*lines, "", _HOW]) + "\n"


def _line(claim: Claim, rows: Mapping[str, Sequence[Row]]) -> str:
    checks, states = [f"`{test}`" for test in claim.tests], ["held by tests"] if claim.tests else []
    for name, experiment in EXPERIMENTS.items():
        about = [each for each in experiment.expectations if each.claim == claim.number]
        if about:
            checks.append(f"experiment {name}")
            found = rows.get(name, ())
            states += [f"{each.says}: {judge(each, found).verdict}" for each in about] if found else ["not run here"]
    return f"| {claim.number} | {claim.says} | {claim.where} | {'<br>'.join(checks)} | {'<br>'.join(states)} |"


def read(folder: Path) -> dict[str, list[Row]]:
    """The rows of every experiment that lie in `folder`, by its name."""
    found = {name: files.read(folder / f"{name}.jsonl") for name in EXPERIMENTS}
    return {name: each for name, each in found.items() if each}
