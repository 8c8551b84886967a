"""The mean of a run's two ends."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra (PyTorch)")

from models.classifier.blend import BATCHES, mean_of, real_values  # noqa: E402

pytestmark = pytest.mark.train


def test_the_mean_lies_between_the_ends_and_counts_are_those_of_the_end() -> None:
    begun = {"weight": torch.tensor([0.0, 4.0]), "num_batches_tracked": torch.tensor(3)}
    ended = {"weight": torch.tensor([2.0, 0.0]), "num_batches_tracked": torch.tensor(9)}
    found = mean_of(begun, ended, 0.25)
    assert found["weight"].tolist() == [0.5, 3.0]
    assert found["num_batches_tracked"] == 9
    assert begun["weight"].tolist() == [0.0, 4.0]


def test_norms_get_a_bounded_number_of_pictures_as_the_net_takes_them() -> None:
    batch = (torch.full((2, 3, 4, 4), 255, dtype=torch.uint8), torch.tensor([1, 2]))
    found = list(real_values(batch for _ in range(BATCHES + 5)))
    assert len(found) == BATCHES
    assert found[0].dtype == torch.float32
    assert found[0].unique().tolist() == [1.0]
