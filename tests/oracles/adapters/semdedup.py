"""Oracle adapter for SemDeDup.

The stored embeddings are unit vectors up to the rounding of the file, and the published code does not clip.
"""

from dsel_trl.functional.text.semdedup import max_similarity, rank_clusters, semdedup_keep


def evaluate(oracle):
    embeddings, labels = oracle["embeddings"], oracle["labels"]
    for keep, expected in oracle["results"].items():
        orders = rank_clusters(embeddings, labels, oracle["centroids"], keep=keep, clip=False)
        if len(expected["clusters"]) != len(orders):
            listed = [order for order in orders if len(order.ids)]
        else:
            listed = orders
        got = [
            {"order": order.ids, "dist_to_centroid": order.distance, "max_sim_to_earlier": order.max_similarity}
            for order in listed
        ]
        yield f"{keep}.clusters", got, expected["clusters"]
        similarity = max_similarity(orders, len(labels))
        for key, ids in expected["kept"].items():
            yield f"{keep}.{key}", semdedup_keep(similarity, float(key.removeprefix("eps="))), ids
