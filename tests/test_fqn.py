"""FqnToConfig: precedence, names of both frameworks, errors, and the file."""

import pickle
from collections import OrderedDict

import jax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from xmoe.config import RECIPES, FP8GroupedMMConfig, GroupedMMConfig, MXFP8GroupedMMConfig, config_from_recipe
from xmoe.fqn import UNMATCHED, FqnToConfig, dotted, load_toml, save_toml

BF16, FP8, MX, FLOOR = (config_from_recipe(name) for name in ("bf16", "fp8_rowwise", "mxfp8_rceil", "mxfp8_floor"))
W1 = "layers.0.moe.experts.w1"

# Every key matches W1, in the order of precedence.
LADDER = [
    (W1, BF16),
    ("layers.0.moe.experts", FP8),
    (r"re:.*\.w1", MX),
    ("re:.*experts", FLOOR),
    ("_default", None),
]


@pytest.mark.parametrize("first", range(len(LADDER)))
def test_precedence_of_the_classes(first):
    """Whatever the order in the mapping."""
    for keys in (LADDER[first:], LADDER[first:][::-1]):
        assert FqnToConfig(dict(keys)).resolve(W1) is LADDER[first][1]


@pytest.mark.parametrize(("keys", "winner"), [([r"re:.*w\d", "re:.*w1"], 0), (["re:.*w1", r"re:.*w\d"], 0)])
def test_first_parameter_regex_wins(keys, winner):
    mapping = FqnToConfig(OrderedDict(zip(keys, (FP8, MX), strict=True)))
    assert mapping.resolve(W1) is (FP8, MX)[winner]


def test_first_module_regex_wins():
    assert FqnToConfig({"re:.*experts": FP8, r"re:layers.*experts": MX}).resolve(W1) is FP8


def test_a_parameter_regex_beats_an_earlier_module_regex():
    mapping = FqnToConfig({"re:.*experts": FP8, r"re:.*w1": MX})
    assert mapping.resolve(W1) is MX
    assert mapping.resolve("layers.0.moe.experts.w2") is FP8


def test_none_leaves_alone_and_stops_the_search():
    mapping = FqnToConfig({W1: None, "re:.*experts.*": FP8})
    assert mapping.resolve(W1) is None
    assert mapping.resolve("layers.0.moe.experts.w2") is FP8
    assert mapping.resolve("layers.0.attention.wq") is UNMATCHED
    assert FqnToConfig({"re:.*w1": None, "re:.*experts": MX, "_default": FP8}).resolve(W1) is None


def test_regexes_match_in_full():
    mapping = FqnToConfig({"re:experts": FP8, "re:.*mo": MX, "re:layer": MX})
    assert mapping.resolve(W1) is UNMATCHED


@pytest.mark.parametrize("module", ["layers.0.moe.experts", "layers.0.moe", "layers", "", "re:layers", r"re:.*\.moe"])
def test_a_module_reaches_everything_inside_it(module):
    mapping = FqnToConfig({module: FP8})
    assert mapping.resolve(W1) is FP8
    assert mapping.unused([W1]) == ()
    assert module == "" or mapping.resolve("layer.0.moes.experts.w1") is UNMATCHED


@pytest.mark.parametrize("outer_first", [False, True])
@pytest.mark.parametrize("keys", [("layers.0.moe", "layers"), ("re:.*moe", r"re:layers\.\d")])
def test_the_nearest_module_wins(keys, outer_first):
    pairs = list(zip(keys, (FP8, MX), strict=True))
    assert FqnToConfig(dict(pairs[::-1] if outer_first else pairs)).resolve(W1) is FP8


def test_the_key_that_decided():
    mapping = FqnToConfig({"layers": FP8, "_default": MX})
    assert mapping.key_for(W1) == "layers"
    assert mapping.key_for("head.w") == "_default"
    assert FqnToConfig({"layers": FP8}).key_for(("head", "w")) is None


