"""Answers: requests in, one routed forward pass and its decoding, answers out.

Batches are length-sorted, so that little padding is computed. Decoding is greedy with a KV cache and ends a row at its
end token; rows that ended leave the batch when enough of them did. `choices` are ranked by mean log-likelihood to the
end token, without which `entail` beats `entailment`; a prompt's cache is computed once and shared by all its choices.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from dylora_stream.core.errors import BadRecord, ExpertCorrupt, ModelMismatch, SettingsError
from dylora_stream.core.experts import ExpertVersion, Maturity, Registry
from dylora_stream.core.messages import Answer, Novelty, Request, RoutingWeight
from dylora_stream.core.novelty import NoveltyScores
from dylora_stream.core.ports import Activation, ExpertStore, LoadFailure
from dylora_stream.model.backbone import Backbone, Tokens
from dylora_stream.model.config import GenerationConfig
from dylora_stream.model.decoding import generate, rank_choices
from dylora_stream.model.features import length_sorted, longest_row, read_rows
from dylora_stream.model.live import LiveExperts, LoadedExpert, Pass, read_expert
from dylora_stream.model.network import RouterNetwork

__all__ = ["MixtureAnswerer"]

SERVED = (Maturity.NASCENT, Maturity.MATURE)
LEAST_ROOM = 8  # tokens of a prompt


class MixtureAnswerer:
    """`core.ports.Answerer` on a frozen backbone and a pool of experts. Not thread-safe."""

    def __init__(
        self, live: LiveExperts, store: ExpertStore, generation: GenerationConfig, max_input_tokens: int
    ) -> None:
        self._live, self._store, self._generation = live, store, generation
        self._backbone = live.backbone
        self._max_tokens = _room(self._backbone, max_input_tokens, generation.max_new_tokens)
        self._max_characters = self._max_tokens * _longest_token(self._backbone)
        self._network: RouterNetwork | None = None
        self._network_source = ""

    @property
    def feature_space(self) -> str:
        """The name of the space that answers' features live in."""
        return self._live.feature_space

    def activate(self, registry: Registry) -> tuple[LoadFailure, ...]:
        """`prepare`, and the swap at once."""
        return self.prepare(registry)()

    def prepare(self, registry: Registry) -> Activation:
        """See the port. Versions that are live already are not read again; everything is swapped at the end.

        Raises ModelMismatch, and changes nothing, for a registry of another backbone or feature space.
        """
        self._check(registry)
        live = {expert.expert_id: expert for expert in self._live.experts}
        failed: list[LoadFailure] = []
        chosen: list[LoadedExpert] = []
        for version in registry.experts:
            if version.maturity not in SERVED:
                continue
            old = live.get(version.expert_id)
            try:
                chosen.append(self._loaded(version, old))
            except (ExpertCorrupt, ModelMismatch) as error:
                failed.append(_failure(version.name, error))
                if old is not None:
                    chosen.append(old)
        slots = self._live.pool.slots
        full = ModelMismatch(f"all {slots} slots are taken: raise pool.slots, or retire an expert")
        failed += [_failure(expert.name, full) for expert in chosen[slots:]]
        del chosen[slots:]
        network, source = self._network, self._network_source
        try:
            network, source = self._router_of(registry)
        except (ExpertCorrupt, ModelMismatch) as error:
            failed.append(_failure("router", error))
        install = self._live.prepared(chosen, network)

        def activate() -> tuple[LoadFailure, ...]:
            install()
            self._network, self._network_source = network, source
            return tuple(failed)

        return activate

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer a request, in order. Raises BadRecord for the first that is too long or has too many choices."""
        for request in requests:
            self._admit_texts(request.input, request.choices)
        prompts = self._backbone.prompt_ids([request.input for request in requests])
        targets = [self._admit(request, prompt) for request, prompt in zip(requests, prompts, strict=True)]
        answers: dict[int, Answer] = {}
        for kind in (False, True):
            rows = [row for row, request in enumerate(requests) if bool(request.choices) is kind]
            for batch in length_sorted([len(prompts[row]) for row in rows], self._generation.micro_batch):
                chosen = [rows[place] for place in batch]
                tokens = self._backbone.pad([prompts[row] for row in chosen])
                part = self._batch(
                    [requests[row] for row in chosen], tokens, [targets[row] for row in chosen]
                )
                answers.update(zip(chosen, part, strict=True))
        return [answers[row] for row in range(len(requests))]

    def score(self, inputs: Sequence[str], tenant: str) -> list[Novelty]:
        """Novelty of texts; runs the stem alone."""
        for text in inputs:
            self._admit_texts(text)
        for text, prompt in zip(inputs, self._backbone.prompt_ids(inputs), strict=True):
            self._admit_length(len(prompt), text)
        router = self._live.router
        scores = router.score(read_rows(self._backbone, inputs), router.allowed([tenant] * len(inputs)))
        return [self._novelty(scores, row) for row in range(len(inputs))]

    def close(self) -> None:
        """Take every hook off the backbone. May be called twice."""
        self._live.close()

    @torch.no_grad()
    def _batch(
        self, requests: Sequence[Request], tokens: Tokens, targets: Sequence[Sequence[list[int]]]
    ) -> list[Answer]:
        """One micro-batch, all with choices or all without."""
        inputs, tenants = zip(*((request.input, request.tenant) for request in requests), strict=True)
        with self._live.serving(tokens, inputs, tenants) as current:
            if requests[0].choices:
                best = rank_choices(self._backbone, self._live.pool, tokens, targets)
                outputs = [request.choices[index] for request, index in zip(requests, best, strict=True)]
            else:
                ids = generate(self._backbone, self._live.pool, tokens, self._generation.max_new_tokens)
                outputs = [self._backbone.decode(row) for row in ids]
        return [self._answer(current, row, output) for row, output in enumerate(outputs)]

    def _answer(self, current: Pass, row: int, output: str) -> Answer:
        assert current.routed is not None
        assert current.features is not None
        routing, scores = current.routed.routing, current.routed.scores
        weights = tuple(self._weight(expert, weight) for expert, weight in routing.members(row))
        return Answer(
            output=output,
            policy=routing.policies[row],
            weights=weights,
            novelty=self._novelty(scores, row),
            features=current.features[row],
        )

    def _weight(self, index: int, weight: float) -> RoutingWeight:
        if index < 0:
            return RoutingWeight(expert=None, version=0, weight=weight)
        expert = self._live.experts[index]
        return RoutingWeight(expert=expert.expert_id, version=expert.version, weight=weight)

    def _novelty(self, scores: NoveltyScores, row: int) -> Novelty:
        p_value, nearest = float(scores.p_value[row]), int(scores.nearest[row])
        return Novelty(
            score=float(scores.score[row]),
            p_value=None if np.isnan(p_value) else p_value,
            entropy=float(scores.entropy[row]),
            nearest=self._live.experts[nearest].expert_id if nearest >= 0 else None,
            is_novel=bool(scores.is_novel[row]),
        )

    def _loaded(self, version: ExpertVersion, old: LoadedExpert | None) -> LoadedExpert:
        """The version in memory: what is live already, or read from the store."""
        is_mature = version.maturity is Maturity.MATURE
        if old is not None and (old.version, old.source) == (version.version, version.storage.sha256):
            return replace(old, is_mature=is_mature, tenant=version.tenant)
        if version.prompt_template not in ("", self._backbone.template.text):
            raise ModelMismatch(f"{version.name} was trained with another prompt template")
        expert = read_expert(self._store.open(version.storage), version.expert_id, version.version)
        expert = replace(expert, is_mature=is_mature, tenant=version.tenant, source=version.storage.sha256)
        self._live.check(expert)
        return expert

    def _router_of(self, registry: Registry) -> tuple[RouterNetwork | None, str]:
        if registry.router is None:
            return None, ""
        if registry.router.sha256 == self._network_source:
            return self._network, self._network_source
        network = RouterNetwork.load(self._store.open(registry.router), self._backbone.width)
        return network.to(self._backbone.device), registry.router.sha256

    def _check(self, registry: Registry) -> None:
        for what, found, own in (
            ("backbone", registry.backbone, self._backbone.digest),
            ("feature space", registry.feature_space, self.feature_space),
        ):
            if found not in ("", own):
                raise ModelMismatch(
                    f"the registry was made for the {what} {found[:32]}, this process runs {own[:32]}: "
                    "set model.name, model.stem_layers and model.feature_layers back, or use another topic prefix with "
                    "another store.folder"
                )

    def _admit(self, request: Request, prompt: list[int]) -> list[list[int]]:
        """The choices' token ids. Raises BadRecord for what cannot be answered."""
        self._admit_length(len(prompt), request.input)
        if len(request.choices) > self._generation.max_choices:
            raise BadRecord(
                "too_many_choices",
                f"{len(request.choices)} choices; generation.max_choices is {self._generation.max_choices}",
                stage="answer",
            )
        targets = self._backbone.target_ids(request.choices)
        longest = max((len(target) for target in targets), default=0)
        room = self._max_tokens + self._generation.max_new_tokens - len(prompt)
        if longest > room:
            raise BadRecord(
                "choice_too_long",
                f"a choice has {longest} tokens, beside this input are {room}",
                stage="answer",
            )
        return targets

    def _admit_texts(self, text: str, choices: Sequence[str] = ()) -> None:
        """Before anything is cut into tokens, which takes seconds and a hundred times its size of a megabyte. Raises
        BadRecord for what has too many tokens, whatever they are."""
        if len(text) > self._max_characters:
            raise BadRecord(
                "input_too_long",
                f"{len(text)} characters are more than {self._max_tokens} tokens can be, the most that is answered",
                stage="answer",
            )
        if any(len(choice) > self._max_characters for choice in choices):
            raise BadRecord("choice_too_long", "a choice is longer than any answer can be", stage="answer")

    def _admit_length(self, tokens: int, text: str) -> None:
        if tokens > self._max_tokens:
            raise BadRecord(
                "input_too_long",
                f"{tokens} tokens ({len(text)} characters) are more than the {self._max_tokens} that are answered",
                stage="answer",
            )


def _failure(name: str, error: ExpertCorrupt | ModelMismatch) -> LoadFailure:
    """Files can be restored and a store can come back; what does not fit this process never will."""
    return LoadFailure(name=name, reason=str(error), may_pass=isinstance(error, ExpertCorrupt))


def _room(backbone: Backbone, max_input_tokens: int, max_new_tokens: int) -> int:
    """Tokens of a prompt: the setting, within what the model's positions leave beside an answer."""
    positions = longest_row(backbone)
    if positions - max_new_tokens < LEAST_ROOM:
        raise SettingsError(
            f"generation.max_new_tokens is {max_new_tokens}, but {backbone.name} has {positions} positions for input "
            f"and answer together: set it to at most {max(1, positions - LEAST_ROOM)}; half of them is plenty"
        )
    return min(max_input_tokens, positions - max_new_tokens)


def _longest_token(backbone: Backbone) -> int:
    """Characters of the longest one there is."""
    return max(map(len, backbone.tokenizer.get_vocab()), default=1)
