"""The command line: every command is a few lines over the library."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gpsearch import plugin
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
app.add_typer(plugin.app, name="plugin")

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
    estimate_energy: Annotated[
        float | None,
        typer.Option(
            metavar="WATTS", help="Do not measure energy: estimate it as WATTS x latency."
        ),
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
        "threads": threads, "estimate_energy": estimate_energy,
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
    """Print a study's Pareto front, or a front measured again."""
    from gpsearch import report

    if form not in ("table", "csv", "json"):
        raise UserError(f"-f {form!r} is none of table, csv, json")
    typer.echo(report.front_text(report.Results.at(folder), form), nl=False)


@app.command()
def remeasure(
    folder: Folder,
    device: Annotated[
        str, typer.Option(help="Another device's name, or module:Class; the study's if not given.")
    ] = "",
) -> None:
    """Measure a study's front again, here or on another device; kept beside the first results."""
    from gpsearch import report
    from gpsearch.progress import again_line
    from gpsearch.remeasured import Remeasured
    from gpsearch.study import Study

    study = Study(folder)
    with study.locked():
        found = Remeasured.begin(study, device)
        with _resumable("the same command"):
            found.run(lambda trial, reading: typer.echo(again_line(trial, reading), err=True))
        results = report.Results.of_again(found)
        report.write(results)
    typer.echo(report.front_text(results, "table"), nl=False)
    typer.echo(
        f"results: {found.folder}; beside the first: gpsearch compare {folder} {found.folder}"
    )


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A results folder, or a front measured again.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    out: Annotated[
        Path | None, typer.Option(help="The picture; results/compare-A-B.png if not given.")
    ] = None,
) -> None:
    """Show two fronts side by side: who stays, rank correlations, hypervolumes, a picture."""
    from gpsearch import report

    found = report.Comparison.of(report.Results.at(first), report.Results.at(second))
    words = re.sub(r"[^\w.-]+", "_", f"compare-{found.first.name}-{found.second.name}")
    picture = out or RESULTS / f"{words}.png"
    typer.echo(report.comparison_text(found), nl=False)
    report.draw_comparison(found, picture)
    typer.echo(f"picture: {picture}")


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
    from gpsearch.profiling import Host
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
    with Host().sharing() as pause:
        model = grow_and_prune(
            learned.build(chosen.architecture),
            learned,
            chosen.schedule,
            chosen.training,
            folder=folder,
            seed=seed,
            listener=lambda epoch: typer.echo(epoch_line(epoch, chosen.training.epochs)),
            pause=pause,
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
def reproduce(
    task: Annotated[str, typer.Argument(help="speech, translation, captioning, or your own.")],
    scale: Annotated[
        str, typer.Option(help="small: the task's own space; paper: at the paper's size.")
    ] = "small",
    space: Annotated[
        str | None, typer.Option(help="Space whose [rows] are trained, if not the scale's.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of every row.")] = 3,
    row: Annotated[
        list[str] | None, typer.Option(help="Only this row for now; repeatable.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The task's data, if not the package's.")
    ] = None,
    device: Device = "cpu",
    epochs: Annotated[
        int, typer.Option(min=0, help="Epochs of every training, if not the space's.")
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads that train.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder; results/reproduce-TASK-SCALE if not given.")
    ] = None,
) -> None:
    """Train and measure the rows of the paper's comparison; one that was interrupted goes on."""
    import torch

    from gpsearch import report, tasks
    from gpsearch.progress import RowProgress
    from gpsearch.reproduce import Comparison, Reproduction

    chosen = space or tasks.space_of(task, scale)
    where = str(data.resolve()) if data else ""
    comparison = Comparison(task, chosen, scale, where, device, seeds, epochs)
    folder = out or RESULTS / re.sub(r"[^\w.-]+", "_", f"reproduce-{task}-{scale}")
    found = Reproduction.begin(folder, comparison)
    torch.set_num_threads(threads)
    with _resumable("the same command"):
        for _ in found.run(RowProgress(), row or ()):
            report.write_rows(found)
    report.write_rows(found)
    typer.echo(report.table(found), nl=False)
    typer.echo(f"results: {folder}")


@app.command()
def profile(
    model: Annotated[
        Path | None, typer.Argument(help="A folder with model.pt, or a candidate's TOML file.")
    ] = None,
    device: Device = "cpu",
    task: Annotated[str, typer.Option(help="Gives the example to run.")] = "speech",
    data: Annotated[
        Path | None, typer.Option(help="The task's data, if not the package's.")
    ] = None,
    energy: Annotated[bool, typer.Option(help="Measure joules per inference too.")] = True,
    sweep: Annotated[
        str | None,
        typer.Option(help="Latency by width: hidden=64:512:8 or gate=16:64:8, both ends included."),
    ] = None,
    space: Annotated[
        str, typer.Option(help="Sweep around this space's defaults, if not around a candidate.")
    ] = "hlstm",
    estimate_energy: Annotated[
        float | None,
        typer.Option(
            min=1e-9,
            metavar="WATTS",
            help="Do not measure energy: estimate it as WATTS x latency.",
        ),
    ] = None,
) -> None:
    """Measure a model: latency, energy, FLOPs, weights. With --sweep: latency by width."""
    from gpsearch import profiling, tasks
    from gpsearch.deploy import load_model, read_costs, untrained
    from gpsearch.progress import reading_lines

    if sweep is not None:
        return _sweep(sweep, model, space, device, task, data)
    if model is None:
        raise UserError("profile: give a folder with model.pt, a candidate's file, or --sweep")
    learned = tasks.find(task, data)
    is_candidate = model.suffix == ".toml"
    profiler = profiling.find(device)
    if is_candidate:
        network = untrained(model, learned, here=profiler.probe().here)
    else:
        network = load_model(model / "model.pt")
    reading = read_costs(profiler, network, learned, energy=energy, estimate_w=estimate_energy)
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
    split: Annotated[
        Literal["train", "dev", "test"], typer.Option(help="train, dev or test.")
    ] = "dev",
    n: Annotated[int, typer.Option("-n", help="Examples.")] = 5,
) -> None:
    """Show what a model makes of some examples, for a reader to judge."""
    from gpsearch import tasks
    from gpsearch.deploy import load_model
    from gpsearch.study import Study

    if n < 1:
        raise UserError(f"-n {n} should be 1 or more")
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


