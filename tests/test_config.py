"""Settings: the batch equation, files and command lines with origins, and one clear line per problem."""

import json

import pytest

from minizero.config import Config, ConfigError
from minizero.config.batch import BatchSizes, solve
from minizero.config.load import from_any, help_text, load, read_resolved, save_resolved
from minizero.config.problems import settings


def write(path, text):
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------------------ batch sizes


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((32, None, None, 4), (32, 8, 1)),
        ((32, 2, None, 4), (32, 2, 4)),
        ((32, None, 2, 4), (32, 4, 2)),
        ((None, 2, None, 4), (8, 2, 1)),
        ((None, 2, 3, 4), (24, 2, 3)),
        ((24, 2, 3, 4), (24, 2, 3)),
    ],
)
def test_the_batch_equation_is_solved(given, expected):
    assert solve(*given) == BatchSizes(*expected)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((32, 3, 2, 4), ["32 != 3 x 2 x 4 = 24", "train.global_batch_size: 24", "train.micro_batch_size: 4"]),
        ((32, 3, None, 4), ["size 3 x", "steps ? x", "size 4", "32/12", "24 or 36", "train.micro_batch_size: 2 or 4"]),
        ((30, None, None, 4), ["size ? x", "30/4", "28 or 32"]),
        ((2, None, None, 4), ["2/4", "train.global_batch_size: 4"]),
        ((4, 8, None, 2), ["4/16", "train.global_batch_size: 16", "train.micro_batch_size: 2"]),
        ((None, None, 3, 4), ["train.micro_batch_size", "train.global_batch_size"]),
        ((None, None, None, 1), ["train.micro_batch_size", "train.global_batch_size"]),
    ],
)
def test_a_batch_that_does_not_work_out_shows_the_equation_and_legal_values(given, says):
    with pytest.raises(ConfigError) as error:
        solve(*given)
    for text in says:
        assert text in str(error.value)


def test_every_nearest_value_offered_is_legal():
    """What the message offers for a lone global batch must itself be accepted."""
    for size in range(1, 40):
        for ranks in range(1, 9):
            try:
                solve(size, None, None, ranks)
            except ConfigError as error:
                offered = str(error).split("Nearest legal train.global_batch_size: ")[1].split(" or ")
                assert offered and all(solve(int(text), None, None, ranks) for text in offered)


def test_config_batch_takes_the_mesh_size():
    assert Config(train={"global_batch_size": 12, "micro_batch_size": 2}).batch(3) == BatchSizes(12, 2, 2)


# ------------------------------------------------------------------------------------------ files, command lines


