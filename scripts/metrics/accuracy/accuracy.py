"""Accuracy as an `evaluate` module that needs no network: `evaluate.load("scripts/metrics/accuracy")`."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their reference, between 0 and 1."""

    def _info(self):
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions, references: class numbers, one per example.",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(accuracy_score(references, predictions))}
