"""The program `dab`: its commands, assembled from `orchestrator/cli/`, and how it ends.

Nothing heavy is imported at module level, so that `dab --help` answers at once. Commands raise `DabError`; only `main`
turns it into a message and an exit code: 1 failure, 2 usage or invalid input, 130 interrupted. A bug keeps its
traceback.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from orchestrator.cli import analysis, cluster, config, data, init, machine, models, packed, reports, runs
from orchestrator.cli.arguments import group
from orchestrator.output import DabError, Output

app = group("Train, search and ship distribution-aware binarized networks.")
# `dab --help` lists them in this order. Those without a name are commands of `dab` itself.
app.add_typer(init.app)
app.add_typer(runs.app)
app.add_typer(packed.app)
app.add_typer(analysis.app)
app.add_typer(reports.app)
app.add_typer(machine.app)
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models", no_args_is_help=False)
app.add_typer(config.app, name="config")
app.add_typer(cluster.app, name="cluster")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version

        Output().result({}, f"dab {version('dab')}")
        raise typer.Exit


@app.callback(epilog="Example: dab data build builtin:digits digits")
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    out = Output(is_json="--json" in arguments)
    try:
        # With standalone_mode off, Typer returns the exit code (None for a plain end) and lets its own errors through.
        code = app(args=list(arguments), prog_name="dab", standalone_mode=False) or 0
        sys.stdout.flush()
    except DabError as error:
        out.error(str(error), error.exit_code, error.details)
        return error.exit_code
    except TyperException as error:
        _explain_usage(out, error)
        return error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader went away, as `head` does; without this, Python complains once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DabError.exit_code
    if code == 130:
        out.error("interrupted", code)
    return int(code)


def _explain_usage(out: Output, error: TyperException) -> None:
    message = error.format_message()
    context: typer.Context | None = getattr(error, "ctx", None)
    if message.startswith("Usage:") and not out.is_json:
        out.note(message)  # a group without a command answers with its help
    else:
        how = f" `{context.command_path} --help` says how." if context else ""
        out.error(message.rstrip(".") + "." + how, error.exit_code)


def main() -> None:
    """Run the program; the entry point of `dab`."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
