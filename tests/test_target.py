import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microlora.exceptions import ConfigError
from microlora.target import TargetModule, check_module_name, parse_targets

SHORT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed", "lm_head"]


def test_the_nine_short_names_are_strings():
    assert [str(member) for member in TargetModule] == SHORT
    assert TargetModule.Q_PROJ == "q_proj"
    assert TargetModule("lm_head") is TargetModule.LM_HEAD
    assert json.dumps(TargetModule.V_PROJ) == '"v_proj"'
    assert pickle.loads(pickle.dumps(TargetModule.O_PROJ)) is TargetModule.O_PROJ


def test_common_choices():
    assert TargetModule.speed() == ("q_proj",)
    assert TargetModule.quality() == ("q_proj", "v_proj")
    assert TargetModule.attention() == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert TargetModule.mlp() == ("gate_proj", "up_proj", "down_proj")
    for choice in (TargetModule.speed, TargetModule.quality, TargetModule.attention, TargetModule.mlp):
        assert isinstance(choice(), tuple)


def test_an_unknown_short_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"got 'q_prj'.*did you mean 'q_proj'"):
        TargetModule("q_prj")
    with pytest.raises(ConfigError, match="got 3"):
        TargetModule(3)


@pytest.mark.parametrize(
    ("written", "parsed"),
    [
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        (" q_proj , v_proj ", ("q_proj", "v_proj")),
        (["v_proj", "q_proj"], ("v_proj", "q_proj")),
        (("q_proj",), ("q_proj",)),
        (TargetModule.UP_PROJ, ("up_proj",)),
        (TargetModule.mlp(), ("gate_proj", "up_proj", "down_proj")),
        ("model.layers.3.self_attn.q_proj", ("model.layers.3.self_attn.q_proj",)),
        (["c_attn", "0"], ("c_attn", "0")),
    ],
)
def test_what_people_write(written, parsed):
    names = parse_targets(written)
    assert names == parsed
    assert all(type(name) is str for name in names)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("", "at least one"),
        ([], "at least one"),
        ((), "at least one"),
        ("q_proj,,v_proj", r"target_modules\[1\]: got ''"),
        ("q_proj,", r"target_modules\[1\]"),
        (["q_proj", "q_proj"], "'q_proj' appears twice"),
        ([TargetModule.Q_PROJ, "q_proj"], "'q_proj' appears twice"),
        (["q proj"], "without blanks"),
        (["q_proj,v_proj"], "without blanks, commas"),
        (["a\x00b"], "control characters"),
        (["a..b"], "empty parts"),
        ([".a"], "empty parts"),
        (["a."], "empty parts"),
        ([3], r"target_modules\[0\]: got 3"),
        (3, "got 3"),
        (None, "got None"),
        (b"q_proj", "got b'q_proj'"),
        ({"q_proj": 1}, "expected a list, tuple"),
        ({"q_proj"}, "expected a list, tuple"),
        (["\ud800"], "surrogates"),
    ],
)
def test_what_is_refused(written, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        parse_targets(written)
    assert str(caught.value).startswith("target_modules")


def test_the_caller_names_the_argument():
    with pytest.raises(ConfigError, match=r"^modules: got None"):
        parse_targets(None, field="modules")
    assert check_module_name("module", "a.b") == "a.b"


@given(st.lists(st.sampled_from(SHORT), min_size=1, unique=True))
def test_text_and_list_agree(names):
    assert parse_targets(names) == parse_targets(",".join(names)) == tuple(names)
