"""The target of BYOL and BGRL: a moving average that is in every checkpoint and no part of θ."""

import shutil
import sys

import pytest
import torch
from torch import nn

import metapt
from bench.domains.target import add_target, move_target, target_params


@pytest.fixture
def network():
    """A network, of which the target follows the first layer alone."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    add_target(network, followed(network))
    return network


def followed(network: nn.Module) -> dict:
    return {name: p for name, p in network.named_parameters() if name.startswith("0.")}


def move_parameters(network: nn.Module) -> None:
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))


def test_the_target_begins_as_a_copy_of_what_it_follows(network):
    before = {name: p.detach().clone() for name, p in followed(network).items()}
    move_parameters(network)
    target = target_params(network, followed(network))
    assert list(target) == ["0.weight", "0.bias"]
    for name, p in before.items():
        assert torch.equal(target[name], p)
        assert not torch.equal(target[name], followed(network)[name])
        assert not target[name].requires_grad


def test_the_target_is_in_the_state_of_the_network_and_no_parameter_of_it(network):
    assert set(dict(network.named_parameters())) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    move_parameters(network)
    move_target(network, followed(network), 0.5)
    other = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    add_target(other, followed(other))
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.target, network.target)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_the_target_moves_towards_what_it_follows(network, momentum):
    before = target_params(network, followed(network))
    before = {name: p.clone() for name, p in before.items()}
    move_parameters(network)
    parameters = {name: p.detach().clone() for name, p in network.named_parameters()}
    move_target(network, followed(network), momentum)
    for name, p in target_params(network, followed(network)).items():
        expected = momentum * before[name] + (1 - momentum) * parameters[name]
        torch.testing.assert_close(p, expected)
    for name, p in network.named_parameters():
        assert torch.equal(p, parameters[name])
    assert not network.target.requires_grad


def test_a_gradient_through_the_target_is_no_gradient_of_theta(network):
    inputs = torch.randn(5, 3)
    theta = dict(network.named_parameters())
    online = metapt.call(network, theta, inputs)
    aim = metapt.call(network, {**theta, **target_params(network, followed(network))}, inputs)
    assert torch.equal(online, aim)
    (slope,) = torch.autograd.grad(aim.sum(), [theta["0.weight"]], allow_unused=True)
    assert slope is None


@pytest.mark.parametrize("name", ["ppi", "ecg"])
def test_a_domain_without_the_file_says_which_one_it_needs(tmp_path, monkeypatch, name):
    path = tmp_path / f"{name}.py"
    shutil.copy(metapt.HERE / "bench" / "domains" / path.name, path)
    monkeypatch.setitem(sys.modules, "bench.domains.target", None)
    with pytest.raises(metapt.BadInput, match=r"^bench/domains/target.py is missing") as caught:
        metapt.load_module(path, "of this test")
    assert "\n" not in str(caught.value)
