"""Both loops, wired to whatever ports they are given: Kafka's by the roles, a broker in memory by `driver`.

Importing this loads neither torch nor a loop; learn's is made without torch.
"""

import sys
import uuid
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import structlog

from dylora_stream.bootstrap.parts import faiss_index, fetch_model, statistics_loader
from dylora_stream.settings import Settings

if TYPE_CHECKING:
    from dylora_stream.learn.curator import Curator
    from dylora_stream.learn.jobs import ChildProcess
    from dylora_stream.learn.knowledge import Knowledge
    from dylora_stream.learn.service import LearnPorts, LearnService
    from dylora_stream.learn.training import Training
    from dylora_stream.model.backbone import Backbone
    from dylora_stream.serve.service import ServePorts, ServeService

__all__ = ["LearnLoop", "child_process", "learn_service", "serve_service"]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LearnLoop:
    """The learn loop, and what decides in it."""

    service: "LearnService"
    curator: "Curator"
    knowledge: "Knowledge"


def serve_service(settings: Settings, ports: "ServePorts", backbone: "Backbone") -> "ServeService":
    """The serve loop of one boot."""
    from dylora_stream.model.features import feature_space
    from dylora_stream.serve.pipeline import Pipeline, PipelineConfig
    from dylora_stream.serve.service import ServeService, Worker

    rules = PipelineConfig(sample_share=settings.serve.sample_share)
    pipeline = Pipeline(ports.answerer, ports.codec, ports.clock, rules)
    worker = Worker(model=backbone.name, feature_space=feature_space(backbone), boot=uuid.uuid4().hex[:12])
    return ServeService(ports, pipeline, settings.serve, worker)


def learn_service(settings: Settings, ports: "LearnPorts", feedback_topic: str) -> LearnLoop:
    """The learn loop with what the ledger holds; jobs lie in `store.folder`."""
    from dylora_stream.learn.curator import Curator, CuratorConfig
    from dylora_stream.learn.knowledge import Knowledge
    from dylora_stream.learn.service import LearnFolders, LearnService

    knowledge = Knowledge(statistics_loader(ports.store), faiss_index(), settings.novelty)
    rules = CuratorConfig(
        lifecycle=settings.lifecycle, clustering=settings.clustering, slots=settings.pool.slots
    )
    state = ports.ledger.load(settings.lifecycle.expert_texts)
    curator = Curator(state, knowledge, ports.codec, ports.clock, rules)
    training = _training(settings)
    home = settings.store.folder.absolute()
    folders = LearnFolders(
        jobs=home / "jobs",
        reference=home / f"reference-{training.feature_space}.safetensors",  # it belongs to one feature space
        feedback_topic=feedback_topic,
    )
    service = LearnService(ports, curator, settings.learn, training, folders)
    return LearnLoop(service, curator, knowledge)


def child_process(settings: Settings) -> "ChildProcess":
    """Learn's child, not started yet."""
    from dylora_stream.learn.jobs import ChildConfig, ChildProcess

    environment = {
        "OMP_NUM_THREADS": str(settings.learn.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = (sys.executable, "-m", "dylora_stream", "child", *settings.arguments)
    return ChildProcess(
        ChildConfig(command=command, environment=environment, niceness=settings.learn.niceness)
    )


def _training(settings: Settings) -> "Training":
    """What every job carries; the backbone is named by its files, not loaded."""
    from dylora_stream.learn.training import Training
    from dylora_stream.model.identity import DEFAULT_TEMPLATE, feature_space_name, folder_digest

    digest = folder_digest(fetch_model(settings, lambda line: log.info("model_fetched", detail=line)))
    return Training(
        seeding=settings.seeding,
        consolidation=settings.consolidation,
        check=asdict(settings.check),
        backbone=digest,
        feature_space=feature_space_name(settings.model.read_layers, digest),
        prompt_template=DEFAULT_TEMPLATE,
        rank=settings.pool.rank,
    )
