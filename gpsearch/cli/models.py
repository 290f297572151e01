"""Commands on single models: train, reproduce the paper's rows, measure, show."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gpsearch.cli.app import RESULTS, Data, Device, app, resumable
from gpsearch.errors import UserError
from gpsearch.files import locked, make_folder, refuse_others, slug, write_json, write_text

if TYPE_CHECKING:
    from torch import nn

    from gpsearch import tasks

Task = Annotated[str | None, typer.Option(help="What it has learnt, if no study says it: speech.")]
OfStudy = Annotated[
    Path | None, typer.Option(help="The task's data, if not the study's or the package's.")
]


@app.command()
def train(
    candidate: Annotated[Path, typer.Argument(help="A candidate's TOML file.")],
    task: Annotated[str, typer.Option(help="What to learn.")] = "speech",
    data: Data = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for history and model; results/CANDIDATE if not given."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of weights and data order.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads that train.")] = 1,
) -> None:
    """Train one candidate by its schedule, outside a study."""
    folder = out or RESULTS / candidate.stem
    if (folder / "model.pt").exists() and not (folder / "checkpoint.pt").exists():
        raise UserError(f"{folder}: holds a trained model already; choose another --out")
    refuse_others(folder, "training")

    import torch

    from gpsearch import learned as sources
    from gpsearch import tasks
    from gpsearch.candidate import Candidate
    from gpsearch.compact import compact
    from gpsearch.deploy import save_model
    from gpsearch.kernels.memory import keep_freed_memory
    from gpsearch.profiling import Host, from_anywhere
    from gpsearch.progress import epoch_line
    from gpsearch.train import grow_and_prune

    chosen = Candidate.read(candidate)
    learned = tasks.find(task, data)
    make_folder(folder)
    for note in learned.notes:
        typer.echo(f"note: {note}")
    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    with locked(folder), resumable("the same command"), _telling_of_training(task, folder):
        sources.keep(folder, from_anywhere(task), learned, data)
        with Host().sharing() as pause:
            model = grow_and_prune(
                tasks.build(learned, chosen.architecture),
                learned,
                chosen.schedule,
                chosen.training,
                folder=folder,
                data=data,
                seed=seed,
                listener=lambda epoch: typer.echo(epoch_line(epoch, chosen.training.epochs)),
                pause=pause,
            )
            deployed = compact(model, weights=chosen.deployment.weights)
            save_model(deployed, folder / "model.pt")
            scores = {split: tasks.metrics(learned, deployed, split) for split in ("dev", "test")}
        write_json(folder / "scores.json", scores)
        (folder / "checkpoint.pt").unlink()  # last: a kill while it was scored costs no training
    for split, metrics in scores.items():
        told = tasks.score_texts(metrics, learned).items()
        typer.echo(f"{split}: " + ", ".join(f"{name} {text}" for name, text in told))
    typer.echo(f"model: {folder / 'model.pt'}")


@contextmanager
def _telling_of_training(task: str, folder: Path) -> Iterator[None]:
    """Say in one line why a stranger's task cannot be trained; a log tells where in it.

    Raises:
        UserError: In place of whatever it raises.
    """
    from gpsearch.errors import line_of
    from gpsearch.train import TrainingFailed

    try:
        yield
    except (UserError, TrainingFailed, OSError):
        raise
    except Exception as error:
        log = folder / "log.txt"
        write_text(log, traceback.format_exc())
        wish = ", and gpsearch.tasks.Task what each method should return" if ":" in task else ""
        raise UserError(
            f"task {task!r} cannot be trained: {line_of(error)}; {log} tells where{wish}"
        ) from error


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
    data: Data = None,
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
    from gpsearch.profiling import from_anywhere
    from gpsearch.progress import RowProgress
    from gpsearch.reproduce import Comparison, Reproduction

    chosen = space or tasks.space_of(task, scale)
    where = str(data.resolve()) if data else ""
    comparison = Comparison(from_anywhere(task), chosen, scale, where, device, seeds, epochs)
    folder = out or RESULTS / slug(f"reproduce-{task}-{scale}")
    found = Reproduction.begin(folder, comparison)
    torch.set_num_threads(threads)
    with resumable("the same command"):
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
    task: Task = None,
    data: OfStudy = None,
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
    from gpsearch import profiling
    from gpsearch.deploy import read_costs, untrained
    from gpsearch.progress import reading_lines

    if sweep is not None:
        if estimate_energy is not None or not energy:
            raise UserError("--sweep measures no energy: take back --no-energy, --estimate-energy")
        return _sweep(sweep, model, space, device, task, data)
    if model is None:
        raise UserError("profile: give a folder with model.pt, a candidate's file, or --sweep")
    model = _folder_of(model)
    learned = _learned(model, task, data)
    is_candidate = model.suffix == ".toml"
    with profiling.closing(profiling.find(device)) as profiler:
        if is_candidate:
            network = untrained(model, learned, here=profiling.facts_of(profiler).here)
        else:
            network = _made_for(learned, model / "model.pt")
        reading = read_costs(profiler, network, learned, energy=energy, estimate_w=estimate_energy)
    typer.echo(reading_lines(reading), nl=False)


@app.command()
def show(
    model: Annotated[Path, typer.Argument(help="A folder with model.pt, such as a trial's.")],
    task: Task = None,
    data: OfStudy = None,
    split: Annotated[
        Literal["train", "dev", "test"], typer.Option(help="train, dev or test.")
    ] = "dev",
    n: Annotated[int, typer.Option("-n", help="Examples.")] = 5,
) -> None:
    """Show what a model makes of some examples, for a reader to judge."""
    from gpsearch import learned as sources
    from gpsearch import tasks
    from gpsearch.profiling import from_anywhere

    if n < 1:
        raise UserError(f"-n {n} should be 1 or more")
    model = _folder_of(model)
    learned, folder = _learned(model, task, data), _noted_in(model)
    source = sources.read(folder)
    if source and (task is None or from_anywhere(task) == source.task):
        sources.check(folder, learned)
    network = _made_for(learned, model / "model.pt")
    if not isinstance(learned, tasks.Showing):
        raise UserError(f"task {learned.name!r} has nothing to show")
    typer.echo("\n\n".join(learned.show(network, split, n)))


def _folder_of(model: Path) -> Path:
    """Return a model's folder, be it given or the file in it."""
    return model.parent if model.name == "model.pt" else model


