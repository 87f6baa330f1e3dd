"""One contract for nearest neighbours, over FAISS and over the in-memory double."""

import numpy as np
import pytest

from dylora_stream.core.ports import IndexFactory
from dylora_stream.store.index import FaissIndex
from dylora_stream.testing import MemoryIndex


@pytest.fixture(params=[FaissIndex, MemoryIndex], ids=["faiss", "memory"])
def factory(request: pytest.FixtureRequest) -> IndexFactory:
    """Both implementations."""
    return request.param  # type: ignore[no-any-return]


def test_distances_are_euclidean_and_ascending(factory: IndexFactory) -> None:
    """Not squared, nearest first, with the ids that were given."""
    index = factory(2)
    index.add(np.array([7, 9]), np.array([[0, 0], [3, 4]], dtype=np.float32))
    distances, ids = index.search(np.array([[0, 0]], dtype=np.float32), 2)
    np.testing.assert_allclose(distances, [[0.0, 5.0]], atol=1e-6)
    assert ids.tolist() == [[7, 9]]


def test_removing_keeps_the_other_ids(factory: IndexFactory) -> None:
    """Ids do not shift; unknown ones are ignored."""
    index = factory(1)
    index.add(np.arange(5), np.arange(5, dtype=np.float32)[:, None])
    index.remove(np.array([0, 2, 77]))
    _, ids = index.search(np.array([[4.0]], dtype=np.float32), 3)
    assert ids.tolist() == [[4, 3, 1]]
    assert len(index) == 3


def test_what_is_missing_is_far_and_nameless(factory: IndexFactory) -> None:
    """Fewer vectors than asked for, or none: id -1 at an infinite distance."""
    index = factory(1)
    assert index.search(np.zeros((2, 1), dtype=np.float32), 1)[1].tolist() == [[-1], [-1]]
    index.add(np.array([3]), np.ones((1, 1), dtype=np.float32))
    distances, ids = index.search(np.zeros((1, 1), dtype=np.float32), 2)
    assert ids.tolist() == [[3, -1]]
    assert np.isinf(distances[0, 1])


def test_adding_an_id_again_replaces_its_vector(factory: IndexFactory) -> None:
    """One vector an id."""
    index = factory(1)
    for value in (1.0, 5.0):
        index.add(np.array([3]), np.array([[value]], dtype=np.float32))
    distances, _ = index.search(np.array([[5.0]], dtype=np.float32), 2)
    assert len(index) == 1
    assert distances[0, 0] == pytest.approx(0.0)
