"""`EvaConfig`: ranges, presets, and the ways in from dictionaries and strings."""

import dataclasses
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_eva import EvaConfig
from hf_eva.config import PRESETS


def test_every_field_explains_itself():
    help = EvaConfig.help()
    assert list(help) == [field.name for field in dataclasses.fields(EvaConfig)]
    assert all(text.endswith(".") and len(text) > 15 for text in help.values())


@pytest.mark.parametrize(
    "config",
    [
        EvaConfig(),
        EvaConfig(rank=8, exponent=1.0, momentum_dtype="bfloat16"),
        *map(EvaConfig.paper, ("eva", "eva_f", "eva_s")),
    ],
)
def test_a_config_survives_a_dictionary_a_string_and_a_pickle(config):
    assert EvaConfig(**config.to_dict()) == config
    assert EvaConfig(**config.changes()) == config
    assert EvaConfig.from_options({name: str(value) for name, value in config.to_dict().items()}) == config
    assert EvaConfig.from_string(",".join(f"{name}={value}" for name, value in config.to_dict().items())) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(EvaConfig(**config.to_dict()))


def test_strings_become_values():
    config = EvaConfig.from_string(" rank=8 , exponent=1,nesterov=False, damping=1e-2 ,")
    assert config == EvaConfig(rank=8, exponent=1.0, nesterov=False, damping=0.01)
    assert type(config.rank) is int and type(config.exponent) is float
    assert EvaConfig.from_string("") == EvaConfig()


@pytest.mark.parametrize("variant", ["eva", "eva_f", "eva_s"])
def test_the_paper_preset_has_the_published_values(variant):
    config = EvaConfig.paper(variant)
    assert (config.damping, config.decay, config.momentum, config.kl_clip) == (0.03, 0.95, 0.9, 0.001)
    assert (config.curvature, config.damping_mode, config.base, config.g_scale) == ("joint", "absolute", "sgd", "mean")
    assert config.kl_mode == ("none" if variant == "eva_s" else "clip") and not config.nesterov
    assert EvaConfig.paper(variant, kl_clip=0.01).kl_mode == "clip"
    assert EvaConfig.paper(variant, kl_mode="rescale").kl_mode == "rescale"


def test_presets_are_options():
    assert EvaConfig.from_options({"preset": "recipe", "rank": "4"}) == EvaConfig(rank=4)
    for preset in PRESETS[1:]:
        assert EvaConfig.from_options({"preset": preset}) == EvaConfig.paper(preset.removeprefix("paper_"))
    assert EvaConfig.from_string("preset=paper_eva,kl_clip=0.1") == EvaConfig.paper("eva", kl_clip=0.1)
    assert EvaConfig.from_string("preset=paper_eva_s,kl_clip=0.1").kl_mode == "clip"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank must be in \[1, inf\), got 0"),
        ({"rank": 1.5}, "rank must be a whole number, got 1.5"),
        ({"rank": True}, "rank must be a whole number"),
        ({"rank": "many"}, "rank must be a whole number, got 'many'"),
        ({"exponent": 0}, r"exponent must be in \(0, 1\]"),
        ({"exponent": 1.1}, r"exponent must be in \(0, 1\]"),
        ({"damping": 0}, r"damping must be in \(0, inf\)"),
        ({"damping": "nan"}, "damping must be a number"),
        ({"damping": None}, "damping must be a number"),
        ({"decay": 0}, r"decay must be in \(0, 1\]"),
        ({"momentum": 1}, r"momentum must be in \[0, 1\)"),
        ({"kl_clip": -1}, r"kl_clip must be in \(0, inf\)"),
        ({"nesterov": "perhaps"}, "nesterov must be true or false, got 'perhaps'"),
        ({"variant": "kfac"}, "variant must be one of 'eva', 'eva_f', 'eva_s', 'none', got 'kfac'"),
        ({"rank": 2, "variant": "eva"}, "rank=2 needs variant='eva_s'"),
        ({"rank": 2, "curvature": "joint"}, "rank=2 needs variant='eva_s'"),
        ({"kl_mode": "clip"}, "kl_mode='clip' needs base='sgd'"),
        ({"momentum_dtype": "float16"}, "momentum_dtype must be one of 'float32', 'bfloat16', got 'float16'"),
        ({"momentum_dtype": "bfloat16", "preset": "paper_eva"}, "momentum_dtype='bfloat16' needs base='adamw'.*'sgd'"),
        ({"momentum_dtype": "bfloat16", "variant": "none"}, "and preconditioning, but .* variant='none'"),
        ({"momentum": 0}, "nesterov=True needs momentum above 0"),
        ({"preset": "papr"}, "Unknown preset 'papr': expected one of 'recipe', 'paper_eva'"),
        ({"dampng": 1}, "Unknown Eva option 'dampng': did you mean 'damping'.*valid options are preset, variant, "),
        ({"preset": "paper_eva", "variant": "eva_f"}, "variant"),
    ],
    ids=str,
)
def test_unusable_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EvaConfig.from_options(options)


@pytest.mark.parametrize("text", ["rank", "rank=", "rank=2=3x", "=3", "rank:8"])
def test_unreadable_strings_are_refused(text):
    with pytest.raises(ValueError):
        EvaConfig.from_string(text)


def test_the_paper_knows_three_variants():
    with pytest.raises(ValueError, match="'eva', 'eva_f' and 'eva_s', got 'none'"):
        EvaConfig.paper("none")


@settings(max_examples=50, deadline=None)
@given(rank=st.integers(-2, 40), exponent=st.floats(-0.5, 1.5), decay=st.floats(-0.5, 1.5), momentum=st.floats(-1, 2))
def test_ranges_are_kept(rank, exponent, decay, momentum):
    inside = rank >= 1 and 0 < exponent <= 1 and 0 < decay <= 1 and 0 < momentum < 1
    options = {"rank": rank, "exponent": exponent, "decay": decay, "momentum": momentum}
    try:
        assert EvaConfig(**options).to_dict().items() >= options.items()
        assert inside
    except ValueError:
        assert not inside
