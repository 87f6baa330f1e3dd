"""The trained part of the router: attention pooling over the stem's token states, a hidden layer, one column an expert.

Its output is added to the closed form's logits. Columns start at zero, so that an expert nobody trained a column for is
routed by the closed form alone. The shared layers are fitted once and then stay, and so do old columns: a new expert
only ever adds a column.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dylora_stream.core.errors import ExpertCorrupt, ModelMismatch

__all__ = ["COLUMN", "ROUTER_FILE", "RouterNetwork"]

ROUTER_FILE = "router.safetensors"
COLUMN = "of:"  # before an expert's id, so that an expert may be called `keys`
HIDDEN = 64  # units; the whole network costs under 1 % of a forward pass of the smallest backbone


class RouterNetwork(nn.Module):
    """Token states → one number an expert, in tempered nats. Works in float32 whatever the backbone's type."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.width = width
        self.query = nn.Parameter(torch.zeros(width))  # zero: attention starts as the mean
        self.hidden = nn.Parameter(torch.randn((HIDDEN, width), generator=generator) * width**-0.5)
        self.columns = nn.ParameterDict()
        self.is_fitted = False  # whether the shared layers have been trained; from then on they stay

    def forward(self, states: Tensor, mask: Tensor, expert_ids: Sequence[str]) -> Tensor:
        """states (B, T, d), mask (B, T) → (B, E) float32 in the order of `expert_ids`, 0 where there is no column."""
        return self.scores(self.pool(states, mask), expert_ids)

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """(B, d): normalised token states, averaged by attention; the first token is left out, as in the features."""
        mask = mask.to(states.device).bool()
        kept = mask & ((mask.cumsum(-1) != 1) | (mask.sum(-1, keepdim=True) == 1))
        tokens = nn.functional.layer_norm(states.float(), (self.width,))
        attention = (tokens @ self.query * self.width**-0.5).masked_fill(~kept, -torch.inf).softmax(-1)
        return (attention[:, None] @ tokens)[:, 0]

    def scores(self, pooled: Tensor, expert_ids: Sequence[str]) -> Tensor:
        """pooled (B, d) → (B, E) float32."""
        units = torch.tanh(pooled @ self.hidden.t())  # (B, HIDDEN)
        zero = torch.zeros(HIDDEN, device=units.device)
        return units @ torch.stack([self._column(name, zero) for name in expert_ids]).t()

    def add_column(self, expert_id: str) -> None:
        """A column of zeros for an expert that has none yet."""
        if expert_id not in self.expert_ids:
            self.columns[COLUMN + expert_id] = nn.Parameter(torch.zeros(HIDDEN, device=self.hidden.device))

    def column(self, expert_id: str) -> nn.Parameter:
        """An expert's column; KeyError without one."""
        return self.columns[COLUMN + expert_id]

    def opened(self, expert_id: str, expert_ids: Sequence[str]) -> list[nn.Parameter]:
        """Freeze all but what an expert's lesson may move: its column; the first time everything, and all columns."""
        self.requires_grad_(requires_grad=False)
        for name in (expert_id, *expert_ids):
            self.add_column(name)
        moved = [self.column(expert_id)]
        if not self.is_fitted:
            moved = [self.query, self.hidden, *(self.column(name) for name in expert_ids)]
        for parameter in moved:
            parameter.requires_grad_()
        return moved

    @property
    def expert_ids(self) -> tuple[str, ...]:
        """Experts that have a column."""
        return tuple(name.removeprefix(COLUMN) for name in self.columns)

    def save(self, folder: Path) -> None:
        """Write router.safetensors into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"experts": json.dumps(self.expert_ids), "is_fitted": json.dumps(self.is_fitted)}
        save_file(tensors, folder / ROUTER_FILE, metadata=metadata)

    @classmethod
    def load(cls, folder: Path, width: int) -> "RouterNetwork":
        """Read it back. Raises ExpertCorrupt, and ModelMismatch for one made for another backbone."""
        path = folder / ROUTER_FILE
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            expert_ids, is_fitted = json.loads(metadata["experts"]), bool(json.loads(metadata["is_fitted"]))
            found = int(tensors["query"].shape[0])
            if found != width:
                raise ModelMismatch(
                    f"the router in {folder} reads states of {found} numbers, the backbone has {width}"
                )
            network = cls(width)
            for expert_id in expert_ids:
                network.add_column(expert_id)
            network.load_state_dict(tensors)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ExpertCorrupt(
                f"the router in {path} cannot be read ({type(error).__name__}: {error})"
            ) from error
        network.is_fitted = is_fitted
        return network

    def _column(self, expert_id: str, default: Tensor) -> Tensor:
        column: Tensor = self.columns.get(COLUMN + expert_id, default)
        return column