def test_default():
    assert FqnToConfig({"_default": FP8}).resolve("anything") is FP8
    assert FqnToConfig({}).resolve("anything") is UNMATCHED


NAMES = st.lists(st.sampled_from(["moe", "experts", "w1", "w2", "0", "1"]), min_size=1, max_size=4).map(".".join)
KEYS = st.one_of(NAMES, st.just("_default"), NAMES.map(lambda name: "re:.*" + name), NAMES.map(lambda n: f"re:{n}.*"))


@given(st.dictionaries(KEYS, st.sampled_from([BF16, FP8, MX, None]), max_size=6), NAMES)
def test_precedence_by_search(mapping, name):
    """Against the rule written as a sort: rank by class, then by distance, then by position."""

    def rank(key):
        pattern = key.startswith("re:") and key[3:]
        parts = name.split(".")
        if key == "_default":
            return 5, 0
        for outward in range(len(parts) + 1):
            candidate, is_module = ".".join(parts[: len(parts) - outward]), outward > 0
            if key == candidate:
                return 1 + is_module, outward
            if pattern and _fullmatch(pattern, candidate):
                return 3 + is_module, outward
        return None

    ranked = [(rank(key), position, key) for position, key in enumerate(mapping) if rank(key)]
    expected = mapping[min(ranked)[2]] if ranked else UNMATCHED
    assert FqnToConfig(mapping).resolve(name) is expected
    unused = {key for key in mapping if not rank(key)}
    assert set(FqnToConfig(mapping).unused([name])) == unused


def _fullmatch(pattern, name):
    """fullmatch for the two forms in KEYS: a suffix or a prefix, where "." stands for any character."""

    def same(a, b):
        return len(a) == len(b) and all(x in (".", y) for x, y in zip(a, b, strict=True))

    if pattern.startswith(".*"):
        return len(name) >= len(pattern) - 2 and same(pattern[2:], name[len(name) - len(pattern) + 2 :])
    return len(name) >= len(pattern) - 2 and same(pattern[:-2], name[: len(pattern) - 2])


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [W1, W1.replace(".", "/"), "/" + W1.replace(".", "/"), ("layers", 0, "moe", "experts", "w1")]
)
def test_names_of_every_form_are_one(name):
    assert dotted(name) == W1
    assert FqnToConfig({W1: FP8}).resolve(name) is FP8
    assert FqnToConfig({"layers/0/moe/experts": FP8}).resolve(name) is FP8


def test_flax_paths():
    class Experts(nnx.Module):
        def __init__(self):
            self.w1 = nnx.Param(jax.numpy.zeros((2, 4, 4)))

    class Model(nnx.Module):
        def __init__(self):
            self.experts = Experts()

    state = nnx.state(Model())
    (path,) = (path for path, _ in nnx.to_flat_state(state))
    assert dotted(path) == "experts.w1"
    ((keys, _),) = jax.tree_util.tree_flatten_with_path({"layers": [{"w1": 1.0}]})[0]
    assert dotted(keys) == "layers.0.w1"


def test_unused_keys_are_reported_in_order():
    mapping = FqnToConfig({"layers.9.moe": FP8, "re:.*experts": FP8, "re:.*w7": MX, W1: FP8, "_default": None})
    assert mapping.unused([W1, "layers.0.norm.weight"]) == ("layers.9.moe", "re:.*w7")
    assert mapping.unused(iter([])) == ("layers.9.moe", "re:.*experts", "re:.*w7", W1)


# --- Values and errors ------------------------------------------------------------------------------------------------


