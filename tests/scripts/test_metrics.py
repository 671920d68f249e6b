"""The metrics that `evaluate` loads from `scripts/metrics`, without a network."""

import evaluate
import pytest
from running import ROOT


@pytest.fixture(params=["accuracy", "f1"])
def metric(request):
    return evaluate.load(str(ROOT / "scripts" / "metrics" / request.param), keep_in_memory=True)


def test_two_classes(metric):
    # One true positive, one false positive, two missed: precision 1/2, recall 1/3.
    found = metric.compute(predictions=[1, 1, 0, 0, 0], references=[1, 0, 1, 1, 0])
    assert found == pytest.approx({"accuracy": 0.4} if metric.name == "accuracy" else {"f1": 0.4})


def test_more_classes_count_the_same(metric):
    # F1 of the classes: 2/3, 2/3 and 0, although most examples are of class 0.
    found = metric.compute(predictions=[0, 0, 0, 1, 0], references=[0, 0, 2, 1, 1])
    assert found == pytest.approx({"accuracy": 0.6} if metric.name == "accuracy" else {"f1": (2 / 3 + 2 / 3 + 0) / 3})


def test_f1_of_one_average():
    f1 = evaluate.load(str(ROOT / "scripts" / "metrics" / "f1"), keep_in_memory=True)
    answers = {"predictions": [1, 1, 0, 0, 0], "references": [1, 0, 1, 1, 0]}
    assert f1.compute(**answers, average="micro") == pytest.approx({"f1": 0.4})
    assert f1.compute(predictions=[0, 0], references=[0, 0]) == {"f1": 0.0}  # nothing to find, and no warning
