"""What does a teacher say of crops in which the object is hardly to be seen, and does that help?"""

from dataclasses import replace
from itertools import pairwise

from fastdeit.experiments.distillation import PLAIN, SHORT, TEACHER
from fastdeit.experiments.experiment import Expectation, Experiment, Term, Variant

_SMALL_CROPS = (*SHORT, "data.crop_scale=[0.08, 1.0]")
_SHARES = (100, 50, 25, 10)

CROPS = Experiment(
    name="crops",
    question="Does the teacher's answer follow what is left of the picture, and does a student that sees small crops "
    "learn more from it than from the label, which stays the same?",
    source="arXiv:2012.12877v2, section 4, 'Hard-label distillation': for a given image the hard label of the teacher "
    "may change with the crop. No number",
    variants=(
        replace(TEACHER, probes=("crops",)),
        Variant("labels", "small crops, labels alone", "digits", (*_SMALL_CROPS, PLAIN, "method={use: supervised}")),
        Variant(
            "hard",
            "small crops, labels and the teacher's answers",
            "digits",
            (*_SMALL_CROPS, PLAIN, "method.teacher=$teacher"),
        ),
    ),
    metrics={
        "top1": "top-1, %",
        **{f"crop_{share}": f"right on crops of {share} % of the picture, %" for share in _SHARES},
    },
    expectations=(
        *(
            Expectation(
                12,
                f"the teacher agrees with the label more on {large} % of the picture than on {small} %",
                Term("teacher", f"crop_{large}"),
                Term("teacher", f"crop_{small}"),
            )
            for large, small in pairwise(_SHARES)
        ),
        Expectation(12, "with small crops the teacher's answers help", Term("hard", "top1"), Term("labels", "top1")),
    ),
)
