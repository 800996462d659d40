"""The body of a process that the `ranks` fixture starts; a module of its own, so that the process can import it."""

import os
import traceback

import torch
import torch.distributed as dist


def be_rank(function, rank, size, rendezvous, arguments, results):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
        results.put((rank, function(rank, size, *arguments), None))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
