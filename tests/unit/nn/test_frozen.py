"""Modules that are frozen for a while."""

import pytest
import torch
from torch import nn

import equipoise as eq


def test_modes_are_restored() -> None:
    inner = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    module, other = nn.Sequential(inner, nn.Linear(3, 3)), nn.Dropout(0.5)
    inner[0].eval()  # a layer that its user has frozen for good
    modes = [part.training for part in (*module.modules(), other)]
    with eq.nn.frozen(module, other):
        assert not any(part.training for part in (*module.modules(), other))
        with eq.nn.frozen(inner):
            pass
        assert not inner.training
    assert [part.training for part in (*module.modules(), other)] == modes
    with pytest.raises(RuntimeError, match="within"), eq.nn.frozen(module, other):
        raise RuntimeError("within")
    assert [part.training for part in (*module.modules(), other)] == modes


def test_no_random_numbers_statistics_or_batch_mates() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    x, state = torch.randn(4, 3), torch.get_rng_state()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with eq.nn.frozen(module):
        torch.testing.assert_close(module(x)[1:2], module(x[1:2]))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_batch_norm_without_running_statistics() -> None:
    module = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="no running statistics and cannot be frozen"), eq.nn.frozen(module):
        pass
    assert all(part.training for part in module.modules())
