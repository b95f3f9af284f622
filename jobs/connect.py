"""How a program that runs as a Ray job connects to its cluster."""

import json
import logging
import os

import ray

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_ADDRESS = "RAY_ADDRESS"


def connect() -> None:
    """Connect to the cluster of this job, and let all that it starts know which cluster that is.

    Ray tells the address to the job's first process only. Where several Rays share a machine, the actor that frees the
    workers of an attempt that died would otherwise not know whom to ask, and end.
    """
    given = json.loads(os.environ.get(_JOB, "{}")).get("runtime_env", {}).get("env_vars", {})
    address = os.environ.get(_ADDRESS)
    told = {"env_vars": {_ADDRESS: address}} if address and _ADDRESS not in given else None
    ray.init(logging_level=logging.WARNING, runtime_env=told)
