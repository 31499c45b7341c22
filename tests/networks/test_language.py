"""Language networks: causal, with state, tied weights, second derivatives."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_nested.networks import GPT, LSTMNetwork
from lightning_nested.networks.language import language_network

NETWORKS: dict[str, Any] = {
    "lstm": lambda **o: LSTMNetwork(20, width=6, layers=2, **o),
    "gpt": lambda **o: GPT(20, width=6, depth=2, heads=2, context=9, **o),
}
TOKENS = torch.arange(14).view(2, 7)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_prediction_sees_only_what_came_before(make: Any) -> None:
    network = make().double()
    before = network(TOKENS).logits
    changed = TOKENS.clone()
    changed[:, 4] = 19
    after = network(changed).logits
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, 4:], after[:, 4:])
    assert before.shape == (2, 7, 20)


def test_rows_that_are_cut_go_on_by_the_state() -> None:
    network = NETWORKS["lstm"]().double()
    whole = network(TOKENS)
    first = network(TOKENS[:, :3])
    second = network(TOKENS[:, 3:], first.state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole.logits)
    assert NETWORKS["gpt"]()(TOKENS).state is None


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_tied_weights_are_one_tensor(make: Any) -> None:
    tied, own = make(tie_weights=True), make(tie_weights=False)
    assert tied.head.weight is tied.embedding.weight
    assert sum(p.numel() for p in own.parameters()) - sum(p.numel() for p in tied.parameters()) == 120


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_there_is_a_second_derivative(make: Any) -> None:
    network = make().double()
    parameters = list(network.parameters())
    direction = [torch.randn_like(p) for p in parameters]

    def slope() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            loss = network(TOKENS).logits.square().mean()
        found = torch.autograd.grad(loss, parameters, create_graph=True)
        return sum((g * d).sum() for g, d in zip(found, direction, strict=True))

    curvature = sum(
        float((h * d).sum()) for h, d in zip(torch.autograd.grad(slope(), parameters), direction, strict=True)
    )
    step, slopes = 1e-5, []
    for by in (step, -2 * step):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=by)
        slopes.append(float(slope().detach()))
    # Error of the central difference: O(step²).
    assert curvature == pytest.approx((slopes[0] - slopes[1]) / (2 * step), rel=1e-5)


def test_units_are_dropped_where_the_options_say() -> None:
    network = LSTMNetwork(
        20,
        width=6,
        layers=3,
        word_dropout=0.1,
        input_dropout=0.2,
        hidden_dropout=[0.3, 0.4],
        output_dropout=0.5,
    )
    assert [layer.p for layer in network.dropouts.values()] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [m.p for m in GPT(20, width=6, depth=1, dropout=0.3).modules() if type(m) is nn.Dropout] == [
        0.3
    ] * 3
    seen = LSTMNetwork(20, width=200, output_dropout=0.5)(TOKENS)
    assert float((seen.dropped == 0).float().mean()) == pytest.approx(0.5, abs=0.15)
    assert not bool((seen.features == 0).any())


def test_refusals() -> None:
    line = nn.Linear(2, 2)
    assert language_network(line, 5) is line
    for call, message in (
        (lambda: language_network("lstn", 5), r"'lstm', 'gpt'.*Got 'lstn'.*Close matches: lstm"),
        (lambda: language_network("gpt", 5, {"widht": 3}), "constructor's arguments.*widht"),
        (lambda: language_network(line, 5, {"width": 3}), "must be empty"),
        (lambda: language_network("gpt", 5, {"width": 7}), "multiple of heads. Got 7 and 2"),
        (lambda: language_network("lstm", 5, {"width": "a"}), "width must be a whole number"),
        (lambda: LSTMNetwork(5, layers=3, hidden_dropout=[0.1]), "layers − 1 = 2"),
        (lambda: LSTMNetwork(5, output_dropout=1.0), "output_dropout must lie in"),
        (lambda: NETWORKS["gpt"]()(torch.zeros(1, 10, dtype=torch.long)), "at most context=9 tokens. Got 10"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
