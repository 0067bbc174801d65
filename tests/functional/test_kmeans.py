"""K-means: both libraries find the same clear clusters, and one seed gives one result."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from dsel_trl.functional.kmeans import kmeans, spherical_kmeans, unit_rows

NEEDS_FAISS = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
EACH_BACKEND = pytest.mark.parametrize("backend", ["sklearn", pytest.param("faiss", marks=NEEDS_FAISS)])


def random_rows(n=60, d=5, seed=0):
    return unit_rows(np.random.default_rng(seed).standard_normal((n, d)))


def blobs(clusters, members, d=16, seed=0):
    rng = np.random.default_rng(seed)
    return np.repeat(rng.standard_normal((clusters, d)), members, axis=0) + 0.1 * rng.standard_normal(
        (clusters * members, d)
    )


def distance_to_own(rows, labels, centroids):
    """Mean cosine distance to the own centroid."""
    return float((1 - np.einsum("nd,nd->n", unit_rows(rows), centroids[labels])).mean())


def test_unit_rows_keeps_zero():
    np.testing.assert_allclose(unit_rows([[3.0, 4.0], [0.0, 0.0]]), [[0.6, 0.8], [0, 0]])


@EACH_BACKEND
def test_directions_are_found_whatever_the_length(backend):
    rng = np.random.default_rng(0)
    base = np.eye(3)[np.repeat([0, 1, 2], 20)] + 0.05 * rng.standard_normal((60, 3))
    labels, centroids = spherical_kmeans(base * rng.uniform(0.1, 10, size=(60, 1)), 3, backend=backend)
    assert labels.dtype == np.int64
    assert centroids.dtype == np.float32
    assert [len(set(labels[i : i + 20])) for i in (0, 20, 40)] == [1, 1, 1]
    assert len(set(labels.tolist())) == 3
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-5)
    assert spherical_kmeans(base[:2], 10, backend=backend)[1].shape == (2, 3)


@EACH_BACKEND
def test_plain_kmeans_goes_by_distance(backend):
    """Three lengths of one direction."""
    rows = np.repeat([1.0, 5.0, 20.0], 10)[:, None] * np.ones(4) + 0.01 * np.random.default_rng(0).random((30, 4))
    labels, centroids = kmeans(rows, 3, backend=backend)
    assert [len(set(labels[i : i + 10])) for i in (0, 10, 20)] == [1, 1, 1]
    np.testing.assert_allclose(np.sort(centroids[:, 0]), [1, 5, 20], atol=0.02)


@NEEDS_FAISS
def test_the_libraries_cluster_equally_well():
    """On data without clear clusters within a percent; clear ones come out as good as with scikit-learn's median."""
    rows = random_rows(2000, 32)
    found = [distance_to_own(rows, *spherical_kmeans(rows, 45, backend=backend)) for backend in ("sklearn", "faiss")]
    np.testing.assert_allclose(found[1], found[0], rtol=0.01)
    rows = blobs(30, 100)
    found = [
        np.median([distance_to_own(rows, *spherical_kmeans(rows, 30, seed=s, backend=backend)) for s in range(5)])
        for backend in ("sklearn", "faiss")
    ]
    # 0.0057 where every cluster is found; each one that is merged with another adds about as much.
    assert found[0] < 0.02
    assert found[1] < 0.02


@EACH_BACKEND
def test_one_seed_one_result(backend):
    rows = random_rows(500, 8)
    first, second, other = (spherical_kmeans(rows, 12, seed=seed, backend=backend) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert not np.array_equal(first[0], other[0])


@EACH_BACKEND
@pytest.mark.parametrize("seed", [2**31, 2**32 - 1, 2**40])
def test_any_seed_of_a_trainer_will_do(backend, seed):
    assert len(spherical_kmeans(random_rows(), 3, seed=seed, backend=backend)[0]) == 60


@NEEDS_FAISS
def test_faiss_gives_one_result_for_any_number_of_threads():
    import faiss

    rows, before, found = random_rows(3000, 24), faiss.omp_get_max_threads(), []
    try:
        for threads in (1, 2, 4):
            faiss.omp_set_num_threads(threads)
            found.append(spherical_kmeans(rows, 40, seed=1, backend="faiss"))
    finally:
        faiss.omp_set_num_threads(before)
    for labels, centroids in found[1:]:
        np.testing.assert_array_equal(labels, found[0][0])
        np.testing.assert_array_equal(centroids, found[0][1])


@EACH_BACKEND
@pytest.mark.parametrize("rows", [np.ones((5, 3)), np.zeros((5, 3)), np.repeat(np.eye(3)[:2], 4, axis=0)])
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_fewer_distinct_vectors_than_clusters(backend, rows):
    labels, centroids = spherical_kmeans(rows, 4, backend=backend)
    assert np.isfinite(centroids).all()
    assert ((labels >= 0) & (labels < 4)).all()
    same = labels[:, None] == labels[None]
    np.testing.assert_array_equal(same, (rows[:, None] == rows[None]).all(axis=2))


@NEEDS_FAISS
def test_faiss_clusters_few_vectors_without_a_word():
    code = (
        "import numpy as np; from dsel_trl.functional.kmeans import kmeans;"
        "kmeans(np.random.default_rng(0).random((40, 4)), 7, backend='faiss')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_missing_backend_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    monkeypatch.setitem(sys.modules, "faiss", None)
    for backend, library in (("sklearn", "scikit-learn"), ("faiss", "faiss-cpu")):
        with pytest.raises(ImportError, match=rf'{library}: pip install "dsel-trl\[cluster\]"'):
            spherical_kmeans(random_rows(4), 2, backend=backend)


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="annoy"):
        spherical_kmeans(random_rows(4), 2, backend="annoy")
    with pytest.raises(ValueError, match=r"\(3,\)"):
        unit_rows([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"ids \[1\]"):
        kmeans([[1.0, 2.0], [np.nan, 2.0]], 1)
