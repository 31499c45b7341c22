"""Networks that predict the next token: an LSTM with every dropout of its literature, and a small GPT."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_nested.arguments import at_least, checked, fraction
from lightning_nested.networks.sequence_dropout import SequenceDropout, WordDropout

State: TypeAlias = tuple[tuple[Tensor, Tensor], ...]
"""Hidden and cell state, each (1, batch, width), of each layer."""


class LanguageOutput(NamedTuple):
    """A language network returns its logits, what its penalties need, and the state at the end.

    Attributes:
        logits: Of the next token at each position, (batch, length, vocabulary_size).
        features: Last hidden layer before its dropout, (batch, length, width).
        dropped: The same after it.
        state: Recurrent state at the end; None: there is none.
    """

    logits: Tensor
    features: Tensor
    dropped: Tensor
    state: State | None


class TokenEmbedding(nn.Embedding):
    """Embedding whose small initial vectors may be output weights as well."""

    def reset_parameters(self) -> None:
        """Draw vectors from the normal distribution of deviation 0.05."""
        nn.init.normal_(self.weight, std=0.05)


@checked
class LSTMNetwork(nn.Module):
    """LSTM language network with word, variational and output dropout.

    Layers ``dropouts.input``, ``dropouts.hidden_k`` and ``dropouts.output`` drop the same units at each step,
    ``dropouts.words`` drops words. Recurrent weights, which drop-connect drops, are named
    ``layers.k.weight_hh_l0``. Zaremba, Sutskever & Vinyals (2014), arXiv 1409.2329; Gal & Ghahramani (2016), NeurIPS;
    Merity, Keskar & Socher (2018), ICLR.

    Args:
        vocabulary_size: Number of tokens.
        width: Units of each layer, and numbers of a token's vector.
        layers: Number of LSTM layers.
        word_dropout: Rate of whole words.
        input_dropout: Rate of the units of words' vectors.
        hidden_dropout: Rate between layers, one for all or one for each of the ``layers`` − 1 places.
        output_dropout: Rate after the last layer.
        tie_weights: Words' vectors are the weights of the output layer too.

    Shape:
        Tokens ``(batch, length)``; output :class:`LanguageOutput`.

    Example:
        >>> network = LSTMNetwork(50, width=8, layers=2)
        >>> tuple(network(torch.zeros(3, 5, dtype=torch.long)).logits.shape)
        (3, 5, 50)
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        width: int = 128,
        layers: int = 1,
        word_dropout: float = 0.0,
        input_dropout: float = 0.0,
        hidden_dropout: float | Sequence[float] = 0.0,
        output_dropout: float = 0.0,
        tie_weights: bool = False,
    ) -> None:
        super().__init__()
        at_least(1, vocabulary_size=vocabulary_size, width=width, layers=layers)
        between = (
            list(hidden_dropout) if isinstance(hidden_dropout, Sequence) else [hidden_dropout] * (layers - 1)
        )
        fraction(
            word_dropout=word_dropout,
            input_dropout=input_dropout,
            hidden_dropout=between,
            output_dropout=output_dropout,
        )
        if len(between) != layers - 1:
            raise ValueError(
                f"hidden_dropout must be one rate, or layers − 1 = {layers - 1} of them. Got {hidden_dropout}."
            )
        self.vocabulary_size, self.width = vocabulary_size, width
        self.embedding = TokenEmbedding(vocabulary_size, width)
        self.layers = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary_size)
        self.dropouts = nn.ModuleDict(
            {"words": WordDropout(word_dropout), "input": SequenceDropout(input_dropout)}
            | {f"hidden_{k}": SequenceDropout(rate) for k, rate in enumerate(between)}
            | {"output": SequenceDropout(output_dropout)}
        )
        if tie_weights:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: State | None = None) -> LanguageOutput:
        """Return logits, features and the state at the end of rows that begin with ``state``; None: with zeros."""
        drop = self.dropouts
        x = drop["input"](drop["words"](self.embedding(tokens), tokens))
        states = []
        for k, layer in enumerate(self.layers):
            x = x if k == 0 else drop[f"hidden_{k - 1}"](x)
            x, end = layer(x, None if state is None else state[k])
            states.append(end)
        dropped = drop["output"](x)
        return LanguageOutput(self.head(dropped), x, dropped, tuple(states))