def _sweep(
    sweep: str, candidate: Path | None, space: str, device: str, task: str, data: Path | None
) -> None:
    """Take the staircase of a width; one that was interrupted here goes on."""
    from gpsearch import profiling, report, staircase, tasks
    from gpsearch.candidate import Candidate
    from gpsearch.progress import step_line
    from gpsearch.space import Space

    widths, learned = staircase.Sweep.parse(sweep), tasks.find(task, data)
    base = Candidate.read(candidate) if candidate else Space.read(space).candidate({})
    with closing(profiling.find(device)) as found, _resumable("the same command"):
        subject = staircase.subject(found.probe(), learned, base.architecture, widths)
        stairs = staircase.Staircase.stored(subject)
        stairs = staircase.take(
            stairs, found, learned, lambda s: typer.echo(step_line(s), err=True)
        )
    report.draw_staircase(stairs, stairs.folder / "staircase.png")
    typer.echo(f"right edges of {widths.key}: {', '.join(map(str, stairs.edges))}")
    typer.echo(f"staircase: {stairs.folder}")


@contextmanager
def _resumable(how: str) -> Iterator[None]:
    """Let Ctrl-C end in one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; go on with: {how}", err=True)
        raise typer.Exit(130) from None


def _work(study: Study, prepare: Callable[[Study], None] = lambda study: None) -> None:
    """Run a study to its end, its pictures and tables renewed after every trial."""
    from gpsearch import report
    from gpsearch.progress import Progress
    from gpsearch.search import Search, TimeUp

    with study.locked():
        prepare(study)
        progress = Progress(study, lambda: report.write(report.Results.of(study)))
        try:
            with _resumable(f"gpsearch resume {study.folder}"):
                Search(study, progress).run()
        except TimeUp:
            typer.echo(f"time is up; go on with: gpsearch resume {study.folder}")
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
