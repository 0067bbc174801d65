import numpy as np
import pytest

from dsel_trl.functional.target.cosine_relevance import cosine_relevance


@pytest.mark.parametrize("over", ["mean", "max"])
@pytest.mark.parametrize("block", [2, 100])
def test_it_is_the_cosine_to_each_of_the_target(over, block):
    rng = np.random.default_rng(0)
    vectors, target = rng.standard_normal((9, 4)), rng.standard_normal((5, 4))
    cosines = [[v @ t / np.linalg.norm(v) / np.linalg.norm(t) for t in target] for v in vectors]
    expected = getattr(np, over)(cosines, axis=1)
    np.testing.assert_allclose(cosine_relevance(vectors, target, over, block), expected, atol=1e-7)


def test_what_is_not_finite_or_zero():
    vectors = np.array([[1.0, 0.0], [np.nan, 1.0], [0.0, 0.0]])
    got = cosine_relevance(vectors, [[2.0, 0.0], [np.inf, 0.0]])
    np.testing.assert_allclose(got, [1.0, np.nan, 0.0], atol=1e-7)
    with pytest.raises(ValueError, match="of the target is finite"):
        cosine_relevance(vectors, vectors[1:2])
    with pytest.raises(ValueError, match="over='median'"):
        cosine_relevance(vectors, vectors, "median")