def _learned(model: Path, task: str | None, data: Path | None) -> tasks.Task:
    """Return what a model has learnt: as is said, as it or its study says, or else speech."""
    from gpsearch import learned as sources
    from gpsearch import tasks
    from gpsearch.profiling import from_anywhere
    from gpsearch.study import Study

    folder = _noted_in(model)
    known = sources.read(folder)
    if known is None and (folder / "config.toml").exists():  # a study from before it was noted
        settings = Study(folder).settings
        known = sources.Source(settings.task, settings.data, "")
    name = from_anywhere(task or (known.task if known else "speech"))
    own = Path(known.data) if known and known.data and name == known.task else None
    return tasks.find(name, data or own)


def _noted_in(model: Path) -> Path:
    """Return the folder that tells what a model or candidate has learnt from, if one does.

    That is its own after `gpsearch train`, a trial's study, or a reproduction's row's reproduction.
    """
    from gpsearch import learned

    own = (model.parent if model.suffix == ".toml" else model).resolve()
    study = own.parent.parent
    above = (folder for folder in (own, study, study.parent) if (folder / learned.FILE).exists())
    return next(above, study)


def _made_for(task: tasks.Task, path: Path) -> nn.Module:
    """Load a model; one that cannot run the task's example is another task's."""
    import torch

    from gpsearch.deploy import load_model

    network, example = load_model(path), task.example()
    try:
        with torch.inference_mode():
            network.eval()(*example)
    except Exception as error:
        why = str(error) if isinstance(error, UserError) else type(error).__name__
        raise UserError(
            f"{path}: not a model of the task {task.name!r} ({why}); name its own with --task"
        ) from error
    return network


def _sweep(
    sweep: str,
    model: Path | None,
    space: str,
    device: str,
    task: str | None,
    data: Path | None,
) -> None:
    """Take the staircase of a width; one that was interrupted here goes on."""
    from gpsearch import profiling, report, staircase, tasks
    from gpsearch.candidate import Candidate
    from gpsearch.progress import step_line
    from gpsearch.space import Space

    widths = staircase.Sweep.parse(sweep)
    learned = _learned(model, task, data) if model else tasks.find(task or "speech", data)
    candidate = model / "candidate.toml" if model and model.is_dir() else model
    base = Candidate.read(candidate) if candidate else Space.read(space).candidate({})
    with profiling.closing(profiling.find(device)) as found, resumable("the same command"):
        subject = staircase.subject(profiling.facts_of(found), learned, base.architecture, widths)
        stairs = staircase.Staircase.stored(subject)
        stairs = staircase.take(
            stairs, found, learned, lambda s: typer.echo(step_line(s), err=True)
        )
    report.draw_staircase(stairs, stairs.folder / "staircase.png")
    typer.echo(f"right edges of {widths.key}: {', '.join(map(str, stairs.edges))}")
    typer.echo(f"staircase: {stairs.folder}")
