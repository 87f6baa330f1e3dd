"""The parts that roles and tools are made of, each constructed here and nowhere else."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from dylora_stream.core.errors import ExpertCorrupt, SettingsError
from dylora_stream.core.experts import ExpertVersion
from dylora_stream.core.messages import Topic
from dylora_stream.core.ports import ExpertStore, IndexFactory
from dylora_stream.core.routing import SERVED_METHODS
from dylora_stream.core.statistics import ExpertStatistics
from dylora_stream.settings import Settings
from dylora_stream.store.experts import FolderStore
from dylora_stream.store.identity import folder_id
from dylora_stream.stream.broker import is_embedded
from dylora_stream.stream.codec import RecordLimits
from dylora_stream.stream.kafka import KafkaConfig
from dylora_stream.stream.topics import ensure_topics
from dylora_stream.stream.wire import WireCodec

if TYPE_CHECKING:
    from dylora_stream.model.answering import MixtureAnswerer
    from dylora_stream.model.backbone import Backbone
    from dylora_stream.model.router import RouterParts
    from dylora_stream.store.database import DuckLedger

__all__ = [
    "SystemClock", "broker_folder", "check_method", "create_topics", "expert_store", "faiss_index", "fetch_model",
    "instance_of", "kafka_of", "ledger_file", "load_backbone", "mixture_answerer", "model_path", "open_ledger",
    "router_parts", "settings_within", "statistics_loader", "wire_codec",
]  # fmt: skip

EMBEDDED_INSTANCE = "0"

log = structlog.get_logger(__name__)


class SystemClock:
    """`core.ports.Clock` on the machine's."""

    def now_ms(self) -> int:
        """See the port."""
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        """See the port."""
        return time.monotonic()


def model_path(settings: Settings) -> Path:
    """Where the configured model lies, or will."""
    from dylora_stream.model.config import model_folder

    return model_folder(settings.model, settings.store.folder)


def settings_within(settings: Settings, folder: Path) -> Settings:
    """The same settings with all that is written below `folder`, for this process and its child; the model stays."""
    folder, model = folder.absolute(), model_path(settings).absolute()
    changes = {"store.folder": folder, "store.experts": "", "model.folder": model}
    flags = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    parts = {
        "store": replace(settings.store, folder=folder, experts=""),
        "model": replace(settings.model, folder=model),
    }
    return settings.model_copy(update=parts).with_origins({}, [*settings.arguments, *flags])


def fetch_model(settings: Settings, tell: Callable[[str], None]) -> Path:
    """The model's folder, fetched if it is not there. In a process of its own, so that this one stays without torch."""
    from dylora_stream.model.fetch import fetch_backbone, is_model_folder

    folder, model = model_path(settings), settings.model
    if is_model_folder(folder):
        return folder
    return fetch_backbone(folder, tell, model.name, with_code=model.trust_remote_code)


def load_backbone(settings: Settings) -> "Backbone":
    """The configured model, fetched first where it is missing. Imports torch."""
    from dylora_stream.model import backbone

    fetch_model(settings, lambda line: log.info("model_fetched", detail=line))
    return backbone.load_backbone(settings.model, model_path(settings))


def mixture_answerer(settings: Settings, backbone: "Backbone") -> "MixtureAnswerer":
    """The model as serve sees it, without experts yet."""
    from dylora_stream.model.answering import MixtureAnswerer
    from dylora_stream.model.live import LiveExperts

    live = LiveExperts(backbone, settings.pool, router_parts(settings))
    return MixtureAnswerer(live, expert_store(settings), settings.generation, settings.model.max_input_tokens)


def check_method(settings: Settings) -> None:
    """Whether the daemon can serve `router.method`. Raises SettingsError, which lists the methods that it can."""
    if settings.router.method not in SERVED_METHODS:
        raise SettingsError(
            f"router.method is {settings.router.method!r}, which learns from stored rows or trains its experts "
            "together: measure it with `dylora-stream bench continual`; the daemon serves "
            + ", ".join(SERVED_METHODS)
        )


