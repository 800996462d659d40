"""Does distillation help, which kind of it, and does the distillation token?"""

from dataclasses import replace

from fastdeit.experiments.experiment import Expectation, Experiment, Term, Variant

SHORT = ("train.epochs=10", "train.batch_size=64", "optim.lr=1.5e-3", "optim.warmup_epochs=1", "train.eval_every=10")
"""A training of the digits that costs some 20 seconds of one core."""
PLAIN = "model.name=deit_digits_patch8_32"
TEACHER = Variant("teacher", "the convolutional teacher", "digits_teacher")
NONE = Variant("none", "no teacher", "digits", (*SHORT, PLAIN, "method={use: supervised}"))
TOKEN = Variant("token", "hard, with the distillation token", "digits", (*SHORT, "method.teacher=$teacher"))
_MEASURED = ("shifts", "teacher")


def _class_alone(name: str, says: str, *overrides: str) -> Variant:
    return Variant(name, says, "digits", (*SHORT, PLAIN, "method.teacher=$teacher", *overrides), _MEASURED)


DISTILLATION = Experiment(
    name="distillation",
    question="Is hard distillation better than soft, with the distillation token better than without, and both heads "
    "better than one? Does the student take over how the teacher treats shifted images?",
    source="arXiv:2012.12877v2, section 5.2, table 3. DeiT-Ti: 72.2 without a teacher, 72.2 soft, 74.3 hard, 74.5 with "
    "the token; DeiT-B: 81.8, 81.8, 83.0, 83.4",
    variants=(
        TEACHER,
        replace(NONE, probes=_MEASURED),
        _class_alone(
            "soft_public",
            "soft, as the public code divides (tau 1, alpha 0.5, by images times classes)",
            "method.distillation=soft",
            "method.tau=1.0",
            "method.alpha=0.5",
            "method.reduction=numel",
        ),
        _class_alone(
            "soft_paper",
            "soft, as the paper has it (tau 3, lambda 0.1, by images)",
            "method.distillation=soft",
            "method.tau=3.0",
            "method.alpha=0.1",
            "method.reduction=batchmean",
        ),
        _class_alone("hard", "hard, through the class token"),
        replace(TOKEN, probes=_MEASURED),
    ),
    metrics={
        "top1": "top-1, %",
        "top1_class": "class head, %",
        "top1_distillation": "distillation head, %",
        "teacher_agreement": "same answer as the teacher, %",
        "shift_agreement": "same answer after a shift, %",
    },
    expectations=(
        Expectation(10, "hard beats soft (paper's scaling)", Term("hard", "top1"), Term("soft_paper", "top1")),
        Expectation(10, "hard beats soft (public scaling)", Term("hard", "top1"), Term("soft_public", "top1")),
        Expectation(10, "hard beats no teacher", Term("hard", "top1"), Term("none", "top1")),
        Expectation(16, "the token beats hard without it", Term("token", "top1"), Term("hard", "top1")),
        Expectation(16, "the token beats soft (paper's scaling)", Term("token", "top1"), Term("soft_paper", "top1")),
        Expectation(
            20, "both heads are as good as the class head", Term("token", "top1"), Term("token", "top1_class"), 0.1
        ),
        Expectation(
            20,
            "both heads are as good as the distillation head",
            Term("token", "top1"),
            Term("token", "top1_distillation"),
            0.1,
        ),
        Expectation(
            20,
            "the distillation head beats the class head",
            Term("token", "top1_distillation"),
            Term("token", "top1_class"),
        ),
        Expectation(
            28,
            "a distilled student answers more as its teacher does",
            Term("token", "teacher_agreement"),
            Term("none", "teacher_agreement"),
        ),
        Expectation(
            28,
            "a distilled student keeps its answer under shifts",
            Term("token", "shift_agreement"),
            Term("none", "shift_agreement"),
        ),
    ),
)
