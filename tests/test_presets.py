import pytest
from hypothesis import given
from hypothesis import strategies as st

from microlora import presets
from microlora.config import LoraConfig
from microlora.exceptions import ConfigError, UnknownPresetError

NAMES = ("coder", "researcher", "security", "architect", "reviewer")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPECTED = {
    "coder": (16, 32.0, ATTENTION, 0.05),
    "researcher": (8, 16.0, ("q_proj", "k_proj", "v_proj"), 0.1),
    "security": (16, 32.0, (*ATTENTION, "gate_proj", "up_proj", "down_proj"), 0.05),
    "architect": (12, 24.0, ("q_proj", "v_proj", "gate_proj", "up_proj"), 0.05),
    "reviewer": (8, 16.0, ("q_proj", "v_proj"), 0.1),
}


def test_names():
    assert presets.names() == NAMES == tuple(presets.PRESETS)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset(name):
    config = presets.get(name)
    assert isinstance(config, LoraConfig)
    assert (config.rank, config.alpha, config.target_modules, config.dropout) == EXPECTED[name]
    assert config.name == name
    assert config.description
    assert len(config.tags) == 3
    assert config.scaling() == 2.0
    preset = presets.info(name)
    assert preset.config is config
    assert preset.name == name
    assert preset.domains
    assert len(preset.use_cases) == 3


@pytest.mark.parametrize("lookup", [presets.get, presets.info])
def test_an_unknown_name_raises_with_the_nearest(lookup):
    with pytest.raises(UnknownPresetError, match=r"got 'codr'.*did you mean 'coder'") as caught:
        lookup("codr")
    assert isinstance(caught.value, KeyError)
    for name in NAMES:
        assert name in str(caught.value)
    for value in ("", "Coder", None, 3, ["coder"]):
        with pytest.raises(UnknownPresetError, match="preset: got"):
            lookup(value)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("code", "coder"),
        ("research", "researcher"),
        ("security", "security"),
        ("architecture", "architect"),
        ("review", "reviewer"),
        *[(name, name) for name in NAMES],
        ("Code", "coder"),
        ("refactor this function", "coder"),
        ("code review", "reviewer"),
        ("reviewing a pull request", "reviewer"),
        ("security audit of the code", "security"),
        ("system design", "architect"),
        ("analysis of papers", "researcher"),
    ],
)
def test_route(task, name):
    assert presets.route(task).name == name


@pytest.mark.parametrize("name", NAMES)
def test_route_finds_every_use_case_and_domain(name):
    preset = presets.info(name)
    for words in (*preset.use_cases, *preset.domains, *preset.keywords):
        assert presets.route(words).name == name, words


@pytest.mark.parametrize("task", ["", "weather", "codec", "???", "日本語"])
def test_route_gives_the_default_otherwise(task):
    assert presets.route(task).name == "coder"
    assert presets.route(task, default="reviewer").name == "reviewer"


def test_route_refuses():
    with pytest.raises(UnknownPresetError, match="got 'nobody'"):
        presets.route("code", default="nobody")
    with pytest.raises(ConfigError, match="task: got 3"):
        presets.route(3)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_route_takes_any_text(task):
    assert presets.route(task).name in NAMES
    assert presets.route(task) == presets.route(task.lower())


def test_by_domain():
    def found(text):
        return [config.name for config in presets.by_domain(text)]

    assert found("security") == ["security"]
    assert found(" System  DESIGN ") == ["architect"]
    assert found("refactor") == ["coder"]
    assert found("code") == ["coder", "security", "reviewer"]
    assert found("best-practices") == ["reviewer"]
    assert found("cooking") == []


@pytest.mark.parametrize("value", ["", "  ", None, 3])
def test_by_domain_refuses(value):
    with pytest.raises(ConfigError, match="domain: got"):
        presets.by_domain(value)
