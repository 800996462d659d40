"""The body of a process that the `ranks` fixture starts; a module of its own, so that the process can import it."""

import os
import traceback

import torch
import torch.distributed as dist


def without_curves():
    """Runs of this process draw no curves from now on. Returns the module and its function that drew them."""
    from fastdeit.engine import report

    draw, report.curves = report.curves, lambda metrics, out: None
    return report, draw


def be_rank(function, rank, size, rendezvous, arguments, results):
    torch.set_num_threads(1)
    without_curves()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
        dist.barrier()  # a rank that left the group at once would cut off those that are still connecting to it
        results.put((rank, function(rank, size, *arguments), None))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
