import contextlib
import csv
import json
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.core import TyperGroup, TyperOption
from typer.main import get_command
from typer.testing import CliRunner

from gpsearch import tasks
from gpsearch.candidate import Candidate
from gpsearch.cli import app, main
from gpsearch.compact import compact
from gpsearch.deploy import load_model
from gpsearch.errors import UserError
from gpsearch.files import locked
from gpsearch.settings import Settings
from gpsearch.train import grow_and_prune
from tests.commands import call
from tests.toy import ToyTask

ROOT = Path(__file__).parents[1]
TOY = ["--task", "tests.toy:ToyTask"]
MEMBERS = "prunable, batches, loss, evaluate, example"
TOY_DEVICE = ["--device", "tests.toy:ToyDevice"]
CANDIDATE = ROOT / "results" / "reference" / "an4-cpu" / "trials" / "0" / "candidate.toml"


def shell(*words):
    """Run a command in a process of its own: (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "gpsearch", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "toy"
    code, out, err = shell(
        "run", *TOY, *TOY_DEVICE, "--space", "tests/toy.toml", "--budget", 2, "--out", folder,
        "--objectives", "error,flops,latency",
    )  # fmt: skip
    assert code == 0, err
    assert "Pareto front" in out
    return folder


def test_a_run_leaves_the_whole_results_folder(folder):
    names = {path.name for path in folder.iterdir()}

    assert names >= {
        "config.toml", "data.json", "space.toml", "device.json", "environment.json", "study.db",
        "trials.csv", "pareto.csv", "pareto.json", "pareto.png", "pareto.html", "trials",
    }  # fmt: skip
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert [row["trial"] for row in rows] == ["0", "1"]
    assert json.loads((folder / "device.json").read_text())["name"] == "toy"


def test_front_prints_what_pareto_csv_and_json_hold(folder):
    assert call("front", folder)[0] == 0
    assert call("front", folder, "-f", "csv")[1] == (folder / "pareto.csv").read_text()
    assert json.loads(call("front", folder, "-f", "json")[1])


def test_profile_measures_a_model_of_the_front(folder):
    model = next(folder.glob("trials/*/model.pt")).parent
    code, out, _ = call("profile", model, *TOY)

    assert code == 0
    assert "latency_s" in out
    assert "flops_effective" in out


def test_show_prints_what_a_task_shows_of_a_trial_and_knows_its_study(folder):
    model = next(folder.glob("trials/*/model.pt")).parent
    code, out, err = call("show", model, "-n", 2, "--split", "test")

    assert code == 0, err
    assert len(out.strip().split("\n\n")) == 2
    assert out.startswith("tone ")
    assert call("show", model, "--split", "all")[0] == 2


@pytest.mark.parametrize("words", [["show"], ["profile", *TOY_DEVICE]])
@pytest.mark.parametrize("task", ["speech", "translation"])
def test_a_model_of_another_task_is_told_in_one_line(folder, words, task):
    model = next(folder.glob("trials/*/model.pt"))
    code, _, err = call(*words, model.parent, "--task", task)

    assert code == 2
    assert err.startswith(f"gpsearch: {model}: not a model of the task '{task}' (")
    assert len(err.splitlines()) == 1


def test_train_and_profile_a_candidate(tmp_path):
    candidate = tmp_path / "c.toml"
    candidate.write_text(
        "[architecture]\nhidden_size = 6\ngate_width = 4\n[schedule]\nname = 'gp'\n"
        "[training]\nepochs = 4\nbatch_size = 16\n[deployment]\nweights = 'int8'\n"
    )
    train = ["train", candidate, *TOY, "--seed", 7, "--out", tmp_path / "t"]
    code, out, err = call(*train)
    assert code == 0, err
    assert "test: err" in out
    assert (tmp_path / "t" / "history.csv").exists()
    for words, energy in (
        ([candidate], "unavailable: no counter here"),
        ([tmp_path / "t", "--no-energy"], "unavailable: not asked for"),
        ([tmp_path / "t" / "model.pt", "--estimate-energy", 5], r"\S+ J  .*estimated, .*5 W"),
    ):
        code, out, err = call("profile", *words, *TOY, *TOY_DEVICE)
        assert code == 0, err
        assert re.search(f"^energy_j +{energy}", out, re.MULTILINE)

    assert json.loads((tmp_path / "t" / "scores.json").read_text()).keys() == {"dev", "test"}

    torch.manual_seed(7)
    task, of = ToyTask(), Candidate.read(candidate)
    alone = grow_and_prune(task.build(of.architecture), task, of.schedule, of.training, seed=7)
    wanted = compact(alone, weights="int8", here=False).state_dict()
    found = load_model(tmp_path / "t" / "model.pt").state_dict()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)

    code, _, err = call(*train)
    assert code == 2
    assert "t: holds a trained model already; choose another --out" in err


def test_two_trainings_in_one_folder_are_refused(tmp_path):
    with locked(tmp_path):
        code, _, err = call("train", CANDIDATE, *TOY, "--out", tmp_path)

    assert code == 2
    assert "another gpsearch works there" in err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_training_keeps_out_of_a_study_s_folder(folder):
    code, _, err = call("train", CANDIDATE, *TOY, "--out", folder)

    assert code == 2
    assert "toy: holds a study; choose another --out" in err
    assert not (folder / "history.csv").exists()


def test_a_training_does_not_go_on_with_other_data(tmp_path):
    candidate, task = tmp_path / "c.toml", ToyTask()
    candidate.write_text("[architecture]\nhidden_size = 6\n[training]\nepochs = 2\n")
    of = Candidate.read(candidate)
    grow_and_prune(
        task.build(of.architecture), task, of.schedule, of.training, folder=tmp_path,
        data=tmp_path / "a",
    )  # fmt: skip
    code, _, err = call("train", candidate, *TOY, "--out", tmp_path, "--data", tmp_path / "b")

    assert code == 2
    assert "checkpoint.pt: belongs to another training" in err


def test_profile_knows_the_task_of_a_trials_study(folder):
    trial = next(folder.glob("trials/*/model.pt")).parent
    assert call("profile", trial, *TOY_DEVICE)[0] == 0
    assert call("profile", trial / "candidate.toml", *TOY_DEVICE)[0] == 0


def test_a_reproduction_s_rows_have_learnt_what_it_says(tmp_path):
    row = tmp_path / "rows" / "one" / "0"
    row.mkdir(parents=True)
    (tmp_path / "data.json").write_text('{"task": "tests.toy:ToyTask", "data": "", "digest": ""}')
    shutil.copy(CANDIDATE, row / "candidate.toml")
    code, out, _ = call("profile", row / "candidate.toml", *TOY_DEVICE)
    assert code == 0
    assert "latency_s" in out
    for what in (row, row / "candidate.toml"):  # the widths of this task's network, not of speech's
        words = ("profile", what, "--sweep", "hidden=4:8:4", *TOY_DEVICE)
        with contextlib.chdir(tmp_path):
            assert call(*words)[0] == 0
    (stairs,) = tmp_path.glob("results/staircases/*/staircase.json")
    assert '"task": "toy"' in stairs.read_text()


class Hopeless(ToyTask):
    space = "tests/toy.toml"

    def build(self, architecture):
        raise RuntimeError("no network today")


HOPELESS = "tests.test_cli:Hopeless"
FLAGS = {
    "task": HOPELESS, "space": str(ROOT / "tests" / "toy.toml"), "device": "tests.toy:ToyDevice",
    "budget": 3, "objectives": "error,energy", "constraint": ("params<=1e5", "error<=0.5"),
    "data": "corpus", "timeout": "2h", "seed": 4, "sampler": "nsga2", "epochs": 5,
    "estimate_energy": 2.5, "threads": 2,
}  # fmt: skip
"""Every flag of `run` that config.toml keeps, none at its default."""


def options_of_run():
    """Return the flags of `run` by name."""
    commands = get_command(app)
    assert isinstance(commands, TyperGroup)
    return {str(one.name): one for one in commands.commands["run"].params}


def kept(folder):
    """Return what a study's config.toml holds."""
    return Settings.read(folder / "config.toml")[0]


