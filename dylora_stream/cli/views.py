"""Commands that look at experts, samples and topics, and the one that retires an expert."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dylora_stream.cli.options import BootstrapOption, ConfigOption, SetOption, settings_from
from dylora_stream.cli.tables import show

__all__ = ["register"]

ExpertArgument = Annotated[str, typer.Argument(metavar="EXPERT", help="An expert's id, or its beginning.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    experts = typer.Typer(help="What has been learned, as the newest registry has it.", no_args_is_help=True)
    experts.command("list")(list_experts)
    experts.command("show")(show_expert)
    experts.command("export")(export)
    experts.command("retire")(retire)
    samples = typer.Typer(help="What is kept for learning.", no_args_is_help=True)
    samples.command("stats")(sample_stats)
    samples.callback()(lambda: None)
    topics = typer.Typer(help="The topics on the broker.", no_args_is_help=True)
    topics.command("list")(list_topics)
    topics.command("create")(create_topics)
    app.add_typer(experts, name="experts", rich_help_panel="Looking")
    app.add_typer(samples, name="samples", rich_help_panel="Looking")
    app.add_typer(topics, name="topics", rich_help_panel="Looking")


def list_experts(
    config: ConfigOption = None, assignments: SetOption = None, bootstrap: BootstrapOption = None
) -> None:
    """One line an expert: version, maturity, tenant, training rows."""
    from dylora_stream.bootstrap import tools

    registry = tools.newest_registry(settings_from(config, assignments, bootstrap))
    table = Table("expert", "version", "maturity", "tenant", "rows", title=f"registry {registry.number}")
    for version in registry.experts:
        rows = str(version.trained_on.get("rows", ""))
        table.add_row(version.expert_id, str(version.version), version.maturity, version.tenant, rows)
    show(table if registry.experts else "No expert yet: the backbone answers alone.")


def show_expert(
    expert: ExpertArgument,
    config: ConfigOption = None,
    assignments: SetOption = None,
    bootstrap: BootstrapOption = None,
) -> None:
    """An expert's manifest, its parameters and their share of the backbone."""
    from dylora_stream.bootstrap import model_path, tools
    from dylora_stream.ops.artefacts import ADAPTER, count_parameters

    settings = settings_from(config, assignments, bootstrap)
    registry = tools.newest_registry(settings)
    version = registry.named(expert)
    folder = tools.expert_folder(settings, version)
    own, whole = count_parameters(folder, ADAPTER), count_parameters(model_path(settings))
    share = f"{own:,}, {own / whole:.2%} of the backbone's {whole:,}" if whole else f"{own:,}"
    table = Table(show_header=False, title=version.name)
    for name, value in {
        "skill": version.skill_id,
        "tenant": version.tenant,
        "maturity": version.maturity,
        "trained from version": version.parent if version.parent is not None else "none",
        "parameters": share,
        "LoRA": _listed(version.lora_config),
        "trained on": _listed(version.trained_on),
        "measured": _listed(version.metrics),
        "backbone": registry.backbone,
        "files": folder,
        "sha256": version.storage.sha256,
    }.items():
        table.add_row(name, str(value))
    show(table)


def export(
    expert: ExpertArgument,
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    with_rows: Annotated[
        bool, typer.Option("--with-rows", help="Also copy exemplars and statistics: rows of your stream.")
    ] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    bootstrap: BootstrapOption = None,
) -> None:
    """Copy an expert as a PEFT adapter folder, for `peft.PeftModel.from_pretrained` or any server that loads those."""
    from dylora_stream.bootstrap import tools
    from dylora_stream.ops.artefacts import export_expert

    settings = settings_from(config, assignments, bootstrap)
    version = tools.newest_registry(settings).named(expert)
    names = export_expert(tools.expert_folder(settings, version), target, with_rows=with_rows)
    typer.echo(f"{version.name} in {target}: {', '.join(names)}")


def retire(
    expert: ExpertArgument,
    is_sure: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Take an expert out of service: one that was taught wrong answers, is damaged, or takes a place in the pool.

    Its records go back to the backbone and the other experts; as new ones they may found another expert. Rows that it
    was taught are not learned from again, and its files are kept. Without a running learn this is written into its
    database, and takes effect when learn starts.
    """
    from dylora_stream.bootstrap import tools

    if not is_sure:
        typer.confirm(f"Take {expert} out of service? It cannot be taken back.", abort=True)
    if tools.retire(settings_from(config, assignments), expert):
        typer.echo(f"{expert} is being retired: see the event `expert.retired`, and `experts list`")
    else:
        typer.echo(f"{expert} is retired; the workers hear of it when learn starts")


def sample_stats(config: ConfigOption = None, assignments: SetOption = None) -> None:
    """Rows by state and clusters, from the running learn or, when none runs, from its database."""
    from dylora_stream.bootstrap import tools

    stats = tools.sample_stats(settings_from(config, assignments))
    rows = Table("state", "rows", title="rows")
    for state, count in stats["rows"].items():
        rows.add_row(state, str(count))
    names = ("cluster_id", "state", "row_count", "distinct_inputs", "rows_wanted", "tenant", "expert_id")
    clusters = Table(*(name.replace("_", " ") for name in names), title="clusters")
    for cluster in stats["clusters"]:
        clusters.add_row(*(str(cluster.get(name) or "") for name in names))
    show(rows, clusters)


def list_topics(
    config: ConfigOption = None, assignments: SetOption = None, bootstrap: BootstrapOption = None
) -> None:
    """Each topic's name on the broker, partitions and cleanup policy; exit code 1 when one is missing."""
    from dylora_stream.bootstrap import tools

    states = tools.topic_states(settings_from(config, assignments, bootstrap))
    table = Table("topic", "name", "partitions", "cleanup")
    for state in states:
        table.add_row(state.topic, state.name, str(state.partitions or "missing"), state.cleanup or "")
    show(table)
    if not all(state.partitions for state in states):
        raise typer.Exit(1)


def create_topics(
    config: ConfigOption = None, assignments: SetOption = None, bootstrap: BootstrapOption = None
) -> None:
    """Create the topics that are missing, as the `topics` settings say."""
    from dylora_stream import bootstrap as parts

    created = parts.create_topics(settings_from(config, assignments, bootstrap))
    typer.echo(f"created: {', '.join(created)}" if created else "all topics exist")


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
    )
