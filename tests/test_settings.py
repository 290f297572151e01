import pytest

from gpsearch.errors import UserError
from gpsearch.settings import Settings, parse_seconds


def test_settings_survive_their_file(tmp_path):
    settings = Settings.of({"budget": 7, "constraint": ("latency_ms<=5",), "timeout": "2h"})
    path = tmp_path / "config.toml"
    path.write_text(settings.to_toml())

    assert Settings.of(Settings.read(path)[0]) == settings


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45s", 45), ("90m", 5400), ("1.5h", 5400), ("10", 10), ("", float("inf"))],
)
def test_times(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"budget": 0}, "--budget = 0 should be 1 or more"),
        ({"timeout": "soon"}, "'soon' should look like"),
        ({"timeout": "0m"}, "'0m' should look like"),
        ({"sampler": "magic"}, "'magic' is not one of tpe"),
        ({"objectives": "error"}, "at least one cost"),
        ({"constraint": ("x<=1",)}, "'x' is none of"),
        ({"estimate_energy": -1.0}, "--estimate-energy = -1.0 should be a power in W"),
        ({"estimate_energy": float("nan")}, "--estimate-energy = nan should be a power in W"),
        ({"seed": -1}, "--seed = -1 should be 0 or more"),
        ({"seed": 2**63}, "--seed = 9223372036854775808 should be 9223372036854775807 or less"),
    ],
)
def test_wrong_flags_are_named(rows, message):
    with pytest.raises(UserError, match=message):
        Settings.of(rows)


def test_estimated_energy_is_an_objective_of_another_kind(tmp_path):
    flags = {"objectives": "error,energy,latency"}
    measured, estimated = (Settings.of({**flags, "estimate_energy": w}) for w in (0.0, 15.0))

    assert [goal.kind for goal in measured.goals] == ["measured"] * 3
    assert [goal.kind for goal in estimated.goals] == ["measured", "estimated", "measured"]
    assert estimated.goals[1].title == "estimated energy"
    assert (measured.estimate_w, estimated.estimate_w) == (None, 15.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budged = 5", "has no key 'budged'; did you mean budget"),
        ("zzz = 5", "has no key 'zzz'; it takes out, task, space"),
        ("budget = 'many'", "budget = 'many' should be of type int"),
        ("constraint = 'latency_ms<=5'", "should be like"),
        ("constraint = [5]", "should be like"),
        ("out = 3", "out = 3 should be of type str"),
        ("budget == 3", "not valid TOML .*line 1"),
    ],
)
def test_wrong_config_files_are_named(tmp_path, text, message):
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"my.toml.*{message}"):
        Settings.read(path)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.toml: cannot be read"):
        Settings.read(tmp_path / "absent.toml")
