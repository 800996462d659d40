"""What the processes of a training step send each other, and how much of that no computation hides.

Only the standard library is imported.
"""

from typing import NamedTuple

from fastdeit.estimate.gpus import GPU
from fastdeit.estimate.model import Step
from fastdeit.estimate.networks import Network, Work

_COLLECTIVE_SHARE = 0.8
"""Of a link, in NCCL's rings with large messages."""


class Communication(NamedTuple):
    """Bytes that a process sends in a step, the seconds that takes, and those that computation does not hide."""

    bytes: float
    seconds: float
    exposed: float


_BUCKET = 25 * 2**20
"""Bytes of gradients that DistributedDataParallel sends at once."""


def bus(gpu: GPU, world: int, nodes: int) -> float:
    """Bytes/s at which rings through all GPUs run; a ring enters and leaves a node by each adapter, one a GPU."""
    link = gpu.link if nodes == 1 else min(gpu.link, gpu.network * (world // nodes))
    return _COLLECTIVE_SHARE * link


def of_step(
    network: Network,
    time: Step,
    gpu: GPU,
    work: Work,
    *,
    world: int,
    nodes: int,
    parallel: str,
    accumulate: int,
    reduced: int = 4,
) -> Communication:
    """Of a step; `time` is that of the micro-batch `work`, and a gradient travels in `reduced` bytes.

    ddp    a ring all-reduce of the gradients: 2 (W - 1) / W of their bytes, hidden behind the backward of the last
           micro-batch but for the last bucket
    fsdp2  every micro-batch gathers the float32 weights in forward and in backward, (W - 1) / W of their bytes each;
           the last one scatters the gradients, (W - 1) / W of theirs. A block is sent while its neighbour computes, but
           for the first of each direction

    The latency of a collective, tens of microseconds, is left out.
    """
    share, rate = (world - 1) / world, bus(gpu, world, nodes)
    trained = work.of(network).parameters
    if parallel == "ddp":
        sent = 2.0 * reduced * trained * share
        last = min(1.0, _BUCKET / (4 * trained))
        return Communication(sent, sent / rate, max(sent / rate - time.backward, sent / rate * last))
    gathered, scattered = 4.0 * network.parameters * share, reduced * trained * share
    unit = 1 / network.vit.depth if network.vit else 1.0
    passes = [(gathered, time.forward)] * accumulate + [(gathered, time.backward)] * (accumulate - 1)
    passes.append((gathered + scattered, time.backward))
    sent = sum(each for each, _ in passes)
    exposed = sum(max(each / rate - busy, each / rate * unit) for each, busy in passes)
    return Communication(sent, sent / rate, exposed)
