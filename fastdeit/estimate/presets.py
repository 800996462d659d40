"""Which preset of a whole step a trial at the start of a run is expected to choose, by the model of `fastdeit plan`.

A trial times the presets of `kernels/trial/presets.py` on the card. Here the model times those whose kernels it knows:
attention in two kernels or in one, and the MLP with GELU between its products or in their epilogues. It knows neither
the attention of libraries that repeats its bits nor what Inductor makes of a single op. That in Gluon for Hopper it
could not tell from the other kernel of one program a head, which makes the same products.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from fastdeit.estimate import model as estimate
from fastdeit.estimate.designs import Design
from fastdeit.estimate.gpus import GPU
from fastdeit.estimate.networks import Network, Work
from fastdeit.kernels.trial.presets import ALONE, PRESETS

NAME = "trial"
HELP = "the same, in the preset of kernels that a trial at the start of a run is expected to choose"
_ATTENTIONS = "triton", "fused_backward"
_MLPS = {"fused": "triton", "epilogue": "epilogue"}
"""Backend of the MLP by design, of those that the model knows."""


class Preset(NamedTuple):
    """A preset, the backends of attention and of the MLP that it comes to on a GPU, and the step in it."""

    name: str
    attention: str
    mlp: str
    design: Design

    @property
    def forms(self) -> dict[str, str]:
        """Backend by op."""
        return {"attention": self.attention, "mlp": self.mlp}

    def __str__(self) -> str:
        return f"{self.name} (attention={self.attention}, mlp={self.mlp})"


def modelled(network: Network, work: Work, designs: Iterable[Design], gpu: GPU) -> list[Preset]:
    """The presets that differ on the GPU, the fastest first; none where there is nothing to choose. designs: those of
    the network there, with the options of the run."""
    steps = _steps(designs) if gpu.triton_products and work.bytes == 2 else {}
    seconds = {forms: sum(estimate.step(network, work, design, gpu)) for forms, design in steps.items()}
    found: dict[tuple[str, str], str] = {}
    for name, forms in PRESETS.items():
        if name == ALONE or "" in forms:
            continue
        mlp = "epilogue" if "mlp" in forms else "triton"
        pairs = ((attention, mlp) for attention in forms.get("attention", _ATTENTIONS))
        if able := [pair for pair in pairs if pair in steps]:
            found.setdefault(min(able, key=seconds.__getitem__), name)
    presets = [Preset(name, *forms, steps[forms]) for forms, name in found.items()]
    return sorted(presets, key=lambda preset: seconds[preset.attention, preset.mlp])


def _steps(designs: Iterable[Design]) -> dict[tuple[str, str], Design]:
    """By the backends of attention and of the MLP, the designs that have both. Products of 8 bits have no epilogue."""
    found = {}
    for design in designs:
        mlp = _MLPS.get(design.name)
        if mlp is None or (design.fp8 and mlp != "triton"):
            continue
        for attention in _ATTENTIONS:
            found[attention, mlp] = replace(design, name=NAME, help=HELP, attention=attention, tried=True)
    return found
