"""The command line: arguments in, exit codes out. The work is done by `bootstrap` and the rooms.

Exit codes: 0 well, 1 failed, 2 a wrong setting or argument, 3 the broker, 4 a store, 5 the model, 130 Ctrl-C,
143 SIGTERM.
"""

import os
import signal
import sys
from typing import NoReturn

import typer

from dylora_stream.cli import daemon, letters, machine, showcase, streams, views
from dylora_stream.core.errors import DyloraError

__all__ = ["app", "main"]

INTERRUPTED = 130
TERMINATED = 143
# Turns that a thread of OpenMP waits awake for its next piece of work before it sleeps, about a tenth of a millisecond.
# Waking for each of a pass's hundreds of products costs a quarter of its time (16 rows, 16 new tokens, 2 threads:
# 1.13 s when they sleep at once, 0.83 s so); waiting awake for long takes a core from the training child.
SPIN = "20000"

HELP = """A language model behind a Kafka topic that grows a LoRA expert for each new kind of record.

To see it work, without a broker or a file of your own: **dylora-stream demo**

To run it on one machine:

1. **dylora-stream broker** in one terminal (or set kafka.bootstrap_servers to your Kafka)

2. **dylora-stream run** in another

3. **dylora-stream produce requests.jsonl** sends records; answers arrive in the topic dylora.results

When something does not work: **dylora-stream doctor**. What can be set: **dylora-stream config show**.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (daemon, streams, views, letters, machine, showcase):
    group.register(app)


def main() -> NoReturn:
    """Run the command line and end the process; our own errors are one line, without a traceback.

    SIGTERM and a closed terminal unwind like Ctrl-C, so that what a command started ends with it; the daemon's roles
    install their own. `nohup` stays what it is.
    """
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(TERMINATED))
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda _number, _frame: sys.exit(TERMINATED))
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN)  # before torch
    try:
        app()
    except DyloraError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - this is where errors are printed
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit(0)