def router_parts(settings: Settings) -> "RouterParts":
    """What every router of this process is built with. Raises SettingsError for a method that is not served."""
    from dylora_stream.model.gates import gate_named
    from dylora_stream.model.router import RouterParts

    check_method(settings)
    return RouterParts(
        gate=gate_named(settings.router.method, settings.router),
        novelty=settings.novelty,
        index_factory=faiss_index(),
    )


def expert_store(settings: Settings) -> FolderStore:
    """Where experts lie."""
    url = settings.store.experts or str((settings.store.folder / "experts").absolute())
    return FolderStore(url, settings.store.folder / "cache")


def open_ledger(settings: Settings) -> "DuckLedger":
    """Learn's database, made where it is missing; DatabaseBusy when learn is running."""
    from dylora_stream.store.database import DatabaseConfig, DuckLedger

    config = DatabaseConfig(memory_limit=settings.store.memory_limit, threads=settings.store.threads)
    return DuckLedger(ledger_file(settings), config)


def ledger_file(settings: Settings) -> Path:
    """Where learn's database lies, once learn has run."""
    return settings.store.folder / "learn.duckdb"


def faiss_index() -> IndexFactory:
    """FAISS, one index an expert."""
    from dylora_stream.store.index import FaissIndex

    return FaissIndex


def statistics_loader(store: ExpertStore) -> Callable[[ExpertVersion], ExpertStatistics]:
    """Reads an expert's statistics out of its folder."""
    from safetensors.numpy import load_file

    def load(version: ExpertVersion) -> ExpertStatistics:
        path = store.open(version.storage) / "statistics.safetensors"
        try:
            tensors = load_file(path)
            rows, answers = tensors["features"], tensors.get("sketches")
        except (OSError, ValueError, KeyError) as error:
            raise ExpertCorrupt(
                f"{path} cannot be read: {error}; retire {version.name} or restore its folder"
            ) from error
        if answers is not None and len(answers) != len(rows):
            raise ExpertCorrupt(f"{path} has {len(rows)} feature rows and {len(answers)} answer rows")
        counts = tensors.get("counts")
        if counts is not None and counts.shape != (len(rows),):
            raise ExpertCorrupt(f"{path} has {len(rows)} feature rows and counts of shape {counts.shape}")
        return ExpertStatistics(
            expert_id=version.expert_id,
            rows=rows,
            tenant=version.tenant,
            answers=answers,
            counts=counts,
        )

    return load


def instance_of(settings: Settings) -> str:
    """What tells this machine's processes from another's: `kafka.instance`, or the data folder's own id.

    The embedded broker keeps its data in that folder too, and never lets a member go that was killed: for it the name
    is a fixed one, so that whoever comes next takes the member's place.
    """
    if settings.kafka.instance:
        return settings.kafka.instance
    return EMBEDDED_INSTANCE if _uses_embedded(settings) else folder_id(settings.store.folder)


def kafka_of(settings: Settings, instance: str, group: str | None = None) -> KafkaConfig:
    """The broker as one client of this process sees it."""
    return replace(
        settings.kafka,
        instance=instance,
        group=group or settings.kafka.group,
        is_embedded=_uses_embedded(settings),
    )


def _uses_embedded(settings: Settings) -> bool:
    return is_embedded(settings.kafka.bootstrap_servers, broker_folder(settings))


def wire_codec(settings: Settings, name: str) -> WireCodec:
    """The codec of the worker of this name, with the limits that are configured."""
    limits = RecordLimits(max_choices=settings.generation.max_choices)
    return WireCodec(source=f"/dylora/{name}", limits=limits)


def create_topics(settings: Settings) -> list[Topic]:
    """The topics that are missing, created."""
    return ensure_topics(settings.kafka, settings.topics)


def broker_folder(settings: Settings) -> Path:
    """Where the embedded broker keeps its data."""
    return settings.store.folder / "broker"
