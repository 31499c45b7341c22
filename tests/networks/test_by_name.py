import pytest
import torch
from torch import nn

from lightning_nested.networks import MLP, SmallCNN, build_network


def test_small_networks_take_options() -> None:
    mlp = build_network("MLP", num_classes=3, input_shape=(1, 4, 4), options={"hidden": [7]})
    cnn = build_network("cnn", num_classes=3, input_shape=(2, 8, 8), options={"batch_norm": True})
    assert isinstance(mlp, MLP)
    assert isinstance(cnn, SmallCNN)
    assert mlp(torch.zeros(1, 1, 4, 4)).shape == cnn(torch.zeros(1, 2, 8, 8)).shape == (1, 3)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "mnasnet0_5"])
def test_torchvision_networks_fit_channels_and_classes(name: str) -> None:
    network = build_network(name, num_classes=7, input_shape=(1, 32, 32))
    first = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    assert first.in_channels == 1
    assert network.training
    assert network.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_matching_channels_leave_the_network_as_torchvision_makes_it() -> None:
    import torchvision

    torch.manual_seed(3)
    expected = torchvision.models.resnet18(weights=None, num_classes=5)
    torch.manual_seed(3)
    network = build_network("resnet18", num_classes=5, input_shape=(3, 32, 32))
    state = network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())


def test_the_trial_moves_no_statistics() -> None:
    network = build_network("resnet18", num_classes=5, input_shape=(1, 16, 16))
    assert int(network.get_buffer("bn1.num_batches_tracked")) == 0


def test_networks_with_auxiliary_heads_give_plain_logits_in_train_mode() -> None:
    network = build_network("googlenet", num_classes=4, input_shape=(1, 64, 64))
    assert network.train()(torch.zeros(2, 1, 64, 64)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet81", {}, r"Got 'resnet81'\. Close matches: .*resnet18"),
        ("mpl", {}, "Close matches: mlp"),
        ("fasterrcnn_resnet50_fpn", {}, "must be 'mlp', 'cnn', a classification network"),
        ("mlp", {"hiden": [3]}, r"Got \{'hiden': \[3\]\}: .*unexpected keyword argument 'hiden'"),
        ("alexnet", {}, r"must accept images of `input_shape`\. Got \(1, 8, 8\)"),
    ],
)
def test_bad_names_and_options_are_explained(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(name, num_classes=10, input_shape=(1, 8, 8), options=options)
