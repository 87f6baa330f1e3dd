"""The command `bench continual`."""

from pathlib import Path
from typing import Annotated

import typer

from dylora_stream.cli.options import ConfigOption, SetOption, settings_from

__all__ = ["continual"]


def continual(
    data: Annotated[
        Path,
        typer.Option(
            help="A folder of NAME.train.jsonl and NAME.test.jsonl: a row a line, input and output."
        ),
    ],
    tasks: Annotated[str | None, typer.Option(metavar="A,B,…", help="Tasks, in the order they come.")] = None,
    orders: Annotated[
        str | None,
        typer.Option(metavar="A,B;B,A;…", help="Several orders of the same tasks, in place of --tasks."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="Gates, as router.method names them, and the fence posts sequential, oracle and joint; or all. "
            "Else hybrid, closed_form, mora, olora, sequential, oracle.",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="N,…", help="Of training rows and of training.")] = "0",
    train_rows: Annotated[
        int, typer.Option(min=1, help="Rows of each task to train on, drawn by seed.")
    ] = 128,
    test_rows: Annotated[int, typer.Option(min=1, help="Rows of each task to test on.")] = 100,
    max_tokens: Annotated[
        int, typer.Option(min=8, help="Of a row, answer included; longer rows are passed over and counted.")
    ] = 256,
    memory: Annotated[
        int, typer.Option(min=1, help="Stored rows of each expert, for gates that learn from them.")
    ] = 32,
    epochs: Annotated[int | None, typer.Option(min=1, help="Else seeding.epochs.")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate; else seeding.rate.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Else seeding.rank; alpha keeps its ratio to it.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows of a step; else seeding.batch_size.")] = None,
    stem: Annotated[
        int | None, typer.Option(min=1, help="Layers of the stem; else model.stem_layers.")
    ] = None,
    targets: Annotated[
        str,
        typer.Option(
            help="Layers that experts adapt: all, attention, mlp, or parts of names, as q_proj,v_proj."
        ),
    ] = "all",
    whole_matrix: Annotated[
        bool,
        typer.Option(
            "--whole-matrix", help="Score every task after each one, not the diagonal and the end alone."
        ),
    ] = False,
    work: Annotated[
        Path | None,
        typer.Option(help="Where what is computed is kept; else bench/continual in store.folder."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write the numbers to this file, as JSON, and plots beside it.")
    ] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """What each method still knows after tasks that came one after another, with no task label at test time.

    Experts that several methods, orders or runs share are trained once; a run that was stopped goes on where it was.
    """
    from rich.console import Console

    from dylora_stream.bench.continual import ContinualConfig
    from dylora_stream.bench.continual import continual as measure
    from dylora_stream.bench.continual.config import DEFAULT_METHODS

    if (tasks is None) == (orders is None):
        raise typer.BadParameter("give either --tasks or --orders", param_hint="--tasks")
    try:
        numbers = tuple(int(seed) for seed in _parts(seeds, ","))
    except ValueError:
        raise typer.BadParameter(f"{seeds!r} is not numbers with commas", param_hint="--seeds") from None
    asked = ContinualConfig(
        data=data,
        orders=tuple(_parts(order, ",") for order in _parts(orders or tasks or "", ";")),
        methods=_parts(methods, ",") if methods is not None else DEFAULT_METHODS,
        seeds=tuple(dict.fromkeys(numbers)),
        train_rows=train_rows,
        test_rows=test_rows,
        max_tokens=max_tokens,
        memory=memory,
        epochs=epochs,
        rate=rate,
        rank=rank,
        batch=batch,
        stem=stem,
        targets=targets,
        is_whole_matrix=whole_matrix,
        work=work,
        report=report,
    )
    measure(asked, settings_from(config, assignments), Console())


def _parts(text: str, separator: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(separator) if part.strip())
