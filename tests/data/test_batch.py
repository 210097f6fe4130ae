"""A batch is a value."""

import dataclasses

import pytest
import torch

from megadit.data.batch import Batch


@pytest.fixture
def batch():
    ids = torch.zeros(3, 5, dtype=torch.int64)
    return Batch(torch.tensor([4, 0, 2]), torch.zeros(3, 1, 8, 8), {"text_ids_BL": ids, "text_mask_BL": ids.bool()})


def test_its_length_is_the_number_of_samples(batch):
    assert len(batch) == 3


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Batch)])
def test_its_fields_cannot_be_replaced(field, batch):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(batch, field, None)
