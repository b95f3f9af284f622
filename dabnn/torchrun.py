"""`python -m dabnn.train SPEC.json RUN_FOLDER`: the training loop under torchrun, or alone, without Ray."""

import argparse
import gc
import logging
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dabnn.distributed import COLLECTIVE_TIMEOUT_S, World
from dabnn.errors import DabError
from dabnn.run_folder import RunFolder, headline
from dabnn.spec import TrainSpec
from dabnn.train import train

_log = logging.getLogger("dabnn.train")


def main() -> None:
    """Run `train` in this process as `torchrun` started it, or alone."""
    parser = argparse.ArgumentParser(
        prog="python -m dabnn.train", description="Train under torchrun, or in one process."
    )
    parser.add_argument("spec", type=Path, help="JSON file of a TrainSpec")
    parser.add_argument("folder", help="folder or s3:// URL of the run; an interrupted run in it is continued")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if "WORLD_SIZE" in os.environ:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    try:
        result = train(TrainSpec.from_file(arguments.spec), RunFolder.of(arguments.folder), world=World.current(device))
    except DabError as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        if dist.is_initialized():
            gc.collect()  # DDP refers to the group in cycles; gloo threads that live on abort Python's exit at times
            dist.destroy_process_group()
    _log.info("%s: epoch %d, step %d, %s", result.status, result.epoch, result.step, headline(result.metrics))
    if result.status == "failed":
        raise SystemExit(f"error: {result.message}")
