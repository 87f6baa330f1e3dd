"""The demo's skills: real texts out of what every install has, each kind with its own rule for the answer.

No text says which skill it belongs to; only its kind shows it. The untrained backbone answers none of them, a few
dozen examples are enough to learn a rule, and the rule also checks answers to inputs that were never trained on.

Sources are read as text, nothing is imported: Python's standard library, and the packages that torch, transformers
and rich bring with them. Another version of one of these gives other rows of the same kinds.
"""

import ast
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from random import Random

__all__ = ["Skill", "load_skills"]

MAX_INPUT_CHARS = 90  # about 35 tokens of the default backbone
MAX_OUTPUT_CHARS = 36  # about 14 tokens: decoding is what a record costs
MIN_WORDS, MAX_WORDS = 6, 14  # of a sentence
STDLIB_PACKAGES = ("asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "unittest", "xml")

Pair = tuple[str, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class Skill:
    """A kind of text with its rule. `rows` are (input, output), every input and every output once."""

    name: str
    rows: tuple[Pair, ...]


def load_skills(seed: int = 0) -> tuple[Skill, ...]:
    """All skills, their rows shuffled; the same installed packages and seed give the same rows."""
    functions = tuple(stdlib_functions())
    kinds: dict[str, Iterator[Pair]] = {
        "traceback": traceback_frames(functions),
        "issue": issue_links(),
        "style": style_rules(),
        "signature": signatures(functions),
        "import": imports(),
        "sentence": sentences(functions),
    }
    return tuple(
        Skill(name=name, rows=distinct_rows(pairs, Random(f"{seed}-{name}"))) for name, pairs in kinds.items()
    )


def distinct_rows(pairs: Iterable[Pair], random: Random) -> tuple[Pair, ...]:
    """The usable pairs in random order, without any that repeats an earlier input or output.

    Different outputs everywhere mean that no constant answer scores.
    """
    shuffled = list(dict.fromkeys(filter(is_usable, pairs)))
    random.shuffle(shuffled)
    by_output = {output: text for text, output in reversed(shuffled)}
    by_input = {text: output for output, text in reversed(by_output.items())}
    return tuple(by_input.items())


def is_usable(pair: Pair) -> bool:
    """Whether both texts are short and plain ASCII, so that a row costs little on a CPU."""
    text, output = pair
    return (text + output).isascii() and len(text) <= MAX_INPUT_CHARS and 0 < len(output) <= MAX_OUTPUT_CHARS


# --- the skills -----------------------------------------------------------------------------------------------------


def traceback_frames(functions: Iterable[tuple[str, Function]]) -> Iterator[Pair]:
    """Frames as a traceback shows them, at the last statement of each function of the standard library.

    `File "asyncio/base_events.py", line 1922, in _run_once` → `base_events.py:1922 _run_once`
    """
    for path, function in functions:
        line = function.body[-1].lineno
        file = path.rpartition("/")[2]
        yield f'File "{path}", line {line}, in {function.name}', f"{file}:{line} {function.name}"


def issue_links() -> Iterator[Pair]:
    """Links to issues and pull requests on GitHub, in the comments of installed packages.

    `https://github.com/pytorch/pytorch/issues/116101` → `pytorch/pytorch#116101`
    """
    link = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+)/(?:issues|pull)/(\d+)")
    for source in package_sources("torch", "sympy", "transformers", "numpy"):
        for match in link.finditer(source):
            yield match[0], f"{match[1]}#{match[2]}"


def style_rules() -> Iterator[Pair]:
    """Colour rules of Pygments' styles.

    `Name.Function: "bold #fdd0c0",` → `#fdd0c0 Name.Function`
    """
    rule = re.compile(r"^ +([A-Z][\w.]+): +([\"'])[^\"'\n]*(#[0-9a-fA-F]{3,6})[^\"'\n]*\2,", re.MULTILINE)
    for source in package_sources("pygments.styles"):
        for match in rule.finditer(source):
            yield " ".join(match[0].split()), f"{match[3]} {match[1]}"


def signatures(functions: Iterable[tuple[str, Function]]) -> Iterator[Pair]:
    """Heads of the standard library's functions, with two parameters or more beside `self`.

    `def make_server(host, port, app, server_class=WSGIServer):` → `host port app server_class`
    """
    for _, function in functions:
        names = parameter_names(function.args)
        if len(names) > 1:
            yield f"def {function.name}({ast.unparse(function.args)}):", " ".join(names)


def imports() -> Iterator[Pair]:
    """Import statements of installed packages.

    `from torch.fx.traceback import annotate` → `traceback.annotate`
    """
    statement = re.compile(r"^from (?:\w+\.)+(\w+) import (\w+)$", re.MULTILINE)
    for source in package_sources("torch", "peft", "pydantic", "huggingface_hub"):
        for match in statement.finditer(source):
            yield match[0], f"{match[1]}.{match[2]}"


def sentences(functions: Iterable[tuple[str, Function]]) -> Iterator[Pair]:
    """First sentences of the standard library's docstrings.

    `Get the high and low watermarks for write flow control.` → `Get the high and...`
    """
    sentence = re.compile(r"([A-Z][A-Za-z', -]+)\.(?:\s|$)")
    for _, function in functions:
        match = sentence.match(" ".join((ast.get_docstring(function) or "").split()))
        words = match[1].split() if match else []
        if MIN_WORDS <= len(words) <= MAX_WORDS:
            yield " ".join(words) + ".", " ".join(words[:4]).rstrip(",") + "..."


# --- where the texts come from --------------------------------------------------------------------------------------


def stdlib_functions() -> Iterator[tuple[str, Function]]:
    """Every function of the standard library with its module's path, in the order of paths and lines."""
    root = Path(sysconfig.get_path("stdlib"))
    packages = (sorted((root / package).rglob("*.py")) for package in STDLIB_PACKAGES)
    for path in chain(sorted(root.glob("*.py")), *packages):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield path.relative_to(root).as_posix(), node


def parameter_names(parameters: ast.arguments) -> list[str]:
    """The names in order, without `self` and `cls`, and with their stars."""
    names = [parameter.arg for parameter in parameters.posonlyargs + parameters.args]
    names += [f"*{parameters.vararg.arg}"] if parameters.vararg else []
    names += [parameter.arg for parameter in parameters.kwonlyargs]
    names += [f"**{parameters.kwarg.arg}"] if parameters.kwarg else []
    return [name for name in names if name not in {"self", "cls"}]


def package_sources(*packages: str) -> Iterator[str]:
    """The text of each Python file of installed packages, in the order of their paths; absent packages give none."""
    for package in packages:
        for path in sorted(package_folder(package).rglob("*.py")):
            yield path.read_text(encoding="utf-8", errors="ignore")


def package_folder(package: str) -> Path:
    """Where a package lies. Only its top level is looked up, so that nothing is imported."""
    top, *rest = package.split(".")
    spec = find_spec(top)
    folders = (spec.submodule_search_locations if spec else None) or ["/nonexistent"]
    return Path(folders[0], *rest)
