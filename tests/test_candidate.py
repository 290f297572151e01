import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpsearch.candidate import Architecture, Candidate, Deployment, Training
from gpsearch.errors import UserError
from gpsearch.schedule import GP, SCHEDULES, SET, Dense


@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.integers(1, 5),
    st.booleans(),
    st.floats(1e-6, 1.0, allow_subnormal=False),
)
def test_a_candidate_survives_its_toml(schedule, layers, direct, rate):
    candidate = Candidate(
        Architecture(layers=layers, gate_direct=direct),
        SCHEDULES[schedule](),
        Training(learning_rate=rate),
        Deployment(weights="int8"),
    )
    assert Candidate.from_dict(tomllib.loads(candidate.to_toml())) == candidate


def test_what_is_absent_takes_its_default():
    assert Candidate.from_dict({}) == Candidate(Architecture(), Dense(), Training())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[architecture]\nhiden_size = 3",
            r"\[architecture\] has no key 'hiden_size'; did you mean hidden_size",
        ),
        (
            "[architecture]\nlayers = 'two'",
            r"\[architecture\] layers = 'two' should be of type int",
        ),
        ("[architecture]\nlayers = true", "layers = True should be of type int"),
        ("[architecture]\nnorm = 'group'", "norm = 'group' is not one of 'layer', 'batch', 'none'"),
        (
            "[architecture]\nhidden_size = 0",
            "hidden_size = 0 should be 1 or more",
        ),
        ("[architecture]\ndropout = 1.0", "dropout = 1.0 should be 0 or more and below 1"),
        ("[training]\nepochs = 0", "epochs = 0 should be 1 or more"),
        ("[training]\nlearning_rate = -1.0", "learning_rate = -1.0 should be above 0"),
        ("[training]\nlearning_rate = nan", "learning_rate = nan should be above 0"),
        ("[training]\nlearning_rate = inf", "learning_rate = inf should be finite"),
        ("[training]\nclip = nan", "clip = nan should be above 0"),
        ("[training]\nweight_decay = nan", "weight_decay = nan should be 0 or more"),
        ("[training]\nweight_decay = inf", "weight_decay = inf should be finite"),
        ("[training]\naugment = nan", "augment = nan should be 0 or more"),
        ("[schedule]\nname = 'gp'\ntolerance = nan", "tolerance = nan should be 0 or more"),
        ("[schedule]\nname = 'magic'", "name = 'magic' is unknown; one of gp, gmp"),
        ("[schedule]\nname = 'gp'\nfinal_density = 2.0", "final_density = 2.0 should be a share"),
        ("[train]\nepochs = 1", "has no key 'train'"),
        ("[deployment]\nweights = 'int4'", "weights = 'int4' is not one of 'float32', 'bfloat16'"),
        ("schedule = 'gp'", r"\[schedule\] should be a table"),
        ("[schedule]\nname = ['gp', 'gmp']", r"name = \['gp', 'gmp'\] is unknown; one of gp"),
        (f"[training]\nlearning_rate = {10**400}", "learning_rate has 401 digits, too many"),
        ("training = 3", r"\[training\] should be a table"),
        ("[architecture", "not valid TOML"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"mine\.toml.*{message}"):
        Candidate.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.toml: cannot be read"):
        Candidate.read(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("candidate", "text"),
    [
        (Candidate(Architecture(gate_depth=0)), "LSTM 2x128, dense"),
        (
            Candidate(Architecture(gate_direct=True), GP(final_density=0.125)),
            "H-LSTM 2x128, gates 1x64 direct, gp 12.5%",
        ),
        (
            Candidate(Architecture(gate_depth=0), GP(structure="row_column")),
            "LSTM 2x128, gp 10.0% units",
        ),
        (
            Candidate(Architecture(gate_depth=0), deployment=Deployment(weights="int8")),
            "LSTM 2x128, dense, int8",
        ),
        (
            Candidate(Architecture(gate_depth=0), SET(structure="16x1")),
            "LSTM 2x128, set 10.0% 16x1",
        ),
    ],
)
def test_in_short(candidate, text):
    assert candidate.in_short() == text


def test_depth_and_width_give_the_gates_layers():
    assert Architecture(gate_depth=0).gate_hidden == ()
    assert Architecture(gate_depth=2, gate_width=7).gate_hidden == (7, 7)
