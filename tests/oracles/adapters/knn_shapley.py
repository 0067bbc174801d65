"""Oracle adapter for KNN-Shapley."""

import numpy as np

from dsel_trl.functional.target.knn_shapley import knn_shapley, knn_shapley_values


def evaluate(oracle):
    for i, case in enumerate(oracle["cases"]):
        given, expected = case["inputs"], case["expected"]
        rows, labels, goal, truth = (np.array(given[key]) for key in ("X", "y", "X_test", "y_test"))
        each = [
            knn_shapley_values(((rows - point) ** 2).sum(axis=1), labels == label, given["K"])
            for point, label in zip(goal, truth, strict=True)
        ]
        yield f"cases[{i}].per_test", [values.tolist() for values in each], expected["per_test"]
        mean = knn_shapley(rows, goal, lambda j, y=labels, t=truth: y == t[j], given["K"], metric="sqeuclidean")
        yield f"cases[{i}].mean", mean, expected["mean"]
