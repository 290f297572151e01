"""Commands on studies: search, go on, look at the front, measure it again, compare."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpsearch.cli.app import RESULTS, Folder, app, resumable
from gpsearch.errors import UserError
from gpsearch.files import slug

if TYPE_CHECKING:
    from gpsearch.study import Study

PICTURES = (".png", ".svg", ".pdf", ".jpg")


@app.command()
def run(
    out: Annotated[
        Path | None, typer.Option(help="Results folder; results/TASK-SPACE-DEVICE if not given.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any of these flags; flags win.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(show_default="speech", help="What to learn (gpsearch tasks).")
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            help="Search space: a name (gpsearch spaces) or a .toml file; else the task's own."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            show_default="cpu",
            help="Target device: a name (gpsearch devices), ssh:HOST, or module:Class.",
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            show_default="20",
            help="Finished trials in the folder in all, baselines and resumed ones included.",
        ),
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(
            show_default="error,latency,flops",
            help="error and costs to minimise: error,latency,energy,flops,params,memory.",
        ),
    ] = None,
    constraint: Annotated[
        list[str] | None, typer.Option(help='Upper limit such as "latency_ms<=5"; repeatable.')
    ] = None,
    data: Annotated[str | None, typer.Option(help="The task's data, if not the package's.")] = None,
    timeout: Annotated[
        str | None, typer.Option(help="Stop after this long (90m, 2h); resumable.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(show_default="0", help="Of proposals, weights and data order.")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(show_default="tpe", help="tpe, nsga2 or random.")
    ] = None,
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
        int | None,
        typer.Option(show_default="1", help="Threads that train; 1 is fastest at this size."),
    ] = None,
) -> None:
    """Start a search."""
    from gpsearch.settings import Settings

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
    settings = Settings.of(rows)

    from gpsearch import profiling, tasks  # torch takes seconds, which a mistake need not wait for
    from gpsearch.study import Study

    if "space" not in rows:
        settings = replace(settings, space=tasks.default_space(settings.task))
    words = "-".join((settings.task, Path(settings.space).stem, settings.device))
    where = out or Path(folder or RESULTS / slug(words))
    device, task = (profiling.from_anywhere(one) for one in (settings.device, settings.task))
    settings = replace(settings, device=device, task=task)
    new = not where.exists()
    _work(Study.create(where, settings), new=new)


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
        with resumable("the same command"):
            found.run(lambda trial, reading: typer.echo(again_line(trial, reading), err=True))
        results = report.Results.of_again(found)
        report.write(results)
    typer.echo(report.front_text(results, "table"), nl=False)
    typer.echo(
        f"results: {found.folder}; beside the first: "
        + shlex.join(["gpsearch", "compare", str(folder), str(found.folder)])
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

    if out and out.suffix.lower() not in PICTURES:
        raise UserError(f"--out {out} should end in one of {', '.join(PICTURES)}")
    found = report.Comparison.of(report.Results.at(first), report.Results.at(second))
    words = f"compare-{found.first.name}-{found.second.name}"
    picture = out or RESULTS / f"{slug(words)}.png"
    typer.echo(report.comparison_text(found), nl=False)
    report.draw_comparison(found, picture)
    typer.echo(f"picture: {picture}")


def _work(
    study: Study, prepare: Callable[[Study], None] = lambda study: None, *, new: bool = False
) -> None:
    """Run a study to its end, its pictures and tables renewed after every trial.

    Where the start fails, a new folder is removed again.
    """
    with study.locked():
        from gpsearch import report  # slow: after the lock, which nobody should take in between
        from gpsearch.progress import Progress
        from gpsearch.search import Search, TimeUp
        from gpsearch.study import how_to_resume

        how = how_to_resume(study.folder)
        prepare(study)
        progress = Progress(study, lambda: report.write(report.Results.of(study)))
        try:
            with resumable(how):
                Search(study, progress).run()
        except TimeUp:
            typer.echo(f"time is up; go on with: {how}")
        except typer.Exit:  # interrupted: it can go on
            raise
        except Exception as error:
            if new and not study.trial_folder(0).exists():
                shutil.rmtree(study.folder)
            elif isinstance(error, OSError):  # such as a full disk
                raise OSError(f"{error}; when that is mended, go on with: {how}") from error
            raise
        finally:
            progress.close()
        results = report.Results.of(study)
        report.write(results)
        typer.echo(report.front_text(results, "table"), nl=False)
        typer.echo(f"results: {study.folder}")
