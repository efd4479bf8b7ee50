from __future__ import annotations

import pytest

from ke_gym.testing import honest


@pytest.mark.parametrize("name", ["softmax", "instance_norm", "bucketize", "embedding_bag", "matmul_row_max"])
def test_no_honest_kernel_is_rejected(name: str) -> None:
    results = honest.run([name])
    assert len(results) >= 3
    assert all(r.ok for r in results), [(r.kernel.name, r.evaluation.log) for r in results if not r.ok]
