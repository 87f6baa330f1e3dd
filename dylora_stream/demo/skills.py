"""The demo's skills: real texts out of what every install has, each kind with its own rule for the answer.

No text says which skill it belongs to; only its kind shows it. The untrained backbone answers none of them, a few
dozen examples are enough to learn a rule, and the rule also checks answers to inputs that were never trained on.

Sources are read as text, nothing is imported: Python's standard library, and the packages that torch, transformers
and rich bring with them. Another version of one of these gives other rows of the same kinds.
"""

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
STDLIB_PACKAGES = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "urllib")

FUNCTION_NAME = re.compile(r" *(?:async )?def (\w+)\(")
ISSUE_LINK = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+)/(?:issues|pull)/(\d+)")
STYLE_RULE = re.compile(r"^ +([A-Z][\w.]+): +([\"'])[^\"'\n]*(#[0-9a-fA-F]{3,6})[^\"'\n]*\2,", re.MULTILINE)
FUNCTION_HEAD = re.compile(r"^ *(?:async )?def \w+\(([^()\[\]{}\"'#:\n]*)\):", re.MULTILINE)

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Skill:
    """A kind of text with its rule. `rows` are (input, output), every input and every output once."""

    name: str
    rows: tuple[Pair, ...]


def load_skills(seed: int = 0) -> tuple[Skill, ...]:
    """All skills, their rows shuffled; the same installed packages and seed give the same rows."""
    kinds = {
        "traceback": traceback_frames(),
        "issue": issue_links(),
        "style": style_rules(),
        "signature": signatures(),
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


def traceback_frames() -> Iterator[Pair]:
    """Frames as a traceback shows them, for the `raise` statements of the standard library.

    `File "asyncio/base_events.py", line 1922, in _run_once` → `base_events.py:1922 _run_once`
    """
    for path, source in stdlib_sources():
        function = ""
        for number, line in enumerate(source.splitlines(), start=1):
            if head := FUNCTION_NAME.match(line):
                function = head[1]
            elif function and line.lstrip().startswith("raise "):
                file = path.rpartition("/")[2]
                yield f'File "{path}", line {number}, in {function}', f"{file}:{number} {function}"


def issue_links() -> Iterator[Pair]:
    """Links to issues and pull requests on GitHub, in the comments of installed packages.

    `https://github.com/pytorch/pytorch/issues/116101` → `pytorch/pytorch#116101`
    """
    for source in package_sources("torch", "sympy", "transformers", "numpy"):
        for match in ISSUE_LINK.finditer(source):
            yield match[0], f"{match[1]}#{match[2]}"


def style_rules() -> Iterator[Pair]:
    """Colour rules of Pygments' styles.

    `Name.Function: "bold #fdd0c0",` → `#fdd0c0 Name.Function`
    """
    for source in package_sources("pygments.styles"):
        for match in STYLE_RULE.finditer(source):
            yield " ".join(match[0].split()), f"{match[3]} {match[1]}"


def signatures() -> Iterator[Pair]:
    """Heads of the standard library's functions, with two parameters or more beside `self`.

    `def make_server(host, port, app, server_class=WSGIServer):` → `host port app server_class`
    """
    for _, source in stdlib_sources():
        for match in FUNCTION_HEAD.finditer(source):
            names = parameter_names(match[1])
            if len(names) > 1:
                yield match[0].strip(), " ".join(names)


def parameter_names(parameters: str) -> list[str]:
    """The names in a parameter list that has no brackets and no quotes, with their stars, without `self` and `cls`."""
    names = (parameter.split("=")[0].strip() for parameter in parameters.split(","))
    return [name for name in names if name not in {"", "*", "/", "self", "cls"}]


# --- where the texts come from --------------------------------------------------------------------------------------


def stdlib_sources() -> Iterator[tuple[str, str]]:
    """Path and text of the standard library's modules, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    folders = (root, *(root / package for package in STDLIB_PACKAGES))
    for path in sorted(chain.from_iterable(folder.glob("*.py") for folder in folders)):
        yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="ignore")


def package_sources(*packages: str, files: str = "*.py") -> Iterator[str]:
    """The text of installed packages' files, in the order of their paths; an absent package gives none."""
    for package in packages:
        for path in sorted(package_folder(package).rglob(files)):
            yield path.read_text(encoding="utf-8", errors="ignore")


def package_folder(package: str) -> Path:
    """Where a package lies. Only its top level is looked up, so that nothing is imported."""
    top, *rest = package.split(".")
    spec = find_spec(top)
    folders = (spec.submodule_search_locations if spec else None) or ["/nonexistent"]
    return Path(folders[0], *rest)
