"""The masked dense model of any family: its own code, with activations multiplied by masks of kept channels.

Nothing of `sparselora_hf` is used but the names of a family's modules. Channels are scored by true products with the
frozen weights (the criterion ``oracle``), written out from the formulas of the method.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN


def base_of(module: nn.Module) -> nn.Module:
    """The frozen linear inside PEFT's layer."""
    return module.base_layer if hasattr(module, "base_layer") else module


class HookedDense:
    """Hooks on a PEFT model that computes in full.

    Args:
        model: the model.
        family: names of its modules.
        keep: kept channels by name of the module in the model; an attention or MLP that is not named stays whole.
        context: context positions, bool ``[B, S]``.
        values_alone: queries and keys keep all channels.
    """

    def __init__(self, model, family, keep, context, values_alone=False):
        self.family, self.context, self.values_alone = family, context, values_alone
        self.sets: dict[tuple[str, str], list[int]] = {}
        for name, count in keep.items():
            module = model.get_submodule(name)
            is_attention = name.endswith(family.attention)
            (self.mask_attention if is_attention else self.mask_mlp)(name, module, count)

    def mask(self, like, kept):
        """1 everywhere, but 0 on dropped channels of context rows."""
        channels = torch.zeros(like.shape[-1], dtype=like.dtype)
        channels[list(kept)] = 1
        rows = self.context.reshape(*like.shape[:-1])  # a shared expert sees the batch flattened
        return torch.where(rows[..., None], channels, torch.ones_like(channels))

    def scored(self, x):
        """Context rows."""
        return x.detach().reshape(-1, x.shape[-1])[self.context.flatten()]

    def best(self, name, kind, scores, count):
        order = sorted(range(len(scores)), key=lambda c: -float(scores[c]))
        self.sets[name, kind] = sorted(order[:count])

    def mask_input(self, module, name, kind, users=lambda kept: kept):
        def hook(_, args):
            return (args[0] * self.mask(args[0], users(self.sets[name, kind])), *args[1:])

        module.register_forward_pre_hook(hook)

    def mask_product(self, linear, kept):
        """The product is masked, the bias is not."""

        def hook(_, args, y):
            bias = 0 if linear.bias is None else linear.bias
            return (y - bias) * self.mask(y, kept()) + bias

        linear.register_forward_hook(hook)

    def mask_mlp(self, name, mlp, count):
        family = self.family
        if family.gate_up:
            inputs = base_of(mlp.get_submodule(family.gate_up))
        else:
            inputs = [base_of(mlp.get_submodule(n)) for n in (family.gate, family.up) if n]
        act = getattr(mlp, family.activation, None) or ACT2FN[family.activation]

        def score(_, args):
            x = self.scored(args[0])
            if isinstance(inputs, list):
                parts = [nn.functional.linear(x, linear.weight, linear.bias) for linear in inputs]
            else:
                parts = nn.functional.linear(x, inputs.weight, inputs.bias).chunk(2, -1)
            h = act(parts[0]) if len(parts) == 1 else act(parts[0]) * parts[1]
            self.best(name, "mlp", h.norm(dim=0), count)

        mlp.register_forward_pre_hook(score)
        self.mask_input(mlp.get_submodule(family.down), name, "mlp")

    def mask_attention(self, name, attention, count):
        family, d = self.family, getattr(attention, self.family.head_dim)
        o = base_of(attention.get_submodule(family.o))
        heads = o.weight.shape[1] // d
        rows = fused_rows(attention, family, heads, d)  # of each role, in its linear
        linear = {role: base_of(attention.get_submodule(family.qkv or getattr(family, role))) for role in "qkv"}
        width = len(rows["k"])
        groups = heads * d // width
        users = [[(groups * (c // d) + g) * d + c % d for g in range(groups)] for c in range(width)]

        def expand(kept):
            return [u for c in kept for u in users[c]]

        def score(_, args, kwargs):
            x = self.scored(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            norms = {role: (x @ linear[role].weight[rows[role]].T).norm(dim=0) for role in "qkv"}
            qk = [norms["q"][users[c]].norm() * norms["k"][c] for c in range(width)]
            self.best(name, "qk", qk, width if self.values_alone else count)
            self.best(name, "vo", norms["v"], count)

        attention.register_forward_pre_hook(score, with_kwargs=True)
        kept = {
            "q": lambda: [rows["q"][c] for c in expand(self.sets[name, "qk"])],
            "k": lambda: [rows["k"][c] for c in self.sets[name, "qk"]],
            "v": lambda: [rows["v"][c] for c in self.sets[name, "vo"]],
        }
        if family.qkv:
            self.mask_product(linear["q"], lambda: [row for role in "qkv" for row in kept[role]()])
        else:
            for role in "v" if self.values_alone else "qkv":
                self.mask_product(linear[role], kept[role])
        self.mask_input(o, name, "vo", expand)


def fused_rows(attention, family, heads, d):
    """Rows of queries, keys and values in their linear, counted out one by one."""
    if not family.qkv:
        return {r: list(range(base_of(attention.get_submodule(getattr(family, r))).weight.shape[0])) for r in "qkv"}
    total = base_of(attention.get_submodule(family.qkv)).weight.shape[0]
    kv = (total // d - heads) // 2
    if not family.qkv_by_head:
        firsts = {"q": (0, heads), "k": (heads, kv), "v": (heads + kv, kv)}
        return {r: [(first + h) * d + i for h in range(n) for i in range(d)] for r, (first, n) in firsts.items()}
    block = heads // kv + 2  # heads of one group: its queries, its key, its value
    places = {"q": range(block - 2), "k": [block - 2], "v": [block - 1]}
    return {r: [(h * block + p) * d + i for h in range(kv) for p in places[r] for i in range(d)] for r in "qkv"}
