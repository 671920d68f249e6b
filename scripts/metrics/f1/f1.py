"""F1 as an `evaluate` module that needs no network: `evaluate.load("scripts/metrics/f1")`."""

import datasets
import evaluate
from sklearn.metrics import f1_score


class F1(evaluate.Metric):
    """The harmonic mean of precision and recall, from 0 to 1: of class 1, or averaged over more than two classes."""

    def _info(self):
        label = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=(
                "predictions, references: class numbers, one per example; average: 'binary', 'macro', 'micro' or "
                "'weighted', by default 'binary' when there are no classes but 0 and 1 and 'macro' otherwise."
            ),
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, predictions, references, average=None):
        if average is None:
            average = "binary" if {*predictions, *references} <= {0, 1} else "macro"
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0))}
