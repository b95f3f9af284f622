"""`ray start` without the parts that the embedded cluster never uses; run as a file, with the arguments of `ray`.

Measured with Ray 2.60, together with `--no-monitor` (no autoscaler on one machine): 897 -> 695 MB and 8.6 -> 5.7 s.
Imports nothing of ours, so that it starts wherever the program lies.
"""

import os
import sys
from typing import Any

_HOOK = "RAY_START_HOOK"


def without_client_server(ray_params: Any, _is_head: bool) -> None:
    """Start no Ray Client server (51 MB): jobs come by the Jobs API, and it is one more port that takes commands."""
    ray_params.ray_client_server_port = None
    os.environ.pop(_HOOK)  # nothing that the cluster starts shall call it again


def main() -> None:
    """Run the command line of Ray."""
    os.environ[_HOOK] = f"{__name__}.{without_client_server.__name__}"
    # The command line imports Ray Serve for a subcommand, and with it pandas and fastapi (91 MB, 2 s); it does without.
    sys.modules["ray.serve"] = None  # type: ignore[assignment]
    from ray.scripts import scripts

    command_line: Any = scripts.main  # Ray has no types for it
    command_line()


if __name__ == "__main__":
    main()
