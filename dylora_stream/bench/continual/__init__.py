"""Tasks one after another, and what every method still knows at the end, with no task label at test time.

- `config` what is asked for · `tasks` rows · `parts`, `workbench` what methods share, experts trained once ·
  `store` what a killed run keeps
- `courses` a method's way through the tasks: `chain` a gate's, `fences` the fence posts' · `evaluate` exactness of rows
- `statistics` averages, forgetting, intervals · `report` JSON, tables, plots · `watch` progress · `run` all of it
"""

from dylora_stream.bench.continual.config import ContinualConfig
from dylora_stream.bench.continual.run import continual

__all__ = ["ContinualConfig", "continual"]
