"""Arguments and options that several commands share, and how a group of commands is made."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration, such as examples/digits.yaml.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, e.g. --set train.epochs=10. May be repeated."),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Run id, the beginning of one, or a run's name.")]
TrackingUri = Annotated[
    str | None, typer.Option("--tracking-uri", metavar="URL", help="MLflow server; default this machine's own.")
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL|NAME", help="Cluster: URL of its Jobs API, or a name of clusters.toml; default this machine's own."
    ),
]
ValFraction = Annotated[
    float | None,
    typer.Option(help="Share of each class drawn to validate on; default 0.2 where the folder has no val."),
]
Detach = Annotated[bool, typer.Option("--detach", help="Return at once instead of following the log.")]


def group(help_text: str) -> typer.Typer:
    """Return an empty group of commands, which shows its help when no command is named."""
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        rich_markup_mode=None,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
