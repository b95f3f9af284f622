"""The rooms of the repository may import one another in one direction only, and importing them does nothing."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Room:
    """What a room may import beside the standard library and itself: anywhere, and inside functions only."""

    anywhere: frozenset[str]
    in_functions: frozenset[str] = frozenset()


ROOMS = {
    "kernels": Room(frozenset({"torch", "triton", "numba", "llvmlite", "numpy"})),
    "dabnn": Room(
        frozenset({"kernels", "torch", "torchvision", "numpy", "safetensors"}),
        frozenset({"webdataset", "PIL", "sklearn", "pyarrow", "scipy", "fsspec", "onnx", "onnxruntime"}),
    ),
    "orchestrator": Room(
        frozenset(
            {
                "dabnn",
                "ray",
                "mlflow",
                "optuna",
                "altair",
                "vl_convert",
                "pydantic",
                "pydantic_core",
                "yaml",
                "rich",
                "psutil",
                "pandas",
                "requests",
                "aiohttp",
            }
        )
    ),
    "jobs": Room(frozenset({"orchestrator", "dabnn", "ray", "mlflow", "torch"})),
    "orchestrator/cli": Room(frozenset({"orchestrator", "typer"})),
    "cli.py": Room(frozenset({"orchestrator", "typer"})),
}
# `make gpu` runs where these are all there is, beside what they bring along.
GPU_MACHINE = frozenset({"torch", "torchvision", "triton", "numpy", "safetensors", "pytest", "kernels", "dabnn"})
NOT_ON_GPU_MACHINE = ("ray", "mlflow", "webdataset", "pydantic", "optuna", "numba", "sklearn", "typer", "hypothesis")


@dataclass(frozen=True)
class Import:
    """One import: the top-level package, the line, and whether it waits for a function call or a type checker."""

    package: str
    line: int
    is_deferred: bool


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imported_names(node: ast.AST) -> list[str]:
    """Return the modules that this one node imports, `importlib.import_module("name")` included."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""] if node.level == 0 else []
    if isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "importlib.import_module",
        "import_module",
        "__import__",
    ):
        return [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return []


def imports_in(node: ast.AST, is_deferred: bool = False) -> Iterator[Import]:
    """Yield every import below `node`, at any depth."""
    for name in imported_names(node):
        yield Import(name.partition(".")[0], node.lineno, is_deferred)
    deferred = is_deferred or is_type_checking(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    for child in ast.iter_child_nodes(node):
        yield from imports_in(child, deferred)


def wrong_arrows(source: str, own_name: str, room: Room) -> list[str]:
    """Return one sentence for each import in `source` that `room` does not allow."""
    complaints = []
    for found in imports_in(ast.parse(source)):
        if found.package in sys.stdlib_module_names or found.package == own_name:
            continue
        if found.package not in room.anywhere | room.in_functions:
            complaints.append(f"line {found.line}: may not import {found.package}")
        elif found.package not in room.anywhere and not found.is_deferred:
            complaints.append(f"line {found.line}: may import {found.package} inside a function only")
    return complaints


def effects_at_import(node: ast.AST) -> Iterator[str]:
    """Yield what importing `node` would read or set: the environment, a CUDA device, the logging configuration."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        at_import = [*getattr(node, "decorator_list", []), *node.args.defaults, *filter(None, node.args.kw_defaults)]
    elif isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
        at_import = []
    else:
        at_import = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ":
        yield f"line {node.lineno}: os.environ"
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called in ("os.getenv", "logging.basicConfig", "ray.init") or called.startswith(("torch.cuda.", "mlflow.")):
            yield f"line {node.lineno}: {called}()"
    for child in at_import:
        yield from effects_at_import(child)


def files_of(room: str) -> list[Path]:
    """Return the files of a room, without those of a room inside it."""
    path = ROOT / room
    inside = [ROOT / other for other in ROOMS if other.startswith(f"{room}/")]
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [file for file in files if not any(file.is_relative_to(other) for other in inside)]


ALL_FILES = [(room, path) for room in ROOMS for path in files_of(room)]
by_file = pytest.mark.parametrize(("room", "path"), ALL_FILES, ids=[str(p.relative_to(ROOT)) for _, p in ALL_FILES])


@by_file
def test_imports_only_go_the_allowed_way(room: str, path: Path) -> None:
    assert wrong_arrows(path.read_text(encoding="utf-8"), room.removesuffix(".py"), ROOMS[room]) == []


@by_file
def test_nothing_happens_on_import(room: str, path: Path) -> None:
    assert list(effects_at_import(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import ray", "line 1: may not import ray"),
        ("def f():\n    from mlflow.tracking import MlflowClient", "line 2: may not import mlflow"),
        ("if TYPE_CHECKING:\n    import pydantic", "line 2: may not import pydantic"),
        ("import importlib\nimportlib.import_module('orchestrator.home')", "line 2: may not import orchestrator"),
        ("class A:\n    import webdataset", "line 2: may import webdataset inside a function only"),
    ],
)
def test_an_arrow_the_wrong_way_is_found(source: str, complaint: str) -> None:
    assert wrong_arrows(source, "dabnn", ROOMS["dabnn"]) == [complaint]


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    import webdataset",
        "if TYPE_CHECKING:\n    from PIL import Image",
        "import dabnn.errors, os, torch.nn",
    ],
)
def test_an_allowed_import_is_let_through(source: str) -> None:
    assert wrong_arrows(source, "dabnn", ROOMS["dabnn"]) == []


@pytest.mark.parametrize(
    ("source", "effect"),
    [
        ("import os\nHOME = os.environ['HOME']", "line 2: os.environ"),
        ("import os\ndef f(home=os.getenv('HOME')): ...", "line 2: os.getenv()"),
        ("class A:\n    count = torch.cuda.device_count()", "line 2: torch.cuda.device_count()"),
        ("if not TYPE_CHECKING:\n    logging.basicConfig()", "line 2: logging.basicConfig()"),
    ],
)
def test_an_effect_on_import_is_found(source: str, effect: str) -> None:
    assert list(effects_at_import(ast.parse(source))) == [effect]


def test_typer_is_known_to_the_command_line_only() -> None:
    assert [room for room, allowed in ROOMS.items() if "typer" in allowed.anywhere] == ["orchestrator/cli", "cli.py"]
    assert ROOT / "orchestrator" / "cli" / "runs.py" in files_of("orchestrator/cli")
    assert ROOT / "orchestrator" / "cli" / "runs.py" not in files_of("orchestrator")


def test_an_effect_inside_a_function_or_a_script_is_let_through() -> None:
    source = "def f():\n    return os.environ\nif __name__ == '__main__':\n    logging.basicConfig()"
    assert list(effects_at_import(ast.parse(source))) == []


@pytest.mark.parametrize("name", [room.removesuffix(".py").replace("/", ".") for room in ROOMS])
def test_the_import_name_is_ours(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).resolve().is_relative_to(ROOT)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_kernels_and_dabnn_import_where_only_the_gpu_packages_are() -> None:
    """Also shows that neither needs ray or mlflow: a blocked import raises, even behind another package."""
    modules = ["kernels", *(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files_of("dabnn"))]
    code = (
        f"import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({NOT_ON_GPU_MACHINE!r}))\n"
        f"for name in {modules!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
    )
    assert run_python(code).stderr == ""


def gpu_files() -> list[Path]:
    tests = [p for room in ("kernels", "dabnn") for p in (ROOT / "tests" / room).rglob("test_*.py")]
    return [p for p in tests if "mark.gpu" in p.read_text(encoding="utf-8")] + list(ROOT.glob("benchmarks/*_gpu.py"))


def test_gpu_tests_and_benchmarks_import_only_what_a_gpu_machine_has() -> None:
    beside = {path.stem for path in ROOT.glob("benchmarks/*.py")}
    allowed = Room(GPU_MACHINE | beside)
    found = {
        str(p.relative_to(ROOT)): wrong_arrows(p.read_text(encoding="utf-8"), p.stem, allowed) for p in gpu_files()
    }
    assert {path: complaints for path, complaints in found.items() if complaints} == {}
