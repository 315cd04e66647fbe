"""Hundreds of damaged configs: each is accepted and survives JSON, or refused with a ConfigError that names the key."""

import copy
import json
import warnings
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minizero.config import Config, ConfigError
from minizero.config.deepspeed import from_deepspeed
from minizero.config.load import from_any, load

from test_config_deepspeed import FULL as DEEPSPEED  # isort: skip

MINIZERO = Config(
    scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
    optimizer={"params": {"betas": [0.9, 0.95], "eps": 1e-8}},
    train={"global_batch_size": 8, "micro_batch_size": 2},
).model_dump()
ODD = [
    None, True, False, -1, 0, 1, 3, 7.5, -0.0, 1e300, 10**400, float("nan"), float("inf"), float("-inf"), "", "auto",
    "none", "cpu", "5", "é" * 90, "\ud800", [], [1], [[]], {}, {"enabled": True}, {"": 1}, {"a": {"b": None}}, b"x",
    (1, 2), {1: 2}, object(), {3}, 1j,
]  # fmt: skip
FUZZ = settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def paths(tree, prefix=()):
    """Path of every key of a tree."""
    for key, value in tree.items():
        if isinstance(key, str) and key:
            yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


def damage(random, tree):
    """One change at a random key -> the names of which an error must mention one."""
    path = random.choice(sorted(paths(tree)))
    *parents, name = path
    node = tree
    for parent in parents:
        node = node[parent]
    kind = random.choice(("misspell", "value", "value", "value", "wrap", "lift", "swap"))
    if kind == "misspell":
        place = random.randrange(len(name))
        wrong = random.choice((name[:place] + name[place + 1 :], name + "s", name.upper() + "_", name[::-1]))
        node[wrong] = node.pop(name)
        return {wrong, name}
    if kind == "value":
        node[name] = copy.deepcopy(random.choice(ODD))
    elif kind == "wrap":
        node[name] = {name: node[name]}
    elif kind == "lift":
        tree[name] = node.pop(name)
    else:
        other = random.choice(sorted(key for key in node if isinstance(key, str)))
        node[name], node[other] = node[other], node[name]
        return {name, other}
    return set(path)


def mutant(original, seed):
    """A tree with one to three changes, and the names involved."""
    random = Random(seed)
    tree, names = copy.deepcopy(original), set()
    for _ in range(random.randint(1, 3)):
        if any(paths(tree)):
            names |= damage(random, tree)
    return tree, names


def accepted_or_refused(read, tree, names):
    """Read; a config must survive JSON, and a refusal must name a key. Says which of the two it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = read(tree)
        except ConfigError as error:
            message = str(error)
            assert any(name in message for name in names), f"{message!r} names none of {names}"
            return "refused"
    text = json.dumps(config.model_dump(), allow_nan=False)
    assert from_any(json.loads(text)) == Config.model_validate_json(text) == config
    return "accepted"


@pytest.mark.parametrize(
    ("read", "original"),
    [(from_any, MINIZERO), (from_deepspeed, DEEPSPEED), (from_any, DEEPSPEED)],
    ids=("minizero", "deepspeed", "either"),
)
def test_damaged_configs(read, original):
    outcomes = []

    @FUZZ
    @given(st.integers(0, 2**32))
    def every(seed):
        tree, names = mutant(original, seed)
        # The batch keys are named where none is left, whatever was damaged.
        names = names | ({"train_batch_size"} if original is DEEPSPEED else set())
        outcomes.append(accepted_or_refused(read, tree, names))

    every()
    assert len(outcomes) >= 500
    assert outcomes.count("accepted") > 15 and outcomes.count("refused") > 250  # it fuzzes both sides


@FUZZ
@given(st.text(max_size=200) | st.binary(max_size=200), st.sampled_from((".json", ".toml")))
def test_any_bytes_in_a_file(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"a{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        load(path)
    except ConfigError as error:
        assert path.name in str(error)


WORDS = st.sampled_from(
    ["--", "--zero.stage", "--zero.stage=3", "--train", "--=", "--.", "3", "none", "--a.b=1", "nan"]
)


@FUZZ
@given(st.lists(WORDS | st.text(max_size=20) | st.text(max_size=20).map("--train.{}".format), max_size=4))
def test_any_command_line(words):
    try:
        load(overrides=words)
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize("text", ["{" * 3, "x" * 5000, "\0", "eyI=", "", "e30="])
def test_any_string_as_config(text):
    with pytest.raises(ConfigError):
        from_deepspeed(text)
