"""Measure how the code reads, and fail when it breaks the style budget.

    python tools/style_numbers.py kernels dabnn cli.py                       print the numbers
    python tools/style_numbers.py --worst 5 dabnn                            and the longest functions and files
    python tools/style_numbers.py --max fn_p90=40 --min typed=1 dabnn        exit 1 when a limit is broken

The code is parsed, never imported. What is measured, in physical lines with docstrings and blank lines counted:

    fn_p90      nearest-rank 90th percentile of function length, `def` line to last line, nested functions too
    fn_max      the longest function
    file_max    the longest file
    nest_max    deepest if/for/while/with/try/match inside a function (elif and else add nothing)
    api_cover   share of public module-level functions and classes that have a docstring
    typed       share of public functions and methods with every argument and the result annotated

`_name` is private, and so is everything inside it. Empty files are left out. Comments, imports and tests are not
measured here.
"""

import argparse
import ast
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


@dataclass(frozen=True)
class Measured:
    """One function or file: its length in lines, how deep it nests, and where it is."""

    lines: int
    nesting: int
    where: str


@dataclass(frozen=True)
class Facts:
    """What was found in the measured files."""

    files: list[Measured]
    functions: list[Measured]
    is_documented: list[bool]
    is_typed: list[bool]


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Return the deepest block below `node`; functions and classes defined inside are left to their own count."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition | ast.Lambda):
            continue
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


def public_definitions(parent: ast.AST) -> Iterator[tuple[Definition, bool]]:
    """Yield (definition, is it a class member) for the public functions, classes and members below `parent`."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Definition):
            if node.name.startswith("_") or any("overload" in ast.unparse(d) for d in node.decorator_list):
                continue
            yield node, isinstance(parent, ast.ClassDef)
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from public_definitions(node)


def is_annotated(function: Function) -> bool:
    """Return whether the result and every argument but self and cls are annotated (not *args)."""
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return function.returns is not None and all(a.annotation or a.arg in ("self", "cls") for a in arguments)


def python_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the Python files named by `paths`, folders searched."""
    for path in paths:
        if not path.exists():
            raise SystemExit(f"{path}: no such file or folder")
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def measure(paths: Iterable[Path]) -> Facts:
    """Return the facts of the Python files under `paths`."""
    facts = Facts([], [], [], [])
    for path in python_files(paths):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, filename=str(path))
        if not tree.body:
            continue
        facts.files.append(Measured(len(text.splitlines()), 0, str(path)))
        for node in ast.walk(tree):
            if isinstance(node, Function):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                facts.functions.append(Measured(lines, nesting(node), f"{path}:{node.lineno} {node.name}"))
        for definition, in_class in public_definitions(tree):
            if not in_class:
                facts.is_documented.append(ast.get_docstring(definition) is not None)
            if isinstance(definition, Function):
                facts.is_typed.append(is_annotated(definition))
    return facts


def share(flags: list[bool]) -> float:
    """Return the share of true flags; 1 where there is nothing to count."""
    return sum(flags) / len(flags) if flags else 1.0


def summarise(facts: Facts) -> dict[str, float]:
    """Return the measures that the module docstring defines."""
    lengths = sorted(function.lines for function in facts.functions) or [0]
    return {
        "fn_p90": lengths[max(0, math.ceil(0.9 * len(lengths)) - 1)],
        "fn_max": lengths[-1],
        "file_max": max((file.lines for file in facts.files), default=0),
        "nest_max": max((function.nesting for function in facts.functions), default=0),
        "api_cover": share(facts.is_documented),
        "typed": share(facts.is_typed),
    }


def broken_limits(numbers: dict[str, float], at_most: dict[str, float], at_least: dict[str, float]) -> Iterator[str]:
    """Yield one sentence for each limit that `numbers` breaks."""
    for key, limit in at_most.items():
        if numbers[key] > limit:
            yield f"{key} is {numbers[key]:g}, wanted at most {limit:g}"
    for key, limit in at_least.items():
        if numbers[key] < limit:
            yield f"{key} is {numbers[key]:.3f}, wanted at least {limit:g}"


def limit(text: str) -> tuple[str, float]:
    """Return the (measure, number) of a `measure=number` argument."""
    key, _, number = text.partition("=")
    known = summarise(Facts([], [], [], []))
    if key not in known:
        raise argparse.ArgumentTypeError(f"unknown measure {key!r}; known: {', '.join(known)}")
    try:
        return key, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} needs a number after '=', as in {key}=40") from None


def main() -> int:
    """Print the numbers and return 1 when a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="files and folders to measure")
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="list the N longest functions and files")
    for option in ("--max", "--min"):
        parser.add_argument(option, action="append", default=[], type=limit, metavar="MEASURE=NUMBER")
    args = parser.parse_args()

    facts = measure(args.paths)
    numbers = summarise(facts)
    print("  ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
    for group in (facts.functions, facts.files):
        for found in sorted(group, key=lambda m: -m.lines)[: args.worst]:
            print(f"{found.lines:5} lines, nesting {found.nesting}: {found.where}")
    broken = list(broken_limits(numbers, dict(args.max), dict(args.min)))
    for complaint in broken:
        print(f"style budget: {complaint}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
