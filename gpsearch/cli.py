"""The command line: every command is a few lines over the library."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpsearch.errors import UserError

if TYPE_CHECKING:
    from gpsearch.study import Study

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Search H-LSTM architectures and grow-and-prune schedules for a device.",
)

RESULTS = Path("results")
Folder = Annotated[Path, typer.Argument(help="A results folder.")]
Device = Annotated[str, typer.Option(help="A device's name, or module:Class.")]


@app.command()
def run(
    out: Annotated[
        Path | None, typer.Option(help="Results folder; results/TASK-SPACE-DEVICE if not given.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any of these flags; flags win.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="What to learn (gpsearch tasks).")] = None,
    space: Annotated[
        str | None,
        typer.Option(
            help="Search space: a name (gpsearch spaces) or a .toml file; else the task's own."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Target device: a name (gpsearch devices) or module:Class.")
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            help="Finished trials in the folder in all, baselines and resumed ones included."
        ),
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(help="error and costs to minimise: error,latency,energy,flops,params,memory."),
    ] = None,
    constraint: Annotated[
        list[str] | None, typer.Option(help='Upper limit such as "latency_ms<=5"; repeatable.')
    ] = None,
    data: Annotated[str | None, typer.Option(help="The task's data, if not the package's.")] = None,
    timeout: Annotated[
        str | None, typer.Option(help="Stop after this long (90m, 2h); resumable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of proposals, weights and data order.")] = None,
    sampler: Annotated[str | None, typer.Option(help="tpe, nsga2 or random.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of every training, if not the space's.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads that train; 1 if not given, fastest at this size.")
    ] = None,
) -> None:
    """Start a search."""
    from gpsearch import tasks
    from gpsearch.settings import Settings
    from gpsearch.study import Study

    flags = {
        "task": task, "space": space, "device": device, "budget": budget,
        "objectives": objectives, "constraint": tuple(constraint or ()) or None, "data": data,
        "timeout": timeout, "seed": seed, "sampler": sampler, "epochs": epochs,
        "threads": threads,
    }  # fmt: skip
    rows, folder = Settings.read(config) if config else ({}, None)
    rows |= {name: value for name, value in flags.items() if value is not None}
    if rows.get("data"):
        rows["data"] = str(Path(rows["data"]).resolve())
    rows.setdefault("space", tasks.default_space(rows.get("task", Settings.task)))
    settings = Settings.of(rows)
    words = "-".join((settings.task, Path(settings.space).stem, settings.device))
    default = RESULTS / re.sub(r"[^\w.-]+", "_", words)
    _work(Study.create(out or Path(folder or default), settings))


@app.command()
def resume(
    folder: Folder,
    budget: Annotated[int | None, typer.Option(help="New total of finished trials.")] = None,
    timeout: Annotated[str | None, typer.Option(help="Stop after this long (90m, 2h).")] = None,
) -> None:
    """Go on with a search that was stopped, killed, or is to be longer."""
    from gpsearch.study import Study

    _work(Study(folder), lambda study: study.extend(budget, timeout))


@app.command()
def front(
    folder: Folder,
    form: Annotated[str, typer.Option("-f", "--format", help="table, csv or json.")] = "table",
) -> None:
    """Print a study's Pareto front."""
    from gpsearch import report
    from gpsearch.study import Study

    if form not in ("table", "csv", "json"):
        raise UserError(f"-f {form!r} is none of table, csv, json")
    typer.echo(report.front_text(report.Results.of(Study(folder)), form), nl=False)


@app.command()
def train(
    candidate: Annotated[Path, typer.Argument(help="A candidate's TOML file.")],
    task: Annotated[str, typer.Option(help="What to learn.")] = "speech",
    data: Annotated[
        Path | None, typer.Option(help="The task's data, if not the package's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for checkpoint, history and model.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights and data order.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads that train.")] = 1,
) -> None:
    """Train one candidate by its schedule, outside a study."""
    import torch

    from gpsearch import tasks
    from gpsearch.candidate import Candidate
    from gpsearch.compact import compact
    from gpsearch.deploy import save_model
    from gpsearch.kernels.memory import keep_freed_memory
    from gpsearch.progress import epoch_line
    from gpsearch.train import grow_and_prune

    chosen = Candidate.read(candidate)
    learned = tasks.find(task, data)
    folder = out or RESULTS / candidate.stem
    for note in learned.notes:
        typer.echo(f"note: {note}")
    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = grow_and_prune(
        learned.build(chosen.architecture),
        learned,
        chosen.schedule,
        chosen.training,
        folder=folder,
        seed=seed,
        listener=lambda epoch: typer.echo(epoch_line(epoch, chosen.training.epochs)),
    )
    deployed = compact(model)
    save_model(deployed, folder / "model.pt")
    (folder / "checkpoint.pt").unlink()
    scores = {split: learned.evaluate(deployed, split) for split in ("dev", "test")}
    for split, metrics in scores.items():
        told = (f"{k} {tasks.score_text(k, v, learned)}" for k, v in metrics.items())
        typer.echo(f"{split}: " + ", ".join(told))
    typer.echo(f"model: {folder / 'model.pt'}")


