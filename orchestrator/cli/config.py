"""`dab config`: what can be configured, and what a configuration means."""

from orchestrator.cli.arguments import ConfigFile, Json, Set, group
from orchestrator.output import Output

app = group("What can be configured, and what a configuration means.")


@app.command("schema", epilog="Example: dab config schema > dab.schema.json")
def schema(as_json: Json = False) -> None:
    """Print the JSON schema of a configuration file. Editors complete keys from it; it is JSON without --json too."""
    import json

    from orchestrator.config import config_schema

    Output(is_json=as_json).result(config_schema(), json.dumps(config_schema(), indent=2))


@app.command("show", epilog="Example: dab config show examples/digits.yaml --set train.epochs=10")
def show(config: ConfigFile, overrides: Set = None, as_json: Json = False) -> None:
    """Print what a configuration means, with every default and absolute paths."""
    from orchestrator.config import load_config, resolve_paths, to_dict, to_yaml

    resolved = resolve_paths(load_config(config, overrides or ()))
    Output(is_json=as_json).result(to_dict(resolved), to_yaml(resolved).rstrip())


@app.command("spec", epilog="Example: dab config spec examples/digits.yaml --set data.train=digits > spec.json")
def spec(config: ConfigFile, overrides: Set = None, as_json: Json = False) -> None:
    """Print the specification that `torchrun -m dabnn.train SPEC FOLDER` reads; it is JSON without --json too."""
    from orchestrator import commands

    Output(is_json=as_json).result(*commands.show_spec(config, overrides or []))
