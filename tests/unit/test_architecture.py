"""The house stands: imports go down, core is pure, sizes stay readable."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dylora_stream"
LONGEST_MODULE = 400
LONGEST_FUNCTION = 45
MOST_PARAMETERS = 5
COMMANDS = PACKAGE / "cli"  # a command has as many parameters as options


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the repository, with the settings' variables taken out."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DYLORA_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def functions() -> list[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function of the package with its file."""
    return [
        (path, node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_imports_only_go_down() -> None:
    """import-linter's contracts of pyproject.toml are kept."""
    done = run_python(
        "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_is_too_long() -> None:
    """A module of more than 400 lines holds two things."""
    sizes = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path: lines for path, lines in sizes.items() if lines > LONGEST_MODULE} == {}


def test_no_function_is_too_long() -> None:
    """A function of more than 45 lines is several."""
    sizes = {f"{path.relative_to(ROOT)}:{node.name}": body_lines(node) for path, node in functions()}
    assert {name: lines for name, lines in sizes.items() if lines > LONGEST_FUNCTION} == {}


def test_no_function_has_too_many_parameters() -> None:
    """More than five parameters want a frozen config."""
    stray = {}
    for path, node in functions():
        names = [a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > MOST_PARAMETERS and COMMANDS not in path.parents:
            stray[f"{path.relative_to(ROOT)}:{node.name}"] = count
    assert stray == {}


def test_every_module_says_what_it_is() -> None:
    """Each module opens with a docstring."""
    silent = [
        path for path in PACKAGE.rglob("*.py") if ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert silent == []


@pytest.mark.parametrize(
    "module", ["settings", "logs", "learn.service", "cli", "bootstrap.tools", "ops.doctor"]
)
def test_no_model_library_is_loaded_without_need(module: str) -> None:
    """Processes that never run the model never pay for torch."""
    code = (
        f"import dylora_stream.{module}, sys; "
        "print([name for name in ('torch', 'transformers', 'peft', 'faiss') if name in sys.modules])"
    )
    done = run_python("-c", code)
    assert done.stdout.strip() == "[]", done.stderr
