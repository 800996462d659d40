"""How long the steps of a recipe and its whole run take on a machine: the student's, the teachers', communication.

`report.py` puts it into the rows of `fastdeit plan`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastdeit.estimate import communication
from fastdeit.estimate import interval as estimate_interval
from fastdeit.estimate import model as estimate
from fastdeit.estimate import rows as estimate_rows
from fastdeit.estimate.designs import EAGER, Design
from fastdeit.estimate.gpus import GPU
from fastdeit.estimate.machines import Machine
from fastdeit.estimate.model import Step
from fastdeit.estimate.networks import Work
from fastdeit.estimate.subject import Subject, work_of

if TYPE_CHECKING:
    from fastdeit.recipe.resolve import Recipe


def precision(recipe: "Recipe", gpu: GPU) -> str:
    """V100 has no bf16 products."""
    asked = recipe.engine.precision
    if asked in ("auto", "bf16"):
        return "fp16" if gpu.name == "V100" else "bf16"
    return asked


def work(trained: Subject, machine: Machine) -> Work:
    """What the student computes."""
    taken = precision(trained.recipe, machine.gpu)
    return work_of(trained.recipe, machine.count, taken, trained.trained, trained.kept)


def shared(trained: Subject, machine: Machine) -> dict[str, Any]:
    """What memory and communication ask of how processes share the work."""
    recipe = trained.recipe
    return {"world": machine.count, "parallel": recipe.engine.parallel, "accumulate": recipe.train.accumulate}


def run(trained: Subject, machine: Machine, design: Design, calibration: estimate_rows.Calibration) -> dict[str, Any]:
    """Seconds of a step and of the run; the calibration is of the student's computation, and of nothing else. With a
    size schedule a step is the mean over the run, and `sizes` has the steps of each size.

    drawn     the step's seconds in each draw of the shares
    interval  of these, or where the speed rests on measurements, of their rows
    """
    computed = work(trained, machine)
    unseen = replace(computed, drop_path=False, trained=None)
    stages = [(count, part, _step(part, machine, design, calibration)) for count, part in trained.stages]

    def mean(column: Callable[[dict[str, Any]], float]) -> float:
        return sum(count / trained.steps * column(step) for count, _, step in stages)

    drawn = [mean(lambda step, i=i: step["drawn"][i]) for i in range(len(stages[0][2]["drawn"]))]
    if calibration.rows:
        interval = estimate_interval.Interval(*(mean(lambda step, i=i: step["measured"][i]) for i in range(2)))
    else:
        interval = estimate_interval.interval(drawn)
    forward = calibration.factor * estimate.step(trained.student, unseen, design, machine.gpu).forward
    share = trained.held_out / (machine.count * computed.batch)
    judged = _teachers_seconds(trained, machine, design)
    not_measured = estimate_rows.NOT_CALIBRATED
    first = [run(each, machine, EAGER, not_measured) for each in trained.teacher_runs]
    own = sum(each["training"] + each["evaluation"] for each in first)
    return {
        "step": mean(lambda step: step["seconds"]),
        "sizes": [
            {"steps": count, "values": part.student.values, "seconds": step["seconds"]} for count, part, step in stages
        ],
        "drawn": drawn,
        "interval": interval,
        "teacher_step": trained.recipe.train.accumulate * mean(lambda step: step["judged"]),
        "communication": {
            name: mean(lambda step, name=name: step["communication"][name]) for name in stages[0][2]["communication"]
        },
        "training": sum(count * step["seconds"] for count, _, step in stages),
        # The teacher is evaluated once, before the first step.
        "evaluation": share * (trained.evaluations * (1 + computed.ema) * forward + judged),
        "teacher": own,
    }


def _step(part: Subject, machine: Machine, design: Design, calibration: estimate_rows.Calibration) -> dict[str, Any]:
    """Seconds of a step with the images of `part`, which has one size: modelled, in each draw of the shares, and by the
    slowest and the fastest of the rows that measure it; seconds of the teachers in a micro-batch, and what is sent."""
    recipe, gpu, computed = part.recipe, machine.gpu, work(part, machine)
    time = estimate.step(part.student, computed, design, gpu)
    judged = _teachers_seconds(part, machine, design)
    ring = {"nodes": machine.nodes, "reduced": 4 if recipe.engine.reduce == "fp32" else 2}
    scaled = time.scaled(calibration.factor)
    spent = communication.of_step(part.student, scaled, gpu, computed, **shared(part, machine), **ring)

    def whole(time: Step) -> float:
        return recipe.train.accumulate * (time.forward + time.backward + judged) + time.update + spent.exposed

    draws = estimate_interval.steps(part.student, computed, design, gpu)
    return {
        "seconds": whole(scaled),
        "drawn": [whole(draw.scaled(calibration.factor)) for draw in draws],
        "measured": [whole(time.scaled(end)) for end in (calibration.low, calibration.high)],
        "judged": judged,
        "communication": spent._asdict(),
    }


def _teachers_seconds(part: Subject, machine: Machine, design: Design) -> float:
    """Of the forward of all teachers in a micro-batch."""
    unseen = replace(work(part, machine), drop_path=False, trained=None)
    return sum(
        estimate.step(teacher, unseen, design if teacher.own and teacher.vit else EAGER, machine.gpu).forward
        for teacher in part.teachers
    )
