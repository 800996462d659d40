"""What do class and distillation token have in common, and two class tokens?"""

from dataclasses import replace

from fastdeit.experiments.distillation import NONE, SHORT, TEACHER, TOKEN
from fastdeit.experiments.experiment import Expectation, Experiment, Term, Variant

TOKENS = Experiment(
    name="tokens",
    question="Do class and distillation token come nearer to each other from layer to layer, and stay different, "
    "whereas two class tokens become the same and bring nothing?",
    source="arXiv:2012.12877v2, section 4, 'Distillation token'. Cosine of class and distillation token 0.06 at the "
    "input and 0.93 at the last layer; of two class tokens 0.999, without a gain of accuracy",
    variants=(
        TEACHER,
        NONE,
        Variant(
            "two_class_tokens",
            "two class tokens, both learn the label",
            "digits",
            (*SHORT, "method={use: 'fastdeit.experiments.two_tokens:TwoClassTokens'}"),
            ("tokens",),
        ),
        replace(TOKEN, probes=("tokens",)),
    ),
    metrics={
        "top1": "top-1, %",
        "cosine_input": "cosine at the input",
        "cosine_output": "cosine at the output",
        "cosine_least_rise": "least rise of a block",
        "cosine_centred": "centred cosine at the output",
        "disagreement": "heads disagree, %",
    },
    expectations=(
        Expectation(
            14,
            "class and distillation token come nearer between input and output",
            Term("token", "cosine_output"),
            Term("token", "cosine_input"),
        ),
        Expectation(14, "they do so in every block", Term("token", "cosine_least_rise"), 0.0),
        Expectation(
            14,
            "at the output they differ more than two class tokens do",
            Term("two_class_tokens", "cosine_output"),
            Term("token", "cosine_output"),
        ),
        Expectation(15, "two class tokens become the same", Term("two_class_tokens", "cosine_output"), 0.99),
        Expectation(15, "their heads give the same answers", 2.0, Term("two_class_tokens", "disagreement")),
        Expectation(
            15,
            "the second one changes the accuracy by less than a point",
            Term("two_class_tokens", "top1"),
            Term("none", "top1"),
            within=1.0,
        ),
    ),
)
