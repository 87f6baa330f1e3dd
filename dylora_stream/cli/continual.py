"""The command `bench continual`."""

from pathlib import Path
from typing import Annotated

import typer

from dylora_stream.cli.options import (
    ConfigOption,
    SetOption,
    numbers_of,
    parts_of,
    report_target,
    settings_from,
)

__all__ = ["continual"]

DataOption = Annotated[
    Path,
    typer.Option(help="A folder of NAME.train.jsonl and NAME.test.jsonl: a row a line, input and output."),
]
TasksOption = Annotated[str | None, typer.Option(metavar="A,B,…", help="Tasks, in the order they come.")]
OrdersOption = Annotated[
    str | None,
    typer.Option(metavar="A,B;B,A;…", help="Several orders of the same tasks, in place of --tasks."),
]
MethodsOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,…",
        help="Gates, as router.method names them, and the fence posts sequential, oracle and joint; or all. "
        "hybrid_young is hybrid while every expert is young: all rows are shared. "
        "Else hybrid, closed_form, mora, olora, sequential, oracle.",
    ),
]
SeedsOption = Annotated[str, typer.Option(metavar="N,…", help="Of training rows and of training.")]
TrainRowsOption = Annotated[int, typer.Option(min=1, help="Rows of each task to train on, drawn by seed.")]
TestRowsOption = Annotated[int, typer.Option(min=1, help="Rows of each task to test on.")]
MaxTokensOption = Annotated[
    int, typer.Option(min=8, help="Of a row, answer included; longer rows are passed over and counted.")
]
MemoryOption = Annotated[
    int, typer.Option(min=1, help="Stored rows of each expert, for gates that learn from them.")
]
EpochsOption = Annotated[int | None, typer.Option(min=1, help="Else seeding.epochs.")]
TargetsOption = Annotated[
    str,
    typer.Option(help="Layers that experts adapt: all, attention, mlp, or parts of names, as q_proj,v_proj."),
]
WholeMatrixOption = Annotated[
    bool,
    typer.Option(
        "--whole-matrix", help="Score every task after each one, not the diagonal and the end alone."
    ),
]
WorkOption = Annotated[
    Path | None, typer.Option(help="Where what is computed is kept; else bench/continual in store.folder.")
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        callback=report_target, help="Also write the numbers to this file, as JSON, and plots beside it."
    ),
]


def continual(
    data: DataOption,
    tasks: TasksOption = None,
    orders: OrdersOption = None,
    methods: MethodsOption = None,
    seeds: SeedsOption = "0",
    train_rows: TrainRowsOption = 128,
    test_rows: TestRowsOption = 100,
    max_tokens: MaxTokensOption = 256,
    memory: MemoryOption = 32,
    epochs: EpochsOption = None,
    targets: TargetsOption = "all",
    whole_matrix: WholeMatrixOption = False,
    work: WorkOption = None,
    report: ReportOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """What each method still knows after tasks that came one after another, with no task label at test time.

    Experts that several methods, orders or runs share are trained once; a run that was stopped goes on where it was.
    For an ablation change a setting: --set seeding.rate, seeding.rank (with seeding.alpha, above 8 with pool.rank),
    model.stem_layers.
    """
    from rich.console import Console

    from dylora_stream.bench.continual import ContinualConfig
    from dylora_stream.bench.continual import continual as measure
    from dylora_stream.bench.continual.config import DEFAULT_METHODS

    asked = ContinualConfig(
        data=data,
        orders=_orders(tasks, orders),
        methods=parts_of(methods) if methods is not None else DEFAULT_METHODS,
        seeds=numbers_of(seeds, "--seeds"),
        train_rows=train_rows,
        test_rows=test_rows,
        max_tokens=max_tokens,
        memory=memory,
        epochs=epochs,
        targets=targets,
        is_whole_matrix=whole_matrix,
        work=work,
        report=report,
    )
    measure(asked, settings_from(config, assignments), Console())


def _orders(tasks: str | None, orders: str | None) -> tuple[tuple[str, ...], ...]:
    if (tasks is None) == (orders is None):
        raise typer.BadParameter("give either --tasks or --orders", param_hint="--tasks")
    return tuple(parts_of(order) for order in parts_of(orders or tasks, ";"))
