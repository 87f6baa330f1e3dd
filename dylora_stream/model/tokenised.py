"""Labelled rows as the model takes them: the tokens of prompt and answer, and padded batches of both."""

from collections.abc import Sequence
from dataclasses import dataclass

from dylora_stream.model.backbone import Backbone, Tokens
from dylora_stream.model.features import LabelledText

__all__ = ["TokenRow", "padded", "tokenised"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One row's token ids; the answer's end with the end token."""

    prompt: list[int]
    target: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


def tokenised(backbone: Backbone, rows: Sequence[LabelledText]) -> list[TokenRow]:
    """Each row's tokens."""
    prompts = backbone.prompt_ids([row.input for row in rows])
    targets = backbone.target_ids([row.output for row in rows])
    return [TokenRow(prompt=prompt, target=target) for prompt, target in zip(prompts, targets, strict=True)]


def padded(backbone: Backbone, rows: Sequence[TokenRow]) -> Tokens:
    """A left-padded batch of them."""
    return backbone.pad([row.prompt for row in rows], [row.target for row in rows])
