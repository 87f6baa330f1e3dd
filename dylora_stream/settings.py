"""Settings: defaults, then a TOML file, then `DYLORA_*` variables, then flags; the later one wins.

Each algorithm's knobs are a frozen dataclass beside its code; here they are composed into sections and the I/O groups
are added. A value is named `section.field` in TOML, in flags and in messages, and `DYLORA_SECTION__FIELD` in the
environment. A name that does not exist is refused with the nearest one that does, because a misspelt setting that is
silently ignored is a wrong setting.

Imports no model library: settings are read in processes that never load a model.
"""

import difflib
import json
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import PrivateAttr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from dylora_stream.core.checks import CheckConfig
from dylora_stream.core.cluster_config import ClusteringConfig
from dylora_stream.core.errors import SettingsError
from dylora_stream.core.novelty import NoveltyConfig
from dylora_stream.core.recipes import CONSOLIDATION, SEEDING, Recipe
from dylora_stream.core.routing import RoutingConfig
from dylora_stream.learn.lifecycle import LifecycleConfig
from dylora_stream.learn.service import LearnConfig
from dylora_stream.logs import LogConfig
from dylora_stream.model.config import GenerationConfig, ModelConfig, PoolConfig
from dylora_stream.ops.http import HttpConfig
from dylora_stream.serve.service import ServeConfig
from dylora_stream.stream.kafka import KafkaConfig
from dylora_stream.stream.topics import TopicLayout

__all__ = ["ExplainedValue", "Settings", "StoreConfig", "is_secret", "load_settings", "setting_names"]

PREFIX = "DYLORA_"
DELIMITER = "__"
CONFIG_VARIABLE = "DYLORA_CONFIG"  # names the TOML file
MOST_THREADS = 1024
NO_SETTINGS = frozenset({"consolidation.rank"})  # a later version has the rank of its expert's first one
OTHER_VARIABLES = frozenset({CONFIG_VARIABLE, "DYLORA_TEST_BOOTSTRAP"})  # not settings, but ours
DEFAULT_FILE = Path("dylora.toml")
HIDDEN = "**********"

