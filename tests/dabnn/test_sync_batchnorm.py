"""BatchNorm over two real ranks against one process that sees the whole batch."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from training import ROOT

RANKS = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from dabnn.distributed import World
from dabnn.sync_batchnorm import synchronize

dist.init_process_group("gloo")
world = World.current()
images, weights = torch.load(sys.argv[1])
net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, affine=False))
names = list(net.state_dict())
synchronize(net, world)
assert list(net.state_dict()) == names
mine = slice(0, 5) if world.rank == 0 else slice(5, 8)  # shares of different sizes
x = images[mine].requires_grad_()
(net(x) * weights[mine]).sum().backward()
for parameter in net.parameters():
    dist.all_reduce(parameter.grad)
torch.save((x.grad, [p.grad for p in net.parameters()], net.state_dict()), f"{sys.argv[1]}.{world.rank}")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def whole_and_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple, list[tuple]]:
    folder = tmp_path_factory.mktemp("ranks")
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 4, 4, generator=generator) * 3 + 2
    weights = torch.randn(8, 3, 4, 4, generator=generator)
    torch.save((images, weights), folder / "batch")
    (folder / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*command, str(folder / "ranks.py"), str(folder / "batch")], cwd=ROOT, env=environment(), check=True)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, affine=False))
    x = images.clone().requires_grad_()
    (net(x) * weights).sum().backward()
    whole = x.grad, [parameter.grad for parameter in net.parameters()], net.state_dict()
    return whole, [torch.load(folder / f"batch.{rank}") for rank in (0, 1)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_gradients_are_those_of_the_whole_batch(whole_and_ranks: tuple[tuple, list[tuple]]) -> None:
    whole, ranks = whole_and_ranks
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]), whole[0], rtol=1e-4, atol=1e-5)
    for found, expected in zip(ranks[0][1], whole[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_running_statistics_are_those_of_the_whole_batch(whole_and_ranks: tuple[tuple, list[tuple]]) -> None:
    whole, ranks = whole_and_ranks
    for rank in ranks:
        for name, expected in whole[2].items():
            torch.testing.assert_close(rank[2][name], expected, rtol=1e-5, atol=1e-6)
