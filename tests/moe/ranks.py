"""Several processes for a test."""

import datetime
import multiprocessing
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(play, world_size, folder, *args):
    """What ``play(rank, world_size, *args)`` gives on each of some ranks."""
    # This process has imported everything. Where it may have used a GPU, or autograd's threads
    # for one, another one that has is forked instead.
    method = 'forkserver' if torch.cuda.is_available() else 'fork'
    multiprocessing.set_forkserver_preload(['mmdet_moe.moe', play.__module__])
    arguments = (play, world_size, str(folder), *args)
    mp.start_processes(_work, arguments, nprocs=world_size, start_method=method)
    return [torch.load(folder / f'rank{rank}.pt') for rank in range(world_size)]


def _work(rank, play, world_size, folder, *args):
    os.environ['LOCAL_RANK'] = str(rank)  # as a launcher does
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/rendezvous',
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),  # a hang becomes an error
    )
    torch.save(play(rank, world_size, *args), f'{folder}/rank{rank}.pt')
    dist.destroy_process_group()
