"""Fine-tuning at a higher resolution: with labels alone, or with the teacher as well, and at which size it looks."""

from fastdeit.experiments.distillation import TEACHER, TOKEN
from fastdeit.experiments.experiment import Expectation, Experiment, Term, Variant

_TUNED = (
    "model.weights=$start",
    "model.image_size=48",
    "train.epochs=4",
    "train.batch_size=64",
    "train.eval_every=4",
    "optim.lr=3e-4",
    "optim.warmup_epochs=0",
)

RESOLUTION = Experiment(
    name="resolution",
    question="Does a distilled model that is fine-tuned at one and a half times its resolution need its teacher there, "
    "and does the teacher have to see that resolution? How much do bicubic positions save?",
    source="arXiv:2012.12877v2, section 4, 'Fine-tuning with distillation', and section 6, 'Fine-tuning at different "
    "resolution'. DeiT-B at 384 pixels: 84.5 with the teacher, 84.0 hard without the token, 83.1 without a teacher",
    variants=(
        TEACHER,
        Variant("start", "distilled at 32 pixels, not fine-tuned", TOKEN.recipe, TOKEN.overrides, ("positions",)),
        Variant("labels", "fine-tuned at 48 pixels on labels", "digits", (*_TUNED, "method={use: supervised}")),
        Variant(
            "teacher_32",
            "fine-tuned at 48 pixels, the teacher sees 32",
            "digits",
            (*_TUNED, "method.teacher=$teacher"),
        ),
        Variant(
            "teacher_48",
            "fine-tuned at 48 pixels, the teacher sees 48",
            "digits",
            (*_TUNED, "method={use: distill, teacher: {recipe: null, weights: $teacher, image_size: 48}}"),
        ),
    ),
    metrics={
        "top1": "top-1, %",
        "top1_bicubic": "before fine-tuning, bicubic positions, %",
        "top1_bilinear": "before fine-tuning, bilinear positions, %",
        "norm_bicubic": "norm of the positions, bicubic",
        "norm_bilinear": "norm of the positions, bilinear",
    },
    expectations=(
        Expectation(
            17,
            "with the teacher it is better than with labels alone",
            Term("teacher_48", "top1"),
            Term("labels", "top1"),
        ),
        Expectation(
            17, "the teacher is better at the student's size", Term("teacher_48", "top1"), Term("teacher_32", "top1")
        ),
        Expectation(
            18,
            "bicubic positions keep their norm better",
            Term("start", "norm_bicubic"),
            Term("start", "norm_bilinear"),
        ),
        Expectation(
            18,
            "before fine-tuning bicubic positions are at least as good",
            Term("start", "top1_bicubic"),
            Term("start", "top1_bilinear"),
            0.1,
        ),
    ),
)