def test_later_sources_win_and_every_value_knows_its_origin(tmp_path):
    path = write(tmp_path / "a.toml", "[zero]\nstage = 2\n[train]\nsteps = 7\n[optimizer.params]\neps = 1e-7\n")
    resolved = load(path, ["--zero.stage", "3", "--checkpoint.resume=none", "--optimizer.params.betas=[0.8, 0.9]"])
    assert (resolved.config.zero.stage, resolved.config.train.steps) == (3, 7)
    assert resolved.config.optimizer.params == {"eps": 1e-7, "betas": [0.8, 0.9]}
    assert resolved.origins["zero.stage"] == resolved.origins["checkpoint.resume"] == "command line"
    assert resolved.origins["train.steps"] == f"file {path}"
    assert resolved.origins["train.seed"] == "default"
    assert set(resolved.origins) == {key for key, _ in settings(Config)}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        (["--run.dir", "5"], "dir", "5"),
        (["--run.dir", "none"], "dir", "none"),  # a text setting that cannot be None takes the word
        (["--zero.overlap", "auto"], "overlap", "auto"),
        (["--zero.overlap=false"], "overlap", False),
        (["--train.time_limit", "3"], "time_limit", 3.0),
        (["--train.time_limit=none"], "time_limit", None),
        (["--model.family=gpt2"], "family", "gpt2"),
        (["--data.source", "a=b"], "source", "a=b"),
    ],
)
def test_overrides_are_read_as_their_setting_s_type(override, key, value):
    section = override[0][2:].split(".")[0]
    assert getattr(getattr(load(overrides=override).config, section), key) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[zero]\nstag = 1\n", ["zero.stag", "zero.stage"]),
        ("precison = 'bf16'\n", ["precison", "did you mean precision"]),
        ("stage = 1\n", ["stage: no such setting", "zero.stage"]),
        ("[zero]\nstage = 4\n", ["zero.stage", "4", "0, 1, 2, 3"]),
        ("[zero]\nstage = 2\noffload_param = 'cpu'\n", ["zero: offload_param", "needs stage 3", "found stage 2"]),
        ("zero = 3\n", ["zero: a section", "3"]),
        ("[train]\nsteps = '5'\nglobal_batch_size = 0\n", ["train.steps: found '5'", "integer >= 1", "size: found 0"]),
        ("[train]\nsteps = true\n", ["train.steps: found true"]),
        ("[optimizer]\nlr = nan\nparams.eps = inf\n", ["optimizer.lr: found nan", "optimizer.params.eps: found inf"]),
        ("[optimizer.params]\nlr = 1.0\n", ["optimizer.params", "optimizer.lr"]),
        ("[dist]\nbackend = 'mpi'\n", ["dist.backend: found 'mpi'", "'gloo', 'nccl' or none"]),
        (
            "[pipeline]\nmicrobatches = 2\n[train]\ngradient_accumulation_steps = 3\n",
            ["pipeline.microbatches 2 and train.gradient_accumulation_steps 3 are the same"],
        ),
        ("[pipeline]\ngather = 'never'\n", ["pipeline.gather", "'step', 'microbatch'"]),
        ("[parallel]\nsequence = true\n", ["sequence = true needs tp > 1"]),
        ("[scheduler]\ntype = 'WarmupLR'\nparams.warmup_num_step = 3\n", ["params.warmup_num_step", "did you mean"]),
        ("[scheduler]\ntype = 'OneCycle'\n", ["scheduler", "cycle_min_lr", "required"]),
        ("[scheduler]\nparams.warmup_num_steps = 3\n", ["scheduler", "warmup_num_steps", "none"]),
        ("a = = 1\n", ["malformed TOML", "line 1"]),
    ],
)
def test_a_mistake_in_a_file_names_file_key_and_legal_values(tmp_path, text, says):
    path = write(tmp_path / "a.toml", text)
    with pytest.raises(ConfigError) as error:
        load(path)
    for part in [str(path), *says]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"zero": {"stage": 1,\n "stage": 2}}', "duplicate key 'stage'"),
        ('{"zero":\n {"stage" 3}}', "line 2"),
        ('{"optimizer": {"lr": NaN}}', "optimizer.lr: found nan"),
        ('{"optimizer": {"lr": 1e999}}', "optimizer.lr: found inf"),
        ("[1]", "list"),
        ("[" * 100_000, "cannot be read"),
        ('{"train": {"steps": ' + "9" * 5000 + "}}", "cannot be read"),
    ],
)
def test_a_mistake_in_json_says_where(tmp_path, text, says):
    with pytest.raises(ConfigError, match="a.json") as error:
        load(write(tmp_path / "a.json", text))
    assert says in str(error.value)


def test_json_comments_do_not_move_error_lines_nor_touch_texts(tmp_path):
    good = '{ // one\n# two\n/* three\n four */ "run": {"dir": "a//b#c/*d*/"}}'
    assert load(write(tmp_path / "a.json", good)).config.run.dir == "a//b#c/*d*/"
    with pytest.raises(ConfigError, match="line 4"):
        load(write(tmp_path / "b.json", good.replace(": {", " {")))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["--zero.stag", "1"], "zero.stage"),
        (["--stage=1"], "zero.stage"),
        (["--zero", "1"], "a section"),
        (["--zero.stage.x", "1"], "did you mean zero.stage"),
        (["--zero.stage"], "no value"),
        (["zero.stage", "1"], "--section.key"),
        (["--zero.stage", "x"], "zero.stage: found 'x'"),
        (["--optimizer.params.", "x"], "optimizer.params."),
    ],
)
def test_a_mistake_on_the_command_line_names_the_key(overrides, says):
    with pytest.raises(ConfigError) as error:
        load(overrides=overrides)
    assert says in str(error.value)


