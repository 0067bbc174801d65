import math

import numpy as np
import pytest

from dsel_trl.functional.loss.rho_loss import median_irreducible, reducible_loss
from dsel_trl.functional.ranking import top_k

NAN = math.nan


def test_noise_is_skipped_and_the_learnable_comes_first():
    loss, irreducible = [3.0, 3.0, 0.2], [2.9, 0.5, 0.1]  # noisy, learnable, learned
    assert top_k(reducible_loss(loss, irreducible), 3).tolist() == [1, 0, 2]


def test_missing_values():
    assert median_irreducible([1.0, NAN, 3.0, 8.0]) == 3.0
    assert math.isnan(median_irreducible([NAN]))
    np.testing.assert_allclose(reducible_loss([5.0, 5.0, NAN], [1.0, NAN, 1.0]), [4.0, 4.0, NAN])
    np.testing.assert_allclose(reducible_loss([5.0, 5.0], [1.0, NAN], missing=2.0), [4.0, 3.0])
    with pytest.raises(ValueError, match="2 losses do not match 1"):
        reducible_loss([1.0, 2.0], [1.0])
