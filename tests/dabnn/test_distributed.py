import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from training import ROOT

from dabnn.distributed import World, deterministic, seed_step, share_buffers, wrap

NUM_RANKS = 3
# Each rank writes what it saw; the tests compare the ranks.
PROGRAM = """
import gc, hashlib, json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from dabnn.data.order import share
from dabnn.distributed import World, deterministic, share_buffers, wrap

def digest(tensors):
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()

def gradients(model, net, seed):
    net.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(4, 3, 8, 8, generator=generator)).square().sum().backward()
    return digest(parameter.grad for parameter in net.parameters())

dist.init_process_group("gloo")
world = World.current()
seen = {"rank": world.rank, "size": world.size, "is_main": world.is_main}
seen["largest"] = world.largest([world.rank, -world.rank, 7])
seen["total"] = world.total([0.1 * world.rank, 1.0])
seen["share"] = world.share({"from": world.rank})
seen["gather"] = world.gather(f"rank {world.rank}")
with deterministic():
    torch.manual_seed(world.rank)  # DDP itself must make the ranks equal
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 64), nn.Linear(64, 10)]
    net = nn.Sequential(*layers)
    before = digest(net.buffers())
    model = wrap(net, world, (3, 8, 8))
    seen["buffers_are_restored"] = digest(net.buffers()) == before
    seen["gradients_are_empty"] = all(parameter.grad is None for parameter in net.parameters())
    seen["parameters"] = digest(net.parameters())
    steps = [gradients(model, net, 10 * world.rank) for _ in range(3)]
    seen["steps"] = steps
    net[1].running_mean.fill_(world.rank + 5)
    share_buffers(net, world)
    seen["running_mean"] = net[1].running_mean[0].item()
plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
images, labels = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 5
shared = wrap(plain, world, (3, 8, 8))
own = share(range(10), world.rank, world.size)  # 3, 3 and 4 of them
part = slice(own.start, own.stop)
losses = nn.functional.cross_entropy(shared(images[part]), labels[part], reduction="none")
(losses.sum() * (world.size / 10)).backward()  # as `Learner.step` weights it
whole = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
whole.load_state_dict(plain.state_dict())
nn.functional.cross_entropy(whole(images), labels).backward()
seen["share_size"] = len(own)
seen["uneven"] = max((a.grad - b.grad).abs().max().item() for a, b in zip(plain.parameters(), whole.parameters()))
Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(seen))
del model, net, layers, shared, plain
gc.collect()  # DDP refers to the group in cycles, and a gloo thread that lives on aborts the exit at times
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(folder / "program.py"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def test_uneven_shares_of_a_step_have_the_gradient_of_the_whole_step(ranks: list[dict[str, Any]]) -> None:
    assert [seen["share_size"] for seen in ranks] == [3, 3, 4]
    assert all(seen["uneven"] < 1e-6 for seen in ranks)  # sums of ten float32 terms of size one


def test_each_process_knows_its_place_and_only_the_first_is_main(ranks: list[dict[str, Any]]) -> None:
    assert [(seen["rank"], seen["size"], seen["is_main"]) for seen in ranks] == [
        (0, 3, True),
        (1, 3, False),
        (2, 3, False),
    ]


def test_all_ranks_hear_the_same_answer(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["largest"] == [2, 0, 7]
        assert seen["total"] == pytest.approx([0.3, 3.0], abs=1e-15)
        assert seen["share"] == {"from": 0}
        assert seen["gather"] == ["rank 0", "rank 1", "rank 2"]


def test_wrapping_gives_all_ranks_the_weights_of_the_first_and_leaves_no_trace(ranks: list[dict[str, Any]]) -> None:
    assert len({seen["parameters"] for seen in ranks}) == 1
    assert all(seen["buffers_are_restored"] and seen["gradients_are_empty"] for seen in ranks)


def test_the_first_step_after_wrapping_adds_up_as_every_later_one(ranks: list[dict[str, Any]]) -> None:
    """Otherwise a run resumed at a step would round it differently from one that came to it."""
    assert len({step for seen in ranks for step in seen["steps"]}) == 1


def test_shared_buffers_are_those_of_the_first_rank(ranks: list[dict[str, Any]]) -> None:
    assert [seen["running_mean"] for seen in ranks] == [5.0] * NUM_RANKS


def test_one_process_alone_talks_to_nobody() -> None:
    world = World.current("cpu")
    assert (world.rank, world.size, world.is_main, world.control) == (0, 1, True, None)
    assert world.largest([3, 1]) == [3, 1]
    assert world.total([0.5]) == [0.5]
    assert world.share("x") == "x"
    assert world.gather("x") == ["x"]
    net = nn.BatchNorm1d(2)
    assert wrap(net, world, (2,)) is net
    share_buffers(net, world)


def test_deterministic_mode_ends_with_its_block_also_after_an_error() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    modes = []

    def fail() -> None:
        with deterministic():
            modes.append(torch.are_deterministic_algorithms_enabled())
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert modes == [True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_step_draws_the_same_numbers_whatever_came_before() -> None:
    def draw(seed: int, step: int, rank: int) -> tuple[float, ...]:
        seed_step(seed, step, rank)
        return tuple(torch.rand(4).tolist())

    with torch.random.fork_rng():
        first = draw(1, 5, 0)
        torch.rand(17)
        assert draw(1, 5, 0) == first
        places = [(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(4)]
        assert len({draw(*place) for place in places}) == len(places)
