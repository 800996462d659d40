"""Claims of "Training data-efficient image transformers & distillation through attention" (arXiv:2012.12877v2), and
what checks each of them here.

What follows from the code is held by tests. What is a comparison of trainings is an experiment, which says how sure it
is. Numbers are those of a list of 28 claims; those that need ImageNet or a machine for themselves are not in it.
"""

from dataclasses import dataclass

SOFT = "section 4, 'Soft distillation'"
HARD = "section 4, 'Hard-label distillation'"
TOKEN = "section 4, 'Distillation token'"
FUSION = "section 4, 'Classification with our approach: joint classifiers'"
OVERVIEW = "section 3"

_METHODS = "tests/methods/test_methods.py"
_MECHANISMS = "tests/experiments/test_mechanisms.py"
_LOSSES = "tests/methods/test_losses_py.py::test_a_combination_is_that_of_the_public_code"
_FORMULA = f"{_METHODS}::test_distillation_formula"


@dataclass(frozen=True)
class Claim:
    """A claim, where the paper makes it, and the tests that hold it. Experiments say which claims they are about."""

    number: int
    says: str
    where: str
    tests: tuple[str, ...] = ()


CLAIMS: tuple[Claim, ...] = (
    Claim(
        4,
        "The distillation token plays the class token's part, and learns the teacher's answer",
        TOKEN,
        (f"{_MECHANISMS}::test_each_head_learns_from_its_own_teacher_where_the_teacher_swaps_classes",),
    ),
    Claim(
        5,
        "Class and distillation token act on each other through attention",
        TOKEN,
        (f"{_MECHANISMS}::test_the_tokens_read_each_other_through_attention",),
    ),
    Claim(8, "Soft distillation is (1 - lambda) CE + lambda tau^2 KL", SOFT, (_FORMULA, _LOSSES)),
    Claim(
        9, "Hard distillation is CE / 2 with the label and CE / 2 with the teacher's answer", HARD, (_FORMULA, _LOSSES)
    ),
    Claim(10, "Hard distillation is better than soft, through the class token as well", "section 5.2, table 3"),
    Claim(
        12,
        "The teacher's answer follows the crop, the label does not",
        HARD,
        (f"{_METHODS}::test_teacher_is_shown_the_student_image_in_its_own_normalisation",),
    ),
    Claim(
        13,
        "Labels are smoothed by 0.1, the teacher's answers are not",
        HARD,
        (f"{_METHODS}::test_supervised_is_cross_entropy_with_mixed_targets", _FORMULA),
    ),
    Claim(
        14,
        "Class and distillation token come nearer from layer to layer and stay different: cosine 0.06 to 0.93",
        TOKEN,
    ),
    Claim(15, "Two class tokens become the same (cosine 0.999) and bring no accuracy", TOKEN),
    Claim(16, "Distillation through the token is better than usual distillation", "section 5.2, table 3"),
    Claim(
        17,
        "Fine-tuning at a higher resolution with labels and teacher is better than with labels",
        "section 4, 'Fine-tuning with distillation'",
        (
            "tests/methods/test_teachers.py"
            "::test_a_distilled_model_is_fine_tuned_at_a_higher_resolution_with_its_teacher",
        ),
    ),
    Claim(
        18,
        "Bicubic interpolation nearly keeps the norm of the positions, bilinear does not",
        "section 6, 'Fine-tuning at different resolution'",
        (f"{_MECHANISMS}::test_bicubic_interpolation_keeps_more_of_the_norm_than_bilinear",),
    ),
    Claim(
        19,
        "At test time the softmaxes of both heads are added",
        FUSION,
        (
            f"{_METHODS}::test_fusing_two_heads",
            "tests/run/test_classification.py::test_every_score_of_two_heads_is_judged_and_the_answer_comes_first",
        ),
    ),
    Claim(20, "Both heads together are better than each alone, and the distillation head than the class head", FUSION),
    Claim(
        21,
        "The class token alone feeds the classifier",
        OVERVIEW,
        (f"{_MECHANISMS}::test_only_the_prefix_tokens_reach_the_heads",),
    ),
    Claim(
        22,
        "The distillation token adds a token, its position and a linear head",
        TOKEN,
        (
            f"{_MECHANISMS}::test_the_distillation_token_costs_a_token_a_position_and_a_head",
            "tests/models/test_timm_parity.py::test_parameter_counts_are_the_published_ones",
        ),
    ),
    Claim(26, "What was learned transfers to other classes", "section 5.4, table 7"),
    Claim(28, "A student takes over how its teacher treats images", "section 5.2, table 4"),
)