Tree = dict[str, dict[str, Any]]  # section -> field -> value


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Where things are kept."""

    folder: Path = Path(".dylora")
    """The data folder of this process: model, database, jobs, identity. Relative to the working directory."""

    experts: str = ""
    """The experts' folder or fsspec URL, shared by all workers; empty: `experts` in the data folder."""

    memory_limit: str = "512MB"
    """What DuckDB may take; its own default is 80 % of the machine."""

    threads: int = 1
    """DuckDB's threads: buffers are small, the cores belong to the model."""

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads is {self.threads}: it must lie between 1 and {MOST_THREADS}")
        url = urlsplit(self.experts)
        if url.password is not None:
            raise ValueError(
                "experts has a password in its URL, which logs and commands would show: take it out, and set "
                f"FSSPEC_{url.scheme.upper()}_PASSWORD in the environment instead"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedValue:
    """One row of `config show`."""

    name: str
    value: str
    source: str


class Settings(BaseSettings):
    """Every knob of the system, a section a room or concern."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter=DELIMITER,
        nested_model_default_partial_update=True,
        extra="forbid",
        frozen=True,
    )

    kafka: KafkaConfig = KafkaConfig(  # no instance: the data folder has an id of its own (`store.identity`)
        bootstrap_servers="127.0.0.1:9092", group="", instance=""
    )
    topics: TopicLayout = TopicLayout()
    model: ModelConfig = ModelConfig()
    pool: PoolConfig = PoolConfig()
    generation: GenerationConfig = GenerationConfig()
    novelty: NoveltyConfig = NoveltyConfig()
    router: RoutingConfig = RoutingConfig()
    clustering: ClusteringConfig = ClusteringConfig()
    seeding: Recipe = SEEDING
    consolidation: Recipe = CONSOLIDATION
    check: CheckConfig = CheckConfig()
    lifecycle: LifecycleConfig = LifecycleConfig()
    serve: ServeConfig = ServeConfig()
    learn: LearnConfig = LearnConfig()
    store: StoreConfig = StoreConfig()
    http: HttpConfig = HttpConfig()
    log: LogConfig = LogConfig()

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _arguments: tuple[str, ...] = PrivateAttr(default=())

    @property
    def arguments(self) -> tuple[str, ...]:
        """The flags that give another process of this program the same settings (it inherits the environment)."""
        return self._arguments

    @model_validator(mode="before")
    @classmethod
    def _read_tables(cls, given: dict[str, Any]) -> dict[str, Any]:
        """A variable or flag writes a table (kafka.names) as JSON; a file has its own way to write it."""
        for section, values in given.items():
            default = cls.model_fields[section].default
            for field, value in values.items() if isinstance(values, dict) else ():
                if isinstance(value, str) and isinstance(getattr(default, field, None), Mapping):
                    values[field] = _table(f"{section}.{field}", value)
        return given

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        """An expert that is trained must find a place in every worker's pool."""
        if self.seeding.rank > self.pool.rank:
            raise ValueError(
                f"seeding.rank is {self.seeding.rank}: it must be at most pool.rank ({self.pool.rank}), or no worker "
                "could load the experts; raise pool.rank, or lower seeding.rank"
            )
        return self

    def check_numbers(self) -> None:
        """No number is infinite or none. Raises SettingsError."""
        for name in setting_names():
            section, field = name.split(".")
            value = getattr(getattr(self, section), field)
            if isinstance(value, float) and not math.isfinite(value):
                raise SettingsError(f"{name} is {value}: use a finite number")

    def with_origins(self, origins: Mapping[str, str], arguments: Sequence[str]) -> Self:
        """The same settings, knowing where each came from; `load_settings` calls it."""
        self._origins.update(origins)
        self._arguments = tuple(arguments)
        return self

    def explain(self) -> list[ExplainedValue]:
        """Each value with its name and where it came from; secrets hidden."""
        rows = []
        for name in setting_names():
            section, field = name.split(".")
            value = _shown(getattr(getattr(self, section), field))
            value = HIDDEN if value and is_secret(name) else value
            rows.append(ExplainedValue(name=name, value=value, source=self._origins.get(name, "default")))
        return rows

    @classmethod
    def settings_customise_sources(  # type: ignore[override]  # pydantic passes all of them by name
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **others: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file; the defaults of a section fill in what they leave open."""
        return init_settings, others["env_settings"], TomlConfigSettingsSource(settings_cls)


def setting_names() -> list[str]:
    """Every `section.field`, in the order in which they are declared."""
    names = (
        f"{section}.{field.name}"
        for section, info in Settings.model_fields.items()
        for field in fields(type(info.default))
    )
    return [name for name in names if name not in NO_SETTINGS]


def is_secret(name: str) -> bool:
    """Whether this setting must not be shown: its dataclass keeps it out of `repr`."""
    section, field_name = name.split(".")
    return any(
        field.name == field_name and not field.repr
        for field in fields(type(Settings.model_fields[section].default))
    )


def load_settings(config: Path | None = None, flags: Sequence[str] = ()) -> Settings:
    """The settings of this process.

    `config` is a TOML file (else the one that DYLORA_CONFIG names, else ./dylora.toml if it is there); `flags` are
    assignments, `section.field=value`. Raises SettingsError, which names what is wrong and what would be right.
    """
    file = _config_file(config)
    given = {f"file {file}": _read_file(file), "environment": _read_environment(), "flag": _read_flags(flags)}
    origins: dict[str, str] = {}
    for source, tree in given.items():
        names = [f"{section}.{field}" for section, values in tree.items() for field in values]
        for name in names:
            origins[name] = _variable(name) if source == "environment" else source
    try:
        values: Any = given["flag"]
        settings = _reading(file)(**values)
    except ValidationError as error:
        raise SettingsError(_explained(error, origins)) from error
    settings.check_numbers()
    return settings.with_origins(origins, _as_arguments(file, flags))


def _reading(file: Path | None) -> type[Settings]:
    """Settings that read this file: pydantic-settings takes its name from the class."""

    class SettingsOfFile(Settings):
        model_config = SettingsConfigDict(toml_file=file)

    return SettingsOfFile


def _config_file(config: Path | None) -> Path | None:
    named = config or (Path(os.environ[CONFIG_VARIABLE]) if os.environ.get(CONFIG_VARIABLE) else None)
    if named is None:
        return DEFAULT_FILE if DEFAULT_FILE.is_file() else None
    if not named.is_file():
        where = "--config" if config else CONFIG_VARIABLE
        raise SettingsError(f"{where} names {named}, which is not a file: give the path of a TOML file")
    return named


def _read_file(file: Path | None) -> Tree:
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):
            raise SettingsError(f"{file} begins with a byte order mark: save it as UTF-8 without one")
        tree = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{file} is not readable as TOML: {error}") from error
    for section, values in tree.items():
        if not isinstance(values, dict):
            where = f"below a line such as [{_nearest_section(section)}]"
            raise SettingsError(f"{file}: {section} stands outside of a section: write it {where}")
        for field in values:
            _refuse_unknown(f"{section}.{field}", f"{file}: there is no setting ")
        if section not in Settings.model_fields:
            near = _did_you_mean(section, list(Settings.model_fields))
            raise SettingsError(f"{file}: there is no section [{section}]{near}")
    return tree


def _read_environment() -> Tree:
    known = {_variable(name): name for name in setting_names()}
    tree: Tree = {}
    for variable, value in os.environ.items():
        if not variable.upper().startswith(PREFIX) or variable in OTHER_VARIABLES:
            continue
        if variable.upper() not in known:
            raise SettingsError(
                f"there is no setting {variable}{_did_you_mean(variable.upper(), [*known, *OTHER_VARIABLES])}"
            )
        section, field = known[variable.upper()].split(".")
        tree.setdefault(section, {})[field] = value
    return tree


def _read_flags(flags: Sequence[str]) -> Tree:
    tree: Tree = {}
    for flag in flags:
        name, equals, value = flag.partition("=")
        if not equals:
            raise SettingsError(f"--set {flag}: write it as section.field=value")
        _refuse_unknown(name, "--set: there is no setting ")
        section, field = name.split(".")
        if is_secret(name):
            raise SettingsError(
                f"--set {name}: every process can read a command line; give it as {_variable(name)} instead"
            )
        tree.setdefault(section, {})[field] = value
    return tree


def _table(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise SettingsError(f'{name} is {text!r}: write it as JSON, {{"name": "value"}}') from error


def _as_arguments(file: Path | None, flags: Sequence[str]) -> list[str]:
    arguments = ["--config", str(file)] if file is not None else []
    for flag in flags:
        arguments += ["--set", flag]
    return arguments


def _refuse_unknown(name: str, prefix: str) -> None:
    if name not in setting_names():
        raise SettingsError(f"{prefix}{name}{_did_you_mean(name, setting_names())}")


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else "; `dylora-stream config show` lists all of them"


def _nearest_section(name: str) -> str:
    for known in setting_names():
        section, field = known.split(".")
        if field == name:
            return section
    return "model"


def _variable(name: str) -> str:
    return PREFIX + name.replace(".", DELIMITER).upper()


def _explained(error: ValidationError, origins: Mapping[str, str]) -> str:
    """One line a wrong value: its name, what is wrong with it, and where it was set."""
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"][:2])
        message = problem["msg"].removeprefix("Value error, ")
        if "." in name:
            shown = "hidden" if is_secret(name) else repr(problem["input"])
            message = f"{name} is {shown}: {message}"
        elif name and not message.startswith(f"{name}."):
            message, name = f"{name}.{message}", f"{name}.{message.split(' ')[0]}"
        else:
            name = message.split(" ")[0]
        origin = origins.get(name)
        lines.append(f"{message} (from {origin})" if origin else message)
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