@app.command()
def profile(
    model: Annotated[
        Path, typer.Argument(help="A folder with model.pt, or a candidate's TOML file.")
    ],
    device: Device = "cpu",
    task: Annotated[str, typer.Option(help="Gives the example to run.")] = "speech",
    data: Annotated[
        Path | None, typer.Option(help="The task's data, if not the package's.")
    ] = None,
    energy: Annotated[bool, typer.Option(help="Measure joules per inference too.")] = True,
) -> None:
    """Measure a model: latency, energy, FLOPs, weights."""
    from gpsearch import profiling, tasks
    from gpsearch.deploy import load_model, read_costs, untrained
    from gpsearch.progress import reading_lines

    learned = tasks.find(task, data)
    is_candidate = model.suffix == ".toml"
    network = untrained(model, learned) if is_candidate else load_model(model / "model.pt")
    reading = read_costs(profiling.find(device), network, learned, energy=energy)
    typer.echo(reading_lines(reading), nl=False)


@app.command()
def show(
    model: Annotated[Path, typer.Argument(help="A folder with model.pt, such as a trial's.")],
    task: Annotated[
        str | None, typer.Option(help="What it has learnt, if the study does not say it.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The task's data, if not the study's or the package's.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "dev",
    n: Annotated[int, typer.Option("-n", help="Examples.")] = 5,
) -> None:
    """Show what a model makes of some examples, for a reader to judge."""
    from gpsearch import tasks
    from gpsearch.deploy import load_model
    from gpsearch.study import Study

    if split not in ("train", "dev", "test") or n < 1:
        raise UserError("--split should be train, dev or test, and -n at least 1")
    network, study = load_model(model / "model.pt"), model.resolve().parent.parent
    settings = Study(study).settings if (study / "config.toml").exists() else None
    name = task or (settings.task if settings else "speech")
    own = settings.data_path if settings and name == settings.task else None
    learned = tasks.find(name, data or own)
    if not isinstance(learned, tasks.Showing):
        raise UserError(f"task {name!r} has nothing to show")
    typer.echo("\n\n".join(learned.show(network, split, n)))


@app.command()
def devices() -> None:
    """List the installed devices, what each can measure, and why not."""
    from gpsearch.progress import devices_text

    typer.echo(devices_text(), nl=False)


@app.command()
def tasks() -> None:
    """List the installed tasks."""
    from gpsearch import tasks as installed

    for name, what in installed.installed().items():
        typer.echo(f"{name:12} {what}")


@app.command()
def spaces() -> None:
    """List the built-in search spaces."""
    from gpsearch.space import built_in

    for name, what in built_in().items():
        typer.echo(f"{name:12} {what}")


@app.command()
def doctor() -> None:
    """Say what works on this machine, what doesn't, and the remedy."""
    from gpsearch.progress import diagnosis

    text, healthy = diagnosis()
    typer.echo(text, nl=False)
    if not healthy:
        raise typer.Exit(1)


def _work(study: Study, prepare: Callable[[Study], None] = lambda study: None) -> None:
    """Run a study to its end, its pictures and tables renewed after every trial."""
    from gpsearch import report
    from gpsearch.progress import Progress
    from gpsearch.search import Search, TimeUp

    with study.locked():
        prepare(study)
        progress = Progress(study, lambda: report.write(report.Results.of(study)))
        try:
            Search(study, progress).run()
        except TimeUp:
            typer.echo(f"time is up; go on with: gpsearch resume {study.folder}")
        except KeyboardInterrupt:
            typer.echo(f"\ninterrupted; go on with: gpsearch resume {study.folder}", err=True)
            raise typer.Exit(130) from None
        finally:
            progress.close()
        results = report.Results.of(study)
        report.write(results)
        typer.echo(report.front_text(results, "table"), nl=False)
        typer.echo(f"results: {study.folder}")


def main(run_app: Callable[..., Any] = app) -> None:
    """Run the command line; exit 0 done, 1 failed, 2 bad input, 130 interrupted."""
    try:
        code = run_app(standalone_mode=False)
    except typer.TyperException as error:  # a flag or command that typer does not know
        _stop(2, error.format_message())
    except typer.Abort:
        sys.exit(130)
    except UserError as error:
        _stop(2, str(error))
    except (OSError, RuntimeError) as error:
        _stop(1, str(error))
    sys.exit(code if isinstance(code, int) else 0)


def _stop(code: int, message: str) -> None:
    typer.echo(f"gpsearch: {message}", err=True)
    sys.exit(code)
