"""A small vision transformer, trained from scratch to tell colours and shapes; and what a linear probe reads off it."""

from __future__ import annotations

import torch
from rc_agents.benchmarks.pictures import COLOURS, SHAPES, SIZE, Pictures
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTModel

WIDTH, BATCH = 64, 64
WAYS = (len(COLOURS), len(SHAPES))


def new_eye(layers: int = 3) -> ViTModel:
    """Returns a vision transformer with random weights: 36 patches of 4 x 4 pixels."""
    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=4,
    )
    return ViTModel(config, add_pooling_layer=False)


def trained_eye(pictures: Pictures, seed: int, *, epochs: int = 7, rate: float = 3e-3) -> ViTModel:
    """Trains an eye with two heads, one for the colour and one for the shape, on the mean of its last states.

    The heads are thrown away; what stays is frozen.
    """
    torch.manual_seed(seed)
    eye, heads = new_eye(), nn.ModuleList(nn.Linear(WIDTH, ways) for ways in WAYS)
    parameters = [*eye.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    steps = epochs * (len(pictures) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    eye.train()
    for step in range(steps):
        if step % (len(pictures) // BATCH) == 0:
            order = torch.randperm(len(pictures))
        rows = order[step * BATCH % (len(pictures) // BATCH * BATCH) :][:BATCH]
        states_BD = eye(pictures.pixels[rows]).last_hidden_state.mean(1)
        wanted_BK = pictures.labels[rows]
        loss = sum(cross_entropy(head(states_BD), wanted_BK[:, k]) for k, head in enumerate(heads))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return eye.eval().requires_grad_(False)


@torch.no_grad()
def mean_states(eye: ViTModel, pictures: Pictures) -> Tensor:
    """Returns the mean over all positions of the states behind the last block, (N, WIDTH)."""
    found = []
    for rows in pictures.pixels.split(256):
        states_BSD = eye(rows, output_hidden_states=True).hidden_states[-1]
        found.append(states_BSD.mean(1))
    return torch.cat(found)


class Probe:
    """Logistic regression from an eye's mean states to the colour and to the shape: what is there to be read.

    Args:
        eye: frozen.
        pictures: to fit it on.
        penalty: on the squared weights.
    """

    def __init__(self, eye: ViTModel, pictures: Pictures, penalty: float = 1e-4) -> None:
        self.eye = eye
        states_ND = mean_states(eye, pictures)
        self.mean, self.scale = states_ND.mean(0), states_ND.std(0) + 1e-6
        self.heads = nn.ModuleList(nn.Linear(WIDTH, ways) for ways in WAYS)
        for head in self.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        x_ND = (states_ND - self.mean) / self.scale
        optimizer = torch.optim.LBFGS(
            self.heads.parameters(), max_iter=200, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros(())
            for k, head in enumerate(self.heads):
                total = total + cross_entropy(head(x_ND), pictures.labels[:, k])
                total = total + penalty * head.weight.square().sum()
            total.backward()
            return total

        optimizer.step(loss)

    @torch.no_grad()
    def read(self, pictures: Pictures) -> Tensor:
        """Returns the likeliest colour and shape of each picture, (N, 2)."""
        x_ND = (mean_states(self.eye, pictures) - self.mean) / self.scale
        return torch.stack([head(x_ND).argmax(-1) for head in self.heads], 1)
