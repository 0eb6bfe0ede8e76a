"""Laws of a vocabulary split over processes: two gloo ranks on the CPU give the loss and gradients of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from multimodal.bin_losses import HLGauss
from multimodal.kernels.linear_cross_entropy import linear_cross_entropy
from multimodal.kernels.statistics import VocabShard
from multimodal.losses import DistributionallyRobust
from tests.test_linear_cross_entropy import FEATURES, problem

SHARDS = ((0, 5), (5, 11))  # uneven, of a vocabulary of 11
CASES: dict[str, dict[str, Any]] = {
    **FEATURES,
    "vocab_blocks": {**FEATURES["softcap"], "backend": "vocab_blocks", "logits_bytes": 100},
    "stats": {"return_stats": True, "vocab_range": "rows"},
    "hl_gauss": {"loss": HLGauss()},
    "distributionally_robust": {"loss": DistributionallyRobust(lam=0.7, margin=0.5)},
}


def run_rank(rank: int, folder: str) -> None:
    """Every case on this rank's shard; results go to a file of the rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    start, stop = SHARDS[rank]
    results = {}
    for name, features in CASES.items():
        hidden, weight, targets, options = problem(features)
        inputs = [hidden, weight[start:stop], *([options["bias"][start:stop]] if "bias" in options else [])]
        inputs = [each.clone().requires_grad_() for each in inputs]
        options |= {"bias": inputs[2]} if "bias" in options else {}
        loss = options.pop("loss", linear_cross_entropy)
        output = loss(*inputs[:2], targets, vocab_shard=VocabShard(start, 11), **options)
        objective(output).backward()
        results[name] = [objective(output).detach(), *(each.grad for each in inputs)]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def objective(output: Any) -> torch.Tensor:
    """A scalar of everything the call returns."""
    if isinstance(output, torch.Tensor):
        return output.sum()
    return output.loss + (output.nll * output.entropy).sum() + output.lse.square().sum()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[torch.Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_shards_equal_one_vocabulary(name: str, ranks: list[dict[str, list[torch.Tensor]]]):
    hidden, weight, targets, options = problem(CASES[name])
    inputs = [hidden, weight, *([options["bias"]] if "bias" in options else [])]
    hidden, *columns = (each.requires_grad_() for each in inputs)
    loss = options.pop("loss", linear_cross_entropy)
    truth = objective(loss(hidden, weight, targets, **{**options, "backend": "reference"}))
    truth.backward()
    for (value, of_hidden, *of_columns), (start, stop) in zip((rank[name] for rank in ranks), SHARDS, strict=True):
        torch.testing.assert_close(value, truth.detach())
        torch.testing.assert_close(of_hidden, hidden.grad)
        for ours, whole in zip(of_columns, columns, strict=True):
            torch.testing.assert_close(ours, whole.grad[start:stop])


def test_ranks_agree_to_the_bit(ranks: list[dict[str, list[torch.Tensor]]]):
    for name in CASES:
        assert all(torch.equal(first, second) for first, second in zip(ranks[0][name][:2], ranks[1][name][:2], strict=True))
