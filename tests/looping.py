"""Short loops of tiny models with plain gradient descent, for CUDA graphs and their double."""

import torch
from helpers import ATTENTION, MLP, SPARSE, add_lora, make_batch, tiny_model

from sparselora_hf import sparsify

GRAPHS = SPARSE.replace(mlp_sparsity=0.9, attention_sparsity={"1-3": 0.75}, cuda_graphs=True)
CHECKPOINTED = {"use_reentrant": False}
SETTINGS = {
    "the paper's": {},
    "exact savings alone": {"mlp_sparsity": 0.0, "attention_sparsity": 0.0},
    "no exact savings": {"exact": False},
    "output tokens choose": {"criterion": "output", "compensation": "low_rank", "compensation_rank": 4},
    "averages choose": {"criterion": "svd_mean"},
    "fixed sets": {"criterion": "static", "compensation": "mean"},
    "sliced branches": {"lora_branch": "sliced"},
}


def batches(n: int, forms: int = 1) -> list:
    """Batches of as many shapes by turns, each with tokens of its own."""
    shapes = [((9, 5, 12), (3, 4, 2)), ((7, 8, 3), (2, 2, 5))][:forms]
    return [make_batch(*shapes[step % forms], seed=step) for step in range(n)]


def quantised_model(kind: str):
    """A base of four layers in bitsandbytes' format."""
    from quantised import quantise

    return quantise(tiny_model(layers=4), kind, torch.bfloat16)


class loop:  # noqa: N801
    """A sparse model of four layers and its steps."""

    def __init__(
        self,
        config,
        steps,
        *,
        device="cpu",
        autocast=False,
        change=None,
        gather=1,
        checkpointing=None,
        base=None,
        lora=None,
    ):
        self.device, self.autocast, self.gather = device, autocast, gather
        base = tiny_model(layers=4) if base is None else base()
        self.model = add_lora(base, ATTENTION + MLP, **(lora or {})).train().to(device)
        self.model.config.use_cache = False
        if checkpointing is not None:
            self.model.gradient_checkpointing_enable(checkpointing)
        if change is not None:
            change(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.trained, 0.05)
        self.handle = sparsify(self.model, config)
        self.handle.begin_run(steps)
        self.done = 0

    def forward(self, batch):
        """The loss of a batch."""
        self.handle.begin_step(self.done)
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            return self.model(**batch).loss

    def step(self, batch, learn=True):
        """One step; returns its loss."""
        loss = self.forward(batch)
        loss.backward()
        self.done += 1
        if learn and self.done % self.gather == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()

    def figures(self):
        """What the log would say."""
        return self.handle.figures()


def train(config, steps, **options):
    """Losses, and the parameters at the end."""
    run = loop(config, len(steps), **options)
    losses = [run.step(batch) for batch in steps]
    run.handle.restore()
    return losses, [p.detach().clone() for p in run.trained]
