"""Reads the S2L oracle: the picks inside a cluster are random, their numbers are not."""

import numpy as np

from dsel_trl.functional.loss.s2l import s2l_select


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    labels, min_size = np.array(inputs["cluster_labels"]), inputs["min_cluster_size_exclusive"]
    wanted = expected.get("picked_per_large_cluster", {})
    for seed in range(3):
        picked = s2l_select(labels, inputs["budget"], np.random.default_rng(seed), min_size=min_size)
        sizes = {label: int((labels == label).sum()) for label in np.unique(labels)}
        counts = {label: int((labels[picked] == label).sum()) for label in sizes}
        large = {str(label): counts[label] for label in sizes if sizes[label] > min_size}
        got = {
            # A large cluster without picks may be listed as 0 or be left out.
            "picked_per_large_cluster": {name: n for name, n in large.items() if n or name in wanted},
            "picked_from_pooled_small_clusters": sum(counts.values()) - sum(large.values()),
            "total": len(picked),
            "unique": len(set(picked.tolist())) == len(picked),
        }
        for name, value in expected.items():
            yield f"seed {seed}: {name}", got[name], value
