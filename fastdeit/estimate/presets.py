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
from fastdeit.estimate.gpus import GPU
from fastdeit.estimate.model import Design, Network, Work
from fastdeit.kernels.trial.presets import ALONE, PRESETS

NAME = "trial"
HELP = "the same, in the preset of kernels that a trial at the start of a run is expected to choose"
_ATTENTIONS = "triton", "fused_backward"
_MLPS = {"triton": "fused", "epilogue": "epilogue"}
"""Of the backends of the MLP that the model knows, the designs that have them."""


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
    named = {design.name: design for design in designs}
    mlps = [mlp for mlp, design in _MLPS.items() if design in named and not (named[design].fp8 and mlp != "triton")]
    if not mlps or not gpu.triton_products or work.bytes != 2:
        return []
    steps = {
        (attention, mlp): replace(named[_MLPS[mlp]], name=NAME, help=HELP, attention=attention, tried=True)
        for attention in _ATTENTIONS
        for mlp in mlps
    }
    seconds = {forms: sum(estimate.step(network, work, design, gpu)) for forms, design in steps.items()}
    found: dict[tuple[str, str], str] = {}
    for name, forms in PRESETS.items():
        attention, mlp = (forms.get(op, ()) for op in ("attention", "mlp"))
        able = [
            pair
            for pair in steps
            if (pair[0] in attention or not attention) and pair[1] == ("epilogue" if mlp else "triton")
        ]
        if name != ALONE and "" not in forms and able:
            found.setdefault(min(able, key=seconds.__getitem__), name)
    presets = [Preset(name, *forms, steps[forms]) for forms, name in found.items()]
    return sorted(presets, key=lambda preset: seconds[preset.attention, preset.mlp])
