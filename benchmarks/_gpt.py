"""A small GPT and its training script as people write them; nothing in it knows of outer steps."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset


class Block(nn.Module):
    """Attention and an MLP, each after a norm."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) to the same shape."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        dropout = self.dropout if self.training else 0.0
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        x = x + self.projection(seen.transpose(1, 2).flatten(2))
        return x + functional.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class Network(nn.Module):
    """Logits of the next character; the output layer shares the embedding's weights."""

    def __init__(self, width: int, depth: int, context: int, dropout: float, checkpointing: bool) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.tokens, self.positions = nn.Embedding(128, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, 2, dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.05)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, time) to (batch, time, 128)."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            again = self.checkpointing and self.training
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class GPT(LightningModule):
    """AdamW with and without decay, warm-up and cosine, compiled if asked for."""

    def __init__(
        self,
        width: int = 32,
        depth: int = 2,
        context: int = 32,
        dropout: float = 0.0,
        checkpointing: bool = True,
        compiled: bool = False,
        lr: float = 3e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        network: Any = Network(width, depth, context, dropout, checkpointing)
        self.network = torch.compile(network) if compiled else network

    def loss(self, batch: Tensor) -> Tensor:
        """Mean cross-entropy of the next character."""
        logits = self.network(batch[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Log and return the loss."""
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Log and return the loss."""
        loss = self.loss(batch)
        self.log("val_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Matrices decay, vectors do not; the rate rises for a tenth of the run, then falls as a cosine."""
        total = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, total // 10)
        matrices = [p for p in self.parameters() if p.dim() > 1]
        vectors = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["lr"], betas=(0.9, 0.95))
        rise = LinearLR(optimizer, 0.05, total_iters=warmup)
        fall = CosineAnnealingLR(optimizer, max(1, total - warmup))
        schedule = SequentialLR(optimizer, [rise, fall], milestones=[warmup])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Text(Dataset[Tensor]):
    """Overlapping pieces of English."""

    def __init__(self, start: int, length: int, context: int, stride: int) -> None:
        text = "".join(topics[key] for key in sorted(topics))[start : start + length]
        self.codes = torch.tensor([min(ord(c), 127) for c in text])
        self.context, self.stride = context, stride

    def __len__(self) -> int:
        return (len(self.codes) - self.context - 1) // self.stride

    def __getitem__(self, i: int) -> Tensor:
        return self.codes[i * self.stride : i * self.stride + self.context + 1]


def loaders(train: int, batch: int, context: int = 32, held_out: int = 6_000) -> list[DataLoader[Tensor]]:
    """Loaders of training (so many characters), validation and test text."""
    pieces = [(0, train), (200_000, held_out), (400_000, 5 * held_out)]
    sets = [
        Text(start, length, context, context // 2 if i == 0 else context)
        for i, (start, length) in enumerate(pieces)
    ]
    return [DataLoader(s, batch, shuffle=i == 0, drop_last=i == 0) for i, s in enumerate(sets)]
