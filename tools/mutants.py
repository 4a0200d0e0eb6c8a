"""How much the tests can tell: change the code in one place at a time, and see whether a test fails.

    python tools/mutants.py --count 60 --seed 1

draws so many changes from those that could be made to `qmf_fusion` and the eager operators (a comparison turned or
moved by one, a number by one, a sign, a factor or a call left out, a condition negated, two arguments swapped) and runs
the tests on a copy of the tree, each change in a process of its own, forked from one that has imported PyTorch. Prints
what survived, and the score. Needs a system that forks. Not every survivor is a fault of the tests: some changes change
nothing that anybody could see.
"""

import argparse
import ast
import difflib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis  # noqa: F401  imported once, for all forks
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("qmf_fusion", "kernels/qmf_kernels/eager")
OUTSIDE = ("qmf_fusion/version.py",)
SLOW_FILES = (
    "backend", "benchmarks", "compile", "compiled_step", "distributed", "hub_layout", "imports", "resume", "standalone",
)  # fmt: skip
SLOW_TESTS = "not opcheck and not compile and not processes"
"""What compiles or starts processes: a change that these tests alone would notice counts as one that survived."""
COMPARISONS = {
    ast.Lt: ("<=", ">"), ast.LtE: ("<", ">="), ast.Gt: (">=", "<"), ast.GtE: (">", "<="), ast.Eq: ("!=",),
    ast.NotEq: ("==",), ast.Is: ("is not",), ast.IsNot: ("is",), ast.In: ("not in",), ast.NotIn: ("in",),
}  # fmt: skip
OPERATORS = {
    ast.Add: ("-",), ast.Sub: ("+",), ast.Mult: ("/",), ast.Div: ("*",), ast.FloorDiv: ("*",), ast.Mod: ("*",),
    ast.BitAnd: ("|",), ast.BitOr: ("&",),
}  # fmt: skip
Change = tuple[ast.expr | ast.stmt, str]


def changes(tree: ast.AST) -> Iterator[Change]:
    """What could stand in place of each node; messages, annotations and docstrings are left alone."""
    for name, child in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for node in child if isinstance(child, list) else [child]:
            if not isinstance(node, ast.AST) or isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.Assert):
                continue
            if isinstance(node, ast.keyword) and node.arg == "strict":  # zip's, an assertion too
                continue
            if isinstance(node, ast.expr | ast.stmt):
                yield from ((node, text) for text in replacements(node) if text != ast.unparse(node))
            yield from changes(node)


def replacements(node: ast.expr | ast.stmt) -> Iterator[str]:
    show = ast.unparse
    match node:
        case ast.Compare(left, [operator], [right]):
            yield from (f"({show(left)} {other} {show(right)})" for other in COMPARISONS[type(operator)])
        case ast.BinOp(left, operator, right) if type(operator) in OPERATORS and not isinstance(left, ast.Constant):
            yield from (f"(({show(left)}) {other} ({show(right)}))" for other in OPERATORS[type(operator)])
            yield f"({show(left)})"
        case ast.BoolOp(operator, values):
            yield "(" + (" or " if isinstance(operator, ast.And) else " and ").join(map(show, values)) + ")"
            yield from (f"({show(value)})" for value in values)
        case ast.UnaryOp(ast.USub() | ast.Not() | ast.Invert(), operand):
            yield f"({show(operand)})"
        case ast.Constant(bool() as value):
            yield str(not value)
        case ast.Constant(int() | float() as value):
            yield from (f"({value + 1})", f"({value - 1})")
        case ast.IfExp(test, body, orelse):
            yield f"({show(orelse)} if {show(test)} else {show(body)})"
        case ast.Expr(ast.Call()):
            yield "pass"
        case ast.Call(function, arguments, keywords):
            if len(arguments) == 2 and not any(isinstance(a, ast.Starred) for a in arguments):
                yield show(ast.Call(function, arguments[::-1], keywords))
            if isinstance(function, ast.Attribute) and show(function.value) not in ("torch", "math", "F", "self"):
                yield f"({show(function.value)})"
            for left_out in (keyword for keyword in keywords if keyword.arg != "strict"):
                yield show(ast.Call(function, arguments, [k for k in keywords if k is not left_out]))
        case ast.If(test) | ast.While(test):
            lines = show(node).splitlines()
            yield "\n".join([f"{lines[0].split()[0]} not ({show(test)}):", *lines[1:]])


def mutate(source: str, node: ast.expr | ast.stmt, text: str) -> str:
    lines = source.encode().splitlines(keepends=True)
    assert node.end_lineno is not None
    before = b"".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
    after = lines[node.end_lineno - 1][node.end_col_offset :] + b"".join(lines[node.end_lineno :])
    text = text.replace("\n", "\n" + " " * node.col_offset)
    return (before + text.encode() + after).decode()


def tests_of(copy: Path, changed: Path) -> list[str]:
    """First the file's doctests and the tests that are named as it or speak of it, then all others."""
    rooms = ("qmf_fusion", "qmf_kernels")
    files = [file for room in rooms for file in sorted((copy / "tests" / room).glob("test_*.py"))]
    own = f"test_{'testing' if changed.parent.name == 'testing' else changed.stem}"
    slow = {f"test_{name}" for name in (*SLOW_FILES, "testing")} - {own}
    files = sorted(files, key=lambda file: (file.stem != own, changed.stem not in file.read_text()))
    return [str(changed), *(str(file) for file in files if file.stem not in slow)]


def outcome(copy: Path, changed: Path, timeout: float) -> str:
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(copy)
        sys.path[:0] = paths = [str(copy), str(copy / "kernels"), str(copy / "examples")]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        for stream in (1, 2):
            os.dup2(os.open(copy / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", f"--rootdir={copy}"]
        os._exit(pytest.main([*options, "-k", SLOW_TESTS, *tests_of(copy, changed)]))
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "SURVIVED" if status == 0 else "killed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed, out of time,"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--only", default="", help="part of the names of the files to change")
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = [f for folder in FOLDERS for f in sorted((ROOT / folder).rglob("*.py"))]
    names = [str(f.relative_to(ROOT)) for f in files]
    names = [name for name in names if args.only in name and name not in OUTSIDE]
    possible = [(n, *change) for n in names for change in changes(ast.parse((ROOT / n).read_text()))]
    chosen = random.Random(args.seed).sample(possible, min(args.count, len(possible)))
    alive = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "docs", "__pycache__", "runs", "*.egg-info"))
        if outcome(copy, copy / names[0], args.timeout) != "SURVIVED":
            sys.exit(f"the tests fail without any change, or take more than --timeout {args.timeout}")
        for number, (name, node, text) in enumerate(chosen, start=1):
            source = (ROOT / name).read_text()
            mutant = mutate(source, node, text)
            (copy / name).write_text(mutant)
            begun, end = time.monotonic(), outcome(copy, copy / name, args.timeout)
            (copy / name).write_text(source)
            print(f"{number}: {end} {name}:{node.lineno} ({time.monotonic() - begun:.0f} s)", flush=True)
            if end == "SURVIVED":
                alive += 1
                diff = difflib.unified_diff(source.splitlines(), mutant.splitlines(), lineterm="", n=0)
                print("\n".join(list(diff)[2:]), flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} killed: {100 * (1 - alive / len(chosen)):.0f} %, seed {args.seed}")


if __name__ == "__main__":
    main()
