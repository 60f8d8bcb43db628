"""NEFTune's noise on the embeddings, row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch


class RowNoise:
    """Adds uniform noise of at most alpha / sqrt(L d) to the embeddings of each row in training, L being the row's
    tokens and d the width (NEFTune, https://arxiv.org/abs/2310.05914).

    transformers' own hook takes the joined length for L and draws for the whole micro-batch. Here the noise of a row
    is a function of seed, epoch and row alone, so that it is the same however a global batch is divided, joined or
    packed, and after a resume.
    """

    def __init__(self, embeddings: torch.nn.Module, alpha: float, seed: int) -> None:
        self.alpha, self.seed = alpha, seed
        self.rows: list[tuple[int, int, int]] = []
        embeddings.register_forward_hook(self.add)

    def expect(self, rows: list[tuple[int, int, int]]) -> None:
        """The rows of the next passes in order: (tokens, epoch, position); a negative position gets no noise."""
        self.rows = rows

    def add(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Forward hook of the embeddings: (1, tokens, width), of all rows expected or, one by one, of the next."""
        if not module.training or not self.rows:
            return output
        taken, missing = [], output.shape[1]
        while missing > 0:
            taken.append(self.rows.pop(0))
            missing -= taken[-1][0]
        return output + torch.cat([self.of_row(row, output) for row in taken])[None].to(output.dtype)

    def of_row(self, row: tuple[int, int, int], like: torch.Tensor) -> torch.Tensor:
        """(tokens, width) in float32 on the device of `like`."""
        length, epoch, position = row
        width = like.shape[-1]
        if position < 0:
            return torch.zeros(length, width, device=like.device)
        seed = int(np.random.SeedSequence([self.seed, epoch, position]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        generator = torch.Generator(like.device).manual_seed(seed)
        noise = torch.rand(length, width, device=like.device, generator=generator)
        return (2 * noise - 1) * (self.alpha / math.sqrt(length * width))