def test_files_that_are_not_there_or_not_config(tmp_path):
    with pytest.raises(ConfigError, match=r"nope\.toml"):
        load(tmp_path / "nope.toml")
    with pytest.raises(ConfigError, match="suffix|.toml or .json"):
        load(write(tmp_path / "a.yaml", "a: 1"))
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path)


def test_all_problems_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError) as error:
        from_any({"zero": {"stag": 1, "stage": 9}, "train": {"steps": 0}})
    assert len(str(error.value).split("\n")) == 3


def test_resolved_settings_round_trip(tmp_path):
    resolved = load(overrides=["--zero.stage", "2", "--optimizer.params.eps", "1e-6"])
    save_resolved(resolved, tmp_path / "resolved.json")
    assert read_resolved(tmp_path / "resolved.json") == resolved.config
    row = json.loads((tmp_path / "resolved.json").read_text())["zero.stage"]
    assert row == {"value": 2, "origin": "command line"}
    with pytest.raises(ConfigError, match="zero"):
        read_resolved(write(tmp_path / "b.json", '{"zero": 1}'))


def test_help_lists_every_setting_with_default_and_meaning():
    text = help_text()
    for key, field in settings(Config):
        assert f"--{key} " in text
        assert field.description, f"{key} has no meaning written down"
        assert " ".join(field.description.split()) in text


def test_from_any_takes_each_form_and_no_mix(tmp_path):
    config = Config(zero={"stage": 1})
    assert from_any(config) is config
    assert from_any({"zero": {"stage": 1}}) == config
    path = write(tmp_path / "a.toml", "zero.stage = 1")
    assert from_any(path) == from_any(str(path)) == config
    with pytest.raises(ConfigError, match=r"zero_optimization.*train"):
        from_any({"zero_optimization": {}, "train": {}})
    with pytest.raises(ConfigError, match="found 3"):
        from_any(3)


def test_a_schedule_ends_with_the_run_unless_it_says_otherwise(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[train]\nsteps = 30\n[scheduler]\ntype = "WarmupDecayLR"\nparams = { warmup_num_steps = 4 }\n')
    assert load(path).config.scheduler.params["total_num_steps"] == 30
    assert load(path, ["--train.steps", "70"]).config.scheduler.params["total_num_steps"] == 70
    fixed = load(path, ["--scheduler.params.total_num_steps", "50"])
    assert fixed.config.scheduler.params["total_num_steps"] == 50


# ---- files that build on others ----


def test_a_file_may_build_on_another(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "ground.toml", "[optimizer]\nlr = 0.5\nweight_decay = 0.25\n[zero]\nstage = 1\n")
    write(tmp_path / "deep" / "middle.toml", "base = '../ground.toml'\n[optimizer]\nlr = 0.75\n")
    top = write(tmp_path / "top.toml", "base = 'deep/middle.toml'\n[zero]\nstage = 2\n")
    resolved = load(top, ["--train.steps", "7"])
    config, origins = resolved.config, resolved.origins
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.zero.stage) == (0.75, 0.25, 2)
    assert "middle.toml" in origins["optimizer.lr"] and "ground.toml" in origins["optimizer.weight_decay"]
    assert origins["zero.stage"] == f"file {top}" and origins["train.steps"] == "command line"
    assert from_any(top) == load(top).config


@pytest.mark.parametrize(
    ("base", "says"), (("'a.toml'", "leads back"), ("'gone.toml'", "cannot read"), ("3", "base: found 3"))
)
def test_a_base_that_is_not_there_is_named(tmp_path, base, says):
    path = write(tmp_path / "a.toml", f"base = {base}\n")
    with pytest.raises(ConfigError, match=says):
        load(path)
