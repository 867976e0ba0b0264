"""Two processes decode what one does."""

from __future__ import annotations

import multiprocessing
import os
import socket

import pytest
import torch
import torch.distributed as dist

from thrifty.errors import DataError, KnobError
from thrifty.llm import d5p4

V, T = 11, 12
CASES = {
    "D5P4+": (d5p4.Select(), None),
    "no partition, may merge": (d5p4.Select("greedy_beam", partition=False), None),
    "blocks": (d5p4.Select(form="multiplicative", beta=3.0), d5p4.Blocks(block=4)),
    "none": (None, None),
    "best of N": (d5p4.Select("best_of", partition=False), None),
}


def denoiser(counted):
    generator = torch.Generator().manual_seed(0)
    embedding, out = torch.randn(V, 16, generator=generator), torch.randn(16, V, generator=generator)

    def network(ids):
        counted.append(len(ids))
        hidden = torch.tanh(embedding[ids] + embedding[ids].mean(1, keepdim=True))
        return hidden @ out, hidden

    return d5p4.Subs(network, V - 1, batch=6)


def decoded(case, counted, ranks=None):
    selector, process = CASES[case]
    generator = torch.Generator().manual_seed(3)
    return d5p4.sample(denoiser(counted), 4, 3, 6, selector, start=T, generator=generator, process=process, ranks=ranks)


def worker(rank, port, count, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        found = {}
        for case in CASES:
            counted = []
            samples = decoded(case, counted, d5p4.Ranks())
            found[case] = {"ids": samples.ids, "log": repr(samples.log), "rows": sum(counted), "passes": samples.passes}
            found[case] |= {"scores": samples.scores, "picked": samples.picked}
        try:
            d5p4.sample(denoiser([]), 3, 1, 2, d5p4.Select(), start=T, generator=torch.Generator(), ranks=d5p4.Ranks())
        except KnobError as error:
            found["odd"] = str(error)

        def refuse(raw, cosines, k, step):
            raise DataError("no choice")

        try:
            d5p4.sample(denoiser([]), 2, 1, 2, refuse, start=T, generator=torch.Generator(), ranks=d5p4.Ranks())
        except DataError as error:
            found["refused"] = str(error)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one_and_share_the_forward_passes(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    multiprocessing.set_forkserver_preload(["thrifty.llm.d5p4"])
    torch.multiprocessing.start_processes(worker, (port, 2, str(tmp_path)), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    for case in CASES:
        alone = decoded(case, [])
        for found in ranks:
            assert torch.equal(found[case]["ids"], alone.ids), case
            assert torch.equal(found[case]["scores"], alone.scores), case
            assert found[case]["picked"] == alone.picked
            assert found[case]["log"] == repr(alone.log)
            assert found[case]["passes"] == alone.passes == 2 * found[case]["rows"]
    assert all("3 cannot be shared equally by 2" in found["odd"] for found in ranks)
    assert all(found["refused"] == "no choice" for found in ranks)


def test_without_a_process_group_it_is_refused():
    with pytest.raises(DataError, match="no process group"):
        d5p4.Ranks()