class Block(nn.Module):
    """Causal attention and an MLP, each after a norm and before a dropout."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same shape."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout1(self.projection(seen.transpose(1, 2).flatten(2)))
        out: Tensor = x + self.dropout2(self.mlp(self.norm2(x)))
        return out


@checked
class GPT(nn.Module):
    """Small transformer for language by ``scaled_dot_product_attention``.

    The fused kernels of that function have no second derivative. ``HypergradientCallback`` takes differences of
    gradients there; for products, train inside ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``. Radford et al.
    (2019), "Language models are unsupervised multitask learners".

    Args:
        vocabulary_size: Number of tokens.
        width: Numbers of a token's vector.
        depth: Number of blocks.
        heads: Attention heads; ``width`` is a multiple of it.
        context: Longest row.
        word_dropout: Rate of whole words.
        dropout: Rate of the units of the vectors, and after each attention and MLP.
        tie_weights: Words' vectors are the weights of the output layer too.

    Shape:
        Tokens ``(batch, length)`` with a length of at most ``context``; output :class:`LanguageOutput`.

    Example:
        >>> network = GPT(50, width=8, depth=1, heads=2, context=16)
        >>> tuple(network(torch.zeros(3, 5, dtype=torch.long)).logits.shape)
        (3, 5, 50)
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        width: int = 64,
        depth: int = 2,
        heads: int = 2,
        context: int = 128,
        word_dropout: float = 0.0,
        dropout: float = 0.0,
        tie_weights: bool = True,
    ) -> None:
        super().__init__()
        at_least(1, vocabulary_size=vocabulary_size, width=width, depth=depth, heads=heads, context=context)
        fraction(word_dropout=word_dropout, dropout=dropout)
        if width % heads:
            raise ValueError(f"width must be a multiple of heads. Got {width} and {heads}.")
        self.vocabulary_size, self.width, self.context = vocabulary_size, width, context
        self.embedding, self.positions = (
            TokenEmbedding(vocabulary_size, width),
            TokenEmbedding(context, width),
        )
        self.words, self.input = WordDropout(word_dropout), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary_size, bias=False)
        if tie_weights:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: State | None = None) -> LanguageOutput:
        """Return logits and features; there is no state.

        Raises:
            ValueError: Rows are longer than ``context``.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(
                f"Rows must have at most context={self.context} tokens. Got {length}; set a larger context, or a "
                "smaller length of the data."
            )
        x = self.words(self.embedding(tokens), tokens)
        x = self.input(x + self.positions(torch.arange(length, device=tokens.device)))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return LanguageOutput(self.head(x), x, x, None)


NETWORKS: dict[str, Callable[..., nn.Module]] = {"lstm": LSTMNetwork, "gpt": GPT}


def language_network(
    network: str | nn.Module, vocabulary_size: int, options: dict[str, Any] | None = None
) -> nn.Module:
    """Build a language network from its name, ``"lstm"`` or ``"gpt"``; return one that is a module as it is.

    Raises:
        ValueError: There are options for a module, or the name or the options are unknown.
    """
    if isinstance(network, nn.Module):
        if options:
            raise ValueError(
                "`network_options` must be empty when `network` is a module. "
                f"Got {options} with a {type(network).__name__}. Set them on the network itself."
            )
        return network
    if network not in NETWORKS:
        close = ", ".join(difflib.get_close_matches(network, NETWORKS)) or ", ".join(NETWORKS)
        raise ValueError(
            f"`network` must be 'lstm', 'gpt', or an nn.Module. Got {network!r}. Close matches: {close}."
        )
    try:
        return NETWORKS[network](vocabulary_size, **(options or {}))
    except TypeError as error:
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"The network_options of {network!r} must be its constructor's arguments. Got {options}: {error}."
        ) from error