def test_config_toml_keeps_every_flag_of_run(tmp_path):
    assert FLAGS.keys() == options_of_run().keys() - {"out", "config"}
    assert all(value != getattr(Settings(), name) for name, value in FLAGS.items())
    words = ["run", "--out", tmp_path]  # a folder that was there, and so stays
    for name, value in FLAGS.items():
        for one in value if isinstance(value, tuple) else (value,):
            words += [f"--{name.replace('_', '-')}", one]
    code, _, err = call(*words)

    assert code == 2
    assert err.endswith("no network today\n")
    assert kept(tmp_path) == {**FLAGS, "data": str(Path("corpus").resolve())}


def test_a_run_without_a_space_takes_its_task_s(tmp_path):
    assert call("run", "--task", HOPELESS, *TOY_DEVICE, "--out", tmp_path)[0] == 2
    assert kept(tmp_path)["space"] == "tests/toy.toml"


def test_a_study_whose_time_is_up_says_how_to_go_on(folder, tmp_path):
    longer = shutil.copytree(folder, tmp_path / "longer")
    code, out, err = call("resume", longer, "--budget", 9, "--timeout", "0.001s")

    assert code == 0, err
    assert f"time is up; go on with: gpsearch resume {longer}\n" in out
    assert (kept(longer)["budget"], kept(longer)["timeout"]) == (9, "0.001s")


