"""Does a model that knows half of the classes learn the other half faster?"""

from fastdeit.experiments.distillation import PLAIN, SHORT
from fastdeit.experiments.experiment import Expectation, Experiment, Term, Variant

_DATA = ("data.source='fastdeit.experiments.halves:open_half'", "data.root=$digits")
_FIRST = (*_DATA, "data.train=train/first", "data.val=val/first")
_SECOND = (*_DATA, "data.train=train/second", "data.val=val/second")
_TUNED = (
    PLAIN,
    "method={use: supervised}",
    "train.epochs=4",
    "train.batch_size=64",
    "train.eval_every=4",
    "optim.lr=5e-4",
    "optim.warmup_epochs=0",
)

TRANSFER = Experiment(
    name="transfer",
    question="After as many steps on the second half of the classes, is a model better that was trained on the first "
    "half before?",
    source="arXiv:2012.12877v2, section 5.4, table 7. DeiT-B after ImageNet: CIFAR-10 99.1, CIFAR-100 90.8, Flowers "
    "98.4, Cars 92.1, iNaturalist 18 73.2, 19 77.7",
    variants=(
        Variant(
            "first_half", "classes of the first half", "digits", (*SHORT, PLAIN, *_FIRST, "method={use: supervised}")
        ),
        Variant("scratch", "second half, from random weights", "digits", (*_TUNED, *_SECOND)),
        Variant(
            "transfer",
            "second half, from the weights of the first",
            "digits",
            (*_TUNED, *_SECOND, "model.weights=$first_half"),
        ),
    ),
    metrics={"top1": "top-1, %"},
    expectations=(
        Expectation(
            26, "a model that was trained on other classes is better", Term("transfer", "top1"), Term("scratch", "top1")
        ),
    ),
)
