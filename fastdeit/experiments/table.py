"""All experiments, by name."""

from fastdeit.experiments.crops import CROPS
from fastdeit.experiments.distillation import DISTILLATION
from fastdeit.experiments.experiment import Experiment
from fastdeit.experiments.resolution import RESOLUTION
from fastdeit.experiments.tokens import TOKENS
from fastdeit.experiments.transfer import TRANSFER

EXPERIMENTS: dict[str, Experiment] = {each.name: each for each in (DISTILLATION, TOKENS, CROPS, RESOLUTION, TRANSFER)}