class NoRoom(ToyTask):
    """The disk is full as soon as a training begins."""

    def batches(self, training, epoch, seed):
        raise OSError("No space left on device")


def test_a_study_that_ran_out_of_disk_says_how_to_go_on(tmp_path):
    task = ["--task", "tests.test_cli:NoRoom", "--space", "tests/toy.toml"]
    code, _, err = call("run", *task, *TOY_DEVICE, "--out", tmp_path / "r")

    assert code == 1
    assert err.endswith(
        "gpsearch: No space left on device; when that is mended, go on with: "
        f"gpsearch resume {tmp_path / 'r'}\n"
    )


def test_compare_prints_and_draws_two_fronts(folder, tmp_path):
    picture = tmp_path / "c.png"
    code, out, err = call("compare", folder, folder, "--out", picture)

    assert code == 0, err
    assert "hypervolume of error, flops, latency: A " in out
    assert out.endswith(f"picture: {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    code, _, err = call("run", "--task", HOPELESS, "--out", tmp_path / "r")
    assert code == 2
    assert err.endswith("task 'toy' cannot build a network: RuntimeError: no network today\n")
    assert not (tmp_path / "r").exists()


def test_the_defaults_that_help_tells_are_those_of_the_settings():
    told = {
        name: flag.show_default
        for name, flag in options_of_run().items()
        if isinstance(flag, TyperOption) and isinstance(flag.show_default, str)
    }
    assert len(told) > 5
    assert told == {name: str(getattr(Settings(), name)) for name in told}


class NoTask:
    """What was given as a task by mistake."""

    name = "none"

    def __init__(self, data):
        pass


class LetterByLetter(ToyTask):
    notes: Any = "one note"


class NotesFail(ToyTask):
    @property
    def notes(self) -> Any:  # type: ignore[override]
        raise KeyError("boom")


class Builder(ToyTask):
    def build(self, architecture):
        raise KeyError("layer")


class Exampleless(ToyTask):
    def example(self):
        raise KeyError("x")


class Interrupted(ToyTask):
    """Ctrl-C comes with the first batch."""

    def batches(self, training, epoch, seed):
        raise KeyboardInterrupt


def test_a_training_that_was_interrupted_says_how_to_go_on(tmp_path):
    task = ["--task", "tests.test_cli:Interrupted"]
    code, _, err = call("train", CANDIDATE, *task, "--out", tmp_path)

    assert code == 130
    assert err == "\ninterrupted; go on with: the same command\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--budget", "0"], "--budget = 0"),
        (["run", "--objectives", "error,speed"], "'speed' is none of"),
        (["run", "--constraint", "latency"], "should look like"),
        (["run", "--space", "nowhere"], "'nowhere'"),
        (["run", "--space", "nowhere.toml"], "nowhere.toml"),
        (["run", "--config", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (["run", "--device", "abacus"], "'abacus'"),
        (["run", "--task", "juggling"], "'juggling'"),
        (["run", "--task", "nowhere:Task"], "'nowhere:Task' cannot be loaded"),
        (["run", "--task", "tests.test_cli:NoTask"], f"lacks metric, notes, build, {MEMBERS}"),
        (["run", "--task", "tests.test_cli:LetterByLetter"], "notes should be a tuple of lines"),
        (["run", "--task", "tests.test_cli:NotesFail"], "cannot be loaded: KeyError: 'boom'"),
        (["run", "--task", "tests.test_cli:Builder"], "cannot build a network: KeyError: 'layer'"),
        (["run", "--task", "tests.test_cli:Exampleless"], "gives no example: KeyError: 'x'"),
        (["run", "--data", "nowhere"], "nowhere"),
        (["run", "--objectives", "error,energy"], "cannot measure"),
        (["run", "--estimate-energy", "-5"], "--estimate-energy = -5.0 should be a power"),
        (["resume", "nowhere"], "no results folder"),
        (["front", "nowhere"], "no results folder"),
        (["train", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (["profile", "nowhere"], "no such model"),
        (["profile"], "or --sweep"),
        (["profile", "--sweep", "hidden=9"], "should look like hidden=64:512:8"),
        (["profile", "--sweep", "hidden=8:16:8", "--no-energy"], "--sweep measures no energy"),
        (["profile", "--sweep", "hidden=8:16:8", "--estimate-energy", "5"], "measures no energy"),
        (["remeasure", "nowhere"], "no results folder"),
        (["compare", "nowhere", "elsewhere"], "no results folder"),
        (["compare", "a", "b", "--out", "picture.foo"], "should end in one of .png, .svg"),
        (["train", str(CANDIDATE), *TOY, "--out", f"{__file__}/out"], "cannot be written"),
        (["reproduce", "speech", "--out", __file__], "cannot be written"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(words, message, tmp_path, capsys, monkeypatch):
    if words[:3] == ["run", "--objectives", "error,energy"]:
        pytest.importorskip("gpsearch.profilers.cpu")
        if Path("/sys/class/powercap/intel-rapl").exists():
            pytest.skip("this machine has an energy counter")
    out = ["--out", str(tmp_path / "r")] if words[0] == "run" else []
    result = CliRunner().invoke(app, [*words, *out])

    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "r").exists()


def test_the_version_and_the_help_are_no_mistakes():
    assert call("--version") == (0, f"gpsearch {version('gpsearch')}\n", "")
    code, out, err = call()
    assert (code, err) == (2, "")
    assert out.startswith("Usage: ")


def test_a_refused_run_leaves_a_folder_that_was_there(tmp_path):
    (tmp_path / "mine.txt").touch()
    code, _, err = call("run", *TOY, "--device", "abacus", "--out", tmp_path)

    assert code == 2
    assert "'abacus'" in err
    assert (tmp_path / "mine.txt").exists()


def test_the_front_door_turns_a_mistake_into_exit_2(capsys):
    def mistaken(**_):
        raise UserError("what, where, the mend")

    with pytest.raises(SystemExit) as stop:
        main(mistaken)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "gpsearch: what, where, the mend\n"


@pytest.mark.parametrize(
    "words", [["run", "--budged", 3], ["rum"], ["run", "--budget", "many"], ["front"]]
)
def test_what_typer_does_not_know_is_one_line_too(words):
    code, _, err = shell(*words)

    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("gpsearch: ")


ASKED = [
    ["--help"], ["run", "--help"], ["plugin", "new", "--help"], ["spaces"], ["rum"], ["front"],
    ["run", "--budget", "0"], ["run", "--objectives", "error,speed"], ["run", "--config", "none"],
]  # fmt: skip
WITHOUT_TORCH = """
import sys
from functools import partial
from gpsearch.cli import app, main

for words in {asked}:
    try:
        main(partial(app, words))
    except SystemExit as end:
        print(end.code, [name for name in ("torch", "optuna", "pandas") if name in sys.modules])
"""


def test_help_lists_of_spaces_and_mistaken_flags_do_not_wait_for_torch():
    code = WITHOUT_TORCH.format(asked=ASKED)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    ends = [line for line in done.stdout.splitlines() if re.fullmatch(r"\d \[.*\]", line)]
    assert ends == ["0 []"] * 4 + ["2 []"] * 5


@pytest.mark.parametrize("command", ["devices", "tasks", "spaces"])
def test_the_lists(command):
    result = CliRunner().invoke(app, [command])

    assert result.exit_code == 0
    assert {"devices": "cpu", "tasks": "speech", "spaces": "hlstm"}[command] in result.output


def test_flags_can_stand_in_a_file(tmp_path):
    (tmp_path / "mine.toml").write_text('budget = 1\nobjectives = "error,params"\nseed = 4\n')
    words = ["run", "--task", HOPELESS, *TOY_DEVICE, "--config", tmp_path / "mine.toml"]
    assert call(*words, "--seed", 5, "--out", tmp_path)[0] == 2
    assert kept(tmp_path) == {
        **vars(Settings()), "task": HOPELESS, "space": "tests/toy.toml",
        "device": "tests.toy:ToyDevice", "budget": 1, "objectives": "error,params", "seed": 5,
    }  # fmt: skip


# What may be wrong with a task of one's own


class Rooted(ToyTask):
    """A task whose metric is no fraction."""

    metric, unit = "rmse", ""

    def evaluate(self, model, split="dev"):
        return {"rmse": 13.7, "worst": 3.0}


class Rising(ToyTask):
    """A task whose error is made of a score."""

    metric, unit = "cider_d", ""


@pytest.fixture
def candidate(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text("[architecture]\nhidden_size = 6\n[training]\nepochs = 2\n")
    return path


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a task into a file in a folder; return what --task calls it."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def written(member, head=""):
        lines = [head, "import torch", "from tests.toy import ToyTask", "class Mine(ToyTask):"]
        path = tmp_path / f"own_{tmp_path.name}.py"  # Python knows a module of another test still
        path.write_text("\n".join([*lines, f"    {member}\n"]))
        return f"{path}:Mine"

    return written


def test_no_metric_can_have_the_name_of_a_column(folder):
    for name in ("trials.csv", "pareto.csv"):
        columns = (folder / name).read_text().splitlines()[0].split(",")
        mine = [one for one in columns if not any(fnmatchcase(one, taken) for taken in tasks.TAKEN)]
        assert mine == ["error", "err"]


def test_a_score_that_is_no_fraction_is_told_as_it_is(tmp_path, candidate):
    task = ["--task", "tests.test_cli:Rooted"]
    run = ["run", *task, *TOY_DEVICE, "--space", "tests/toy.toml", "--budget", 1]
    code, _, err = call(*run, "--out", tmp_path / "r")
    assert code == 0, err
    assert "  complete  error 13.7  latency " in err
    assert err.endswith(" ms, test error 13.700\n")

    code, out, err = call("train", candidate, *task, "--out", tmp_path / "t")
    assert code == 0, err
    assert "\ntest: rmse 13.700, worst 3.000\n" in out


def test_scores_are_fractions_beside_one_that_the_error_is_made_of():
    scores = {"cider_d": 0.25, "cider_d_beam": 0.3, "bleu_1": 0.6, "error": 0.8}
    told = ["0.250", "0.300", "60.00%", "80.00%"]
    assert [*tasks.score_texts(scores, Rising()).values()] == told
    assert tasks.score_texts({"err": 0.125}, ToyTask()) == {"err": "12.50%"}


RETURNS = "def evaluate(self, *_): return "


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("metric = 'latency_s'", "Mine calls a metric 'latency_s'; choose a name that is no other"),
        ("metric = 'state'", "none of trial, state, p:*, latency_*, "),
        ("def example(self): return [self.x[:1]]", "Mine.example should return a tuple, (x,), not"),
        ("def build(self, _): pass", "Mine.build should return a torch.nn.Module, not None"),
        ("def loss(self, *_): return 0.5", "'float' object has no attribute 'backward'; "),
        ("def loss(self, *_): return torch.ones(2, requires_grad=True)", "for scalar outputs; "),
        (RETURNS + "{'err': 0.5, 'params': 0.25}", "Mine calls a metric 'params'; choose a name"),
        (RETURNS + "{'missed': 0.5}", "a dict with a number for 'err', not for 'missed' alone"),
        (RETURNS + "{}", "a dict with a number for 'err', not for nothing alone"),
        (RETURNS + "{'err': torch.ones(2)}", "and nothing but single numbers: ValueError: only"),
        (RETURNS + "0.5", "evaluate should return a dict with a number for 'err', not a float"),
    ],
)
def test_what_a_task_gets_wrong_is_told_in_one_line(tmp_path, candidate, write, member, message):
    code, _, err = call("train", candidate, "--task", write(member), "--out", tmp_path / "t")

    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("gpsearch: task '")
    assert message in err
    log = tmp_path / "t" / "log.txt"
    assert log.exists() == ("def loss" in member) == (f"; {log} tells where, and " in err)


def test_a_search_does_not_try_more_with_a_task_that_gets_its_metric_wrong(tmp_path, write):
    task = ["--task", write(RETURNS + "{'missed': 0.5}"), "--space", "tests/toy.toml"]
    code, _, err = call("run", *task, *TOY_DEVICE, "--out", tmp_path / "r")

    assert code == 2
    assert err.splitlines()[-1] == (
        "gpsearch: task 'toy': Mine.evaluate should return a dict with a number for 'err', "
        "not for 'missed' alone"
    )


def test_a_task_may_be_given_by_its_file_and_is_kept_by_the_whole_of_it(
    tmp_path, candidate, write, monkeypatch
):
    task, trained = write("pass"), tmp_path / "t"
    monkeypatch.chdir(tmp_path)
    name = f"./{Path(task).name}"
    code, _, err = call("train", candidate, "--task", name, "--out", trained)
    assert code == 0, err
    assert json.loads((trained / "data.json").read_text())["task"] == task
    assert call("show", trained, "--task", name)[0] == 0

    monkeypatch.chdir("/")
    assert call("show", trained, "-n", 1)[0] == 0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("plug/x.py:Mine", "there is no file /.*plug/x.py; give its path from this folder"),
        ("plug/x:Mine", "No module named .*; call from the folder .* its file: path/to/file.py:Cl"),
        ("nowhere:Mine", "No module named 'nowhere'; call from the folder where that lies, or giv"),
        ("string.py:Mine", "Python has another module string; rename string.py"),
        ("{}", "cannot be loaded: ModuleNotFoundError: No module named 'nowhere'$"),
    ],
)
def test_a_task_that_is_not_where_it_is_said_to_be(tmp_path, write, monkeypatch, task, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "string.py").touch()
    with pytest.raises(UserError, match=message):
        tasks.find(task.format(write("pass", "import nowhere")))
