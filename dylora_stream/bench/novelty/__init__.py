"""How well new kinds of records are told from known ones, and gathered into skills, on any folder of tasks.

- `config` what is asked for · `folder` rows of a dataset folder, outliers · `reading` their features, kept
- `judging` leave one task out, out of scope · `alarms` known rows called novel · `cost` what scoring takes
- `scale` what learn holds when rows do not stop
- `script` a stream of records · `learner` the daemon's learn loop in memory · `child` its jobs · `tally` figures
- `metrics` areas, rates, agreement · `report` JSON and tables · `plots` pictures · `run` all of it
"""

from dylora_stream.bench.novelty.config import NoveltyBenchConfig
from dylora_stream.bench.novelty.run import novelty

__all__ = ["NoveltyBenchConfig", "novelty"]