def test_values():
    mapping = FqnToConfig({"a": "fp8_rowwise", "b": {"recipe": "mxfp8_rceil", "debug": True}, "c": "none", "d": None})
    assert dict(mapping.fqn_to_config) == {"a": FP8, "b": MXFP8GroupedMMConfig(debug=True), "c": None, "d": None}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"re:(": FP8}, r"'re:\(' is not a regular expression: missing \)"),
        ({"a.b": FP8, "a/b": MX}, "'a.b' and 'a/b' are the same name"),
        ({3: FP8}, "the key 3 is not a string"),
        ({"a": 3}, r"fqn_to_config\['a'\]=3 is not a config"),
        ({"a": FP8GroupedMMConfig}, r"fqn_to_config\['a'\]=.* is not a config"),
        ({"a": "fp9"}, r"fqn_to_config\['a'\]: recipe='fp9' is not known; use one of bf16"),
        ({"a": {"recipe": "bf16", "x": 1}}, r"fqn_to_config\['a'\]: x: not a field of BF16GroupedMMConfig"),
        ({"a": {"b": {"recipe": "bf16"}}}, r"fqn_to_config\['a'\]: recipe is missing.*quote names that have dots"),
    ],
)
def test_wrong_mappings(mapping, message):
    with pytest.raises(ValueError, match=message):
        FqnToConfig(mapping)


def test_compares_by_content_and_order():
    a, b = FqnToConfig({"a": FP8, "b": MX}), FqnToConfig({"a": "fp8_rowwise", "b": "mxfp8_rceil"})
    assert a == b
    assert hash(a) == hash(b)
    assert a == pickle.loads(pickle.dumps(a))
    assert a != FqnToConfig({"b": MX, "a": FP8})
    assert a != {"a": FP8, "b": MX}
    assert repr(FqnToConfig({"a": None})) == "FqnToConfig({'a': None})"
    with pytest.raises(TypeError):
        a.fqn_to_config["c"] = FP8


# --- The file ---------------------------------------------------------------------------------------------------------

CONFIGS = st.sampled_from(RECIPES).map(config_from_recipe) | st.just(FP8GroupedMMConfig(accumulation="precise"))
QUANTIZATIONS = CONFIGS | st.dictionaries(
    KEYS | st.sampled_from(["", 'a"b', "re:\\d+\\.é"]), CONFIGS | st.none(), max_size=5
).map(FqnToConfig)


@given(QUANTIZATIONS)
def test_round_trips(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "quantize.toml"
    save_toml(path, config)
    assert load_toml(str(path)) == config
    assert type(config).from_dict(config.to_dict()) == config
    assert type(config).from_toml(config.to_toml()) == config


def test_the_file_as_people_write_it(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        "[train]\nsteps = 10\n\n[quantize.fqn_to_config]\n"
        '"re:.*experts.*" = "mxfp8_rceil"\n'
        '"layers.0.moe.experts" = { recipe = "fp8_rowwise", accumulation = "precise" }\n'
        '_default = "none"\n'
    )
    config = load_toml(path)
    assert list(config.fqn_to_config) == ["re:.*experts.*", "layers.0.moe.experts", "_default"]
    assert config.resolve(W1) == FP8GroupedMMConfig(accumulation="precise")
    assert config.resolve("layers.1.moe.experts.w1") == MX
    assert config.resolve("norm.weight") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[quantize.fqn_to_config]\na = 1", r"fqn_to_config\['a'\]=1 is not a config"),
        ('[quantize]\nrecipe = "bf16"\nfqn_to_config = {}', "found recipe, fqn_to_config; give one table"),
        ("[quantize]\nfqn_to_config = 1", "found fqn_to_config; give one table"),
        ("[quantize]\nrecipes = 1", "recipe is missing"),
        ("x", "not valid TOML"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        load_toml(path)


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "quantize.toml"
    save_toml(path, FP8)

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_toml(path, MX)
    assert load_toml(path) == FP8
    assert [p.name for p in tmp_path.iterdir()] == ["quantize.toml"]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_toml(tmp_path / "none.toml")


def test_from_toml_of_the_other_kind():
    with pytest.raises(ValueError, match="found recipe; give one table, fqn_to_config"):
        FqnToConfig.from_toml(FP8.to_toml())
    with pytest.raises(ValueError, match="recipe is missing"):
        GroupedMMConfig.from_toml(FqnToConfig({"a": FP8}).to_toml())
