"""A dense decoder with masks, written from the formulas of the method alone: slow, and the judge of the sparse one.

Every product is computed in full and multiplied by a mask of kept channels. Nothing of `sparselora_hf` is used
but the SVD factors, which are given.
"""

import torch
from torch import nn
from torch.nn import functional as F


def double_norms(model: nn.Module) -> nn.Module:
    """Replace the family's norm, which computes in float32, by torch's, so that float64 stays float64."""
    decoder = model.model
    for layer in decoder.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, _norm(getattr(layer, name)))
    decoder.norm = _norm(decoder.norm)
    return model.double()


def _norm(old: nn.Module) -> nn.RMSNorm:
    new = nn.RMSNorm(old.weight.shape[0], eps=old.variance_epsilon)
    new.weight.data.copy_(old.weight.data)
    return new.requires_grad_(False)


def next_token_loss(logits, labels):
    """Mean cross-entropy over labelled tokens, in the type of the logits; 0 where there is none."""
    targets = labels[:, 1:].flatten()
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum")
    return total / (targets != -100).sum().clamp(min=1)


class MaskedDense:
    """The masked dense computation of one model with adapters.

    Args:
        model: PEFT model; its weights are read, its code is not run.
        mlp_keep: channels kept per layer, None for all.
        attention_keep: kv channels kept per layer, None for all.
        factors: by (layer, role) a matrix ``[out, in]`` that scores channels in place of the weight; without it
            the weight itself does.
        label_rule: output tokens are only those that carry a label.
        mean_tokens: score the mean of each sequence's context tokens.
        sliced: adapters of attention act on kept channels alone.
    """

    def __init__(
        self, model, mlp_keep, attention_keep, factors=None, label_rule=False, mean_tokens=False, sliced=False
    ):
        self.config = model.config
        self.heads, self.kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self.rotary = model.base_model.model.model.rotary_emb
        self.mlp_keep, self.attention_keep = mlp_keep, attention_keep
        self.factors, self.label_rule, self.mean_tokens, self.sliced = factors, label_rule, mean_tokens, sliced
        self.trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        self.p = {
            name.removeprefix("base_model.model."): p.detach().clone().requires_grad_(p.requires_grad)
            for name, p in model.named_parameters()
        }
        self.sets: dict[tuple[int, str], list[int]] = {}
        self.gap = 1.0  # between the last channel kept and the first dropped, relative to the best
        active = model.active_adapter
        self.scaling = next(m.scaling[active] for m in model.modules() if hasattr(m, "lora_A"))

    # parts

    def weight(self, name):
        inner = f"{name}.base_layer.weight"
        return self.p[inner if inner in self.p else f"{name}.weight"]

    def bias(self, name):
        inner, outer = f"{name}.base_layer.bias", f"{name}.bias"
        return self.p[inner] if inner in self.p else self.p.get(outer, 0)

    def branch(self, name, x):
        if f"{name}.lora_A.default.weight" not in self.p:
            return 0
        a, b = (self.p[f"{name}.lora_{part}.default.weight"] for part in "AB")
        return (x @ a.T @ b.T + self.p.get(f"{name}.lora_B.default.bias", 0)) * self.scaling

    def norm(self, name, x):
        return x * (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt() * self.p[f"{name}.weight"]

    def scored(self, layer, role, name, x):
        matrix = self.weight(name) if self.factors is None else self.factors[layer, role]
        return x @ matrix.detach().T

    def keep_best(self, key, scores, keep):
        order = sorted(range(len(scores)), key=lambda c: -float(scores[c]))
        self.sets[key] = sorted(order[:keep])
        margin = float(scores[order[keep - 1]] - scores[order[keep]]) if keep < len(order) else 1.0
        self.gap = min(self.gap, margin / max(float(scores[order[0]]), 1e-300))
        return self.sets[key]

    def score_rows(self, x):
        """What is scored: context rows, or their mean in each row of the batch."""
        x = x.detach()
        if not self.mean_tokens:
            return x[self.context]
        return torch.stack([x[b][c].mean(0) for b, c in enumerate(self.context) if c.any()])

    def row_mask(self, width, kept):
        """1 everywhere, but 0 on dropped channels of context rows: ``[B, S, width]``."""
        channels = torch.zeros(width, dtype=torch.float64)
        channels[list(kept)] = 1
        return torch.where(self.context[..., None], channels, torch.ones(width, dtype=torch.float64))

    # layers

    def attention(self, i, x, allowed):
        name = f"model.layers.{i}.self_attn"
        roles = {role: f"{name}.{role}_proj" for role in "qkvo"}
        b, s, _ = x.shape
        q_width, kv_width = self.weight(roles["q"]).shape[0], self.weight(roles["k"]).shape[0]
        d, groups = kv_width // self.kv_heads, self.heads // self.kv_heads
        masks = dict.fromkeys("qkvo", 1)
        if self.attention_keep[i] is not None and bool(self.context.any()):
            seen = self.score_rows(x)
            norms = {role: self.scored(i, role, roles[role], seen).norm(dim=0) for role in "qkv"}
            users = [[(groups * (c // d) + g) * d + c % d for g in range(groups)] for c in range(kv_width)]
            qk = [norms["q"][users[c]].norm() * norms["k"][c] for c in range(kv_width)]
            qk_set = self.keep_best((i, "qk"), qk, self.attention_keep[i])
            vo_set = self.keep_best((i, "vo"), list(norms["v"]), self.attention_keep[i])
            masks["q"] = self.row_mask(q_width, [u for c in qk_set for u in users[c]])
            masks["k"], masks["v"] = self.row_mask(kv_width, qk_set), self.row_mask(kv_width, vo_set)
            masks["o"] = self.row_mask(q_width, [u for c in vo_set for u in users[c]])
        heads = {}
        for role in "qkv":
            branch = self.branch(roles[role], x) * (masks[role] if self.sliced else 1)
            y = (x @ self.weight(roles[role]).T) * masks[role] + self.bias(roles[role]) + branch
            heads[role] = y.view(b, s, -1, d).transpose(1, 2)
        cos, sin = (t.double()[:, None] for t in self.rotary(x, torch.arange(s)[None]))
        q, k = (h * cos + torch.cat([-h[..., d // 2 :], h[..., : d // 2]], -1) * sin for h in (heads["q"], heads["k"]))
        k, v = (h.repeat_interleave(groups, 1) for h in (k, heads["v"]))
        weights = (q @ k.mT / d**0.5).masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
        a = (weights @ v).transpose(1, 2).reshape(b, s, -1)
        branch = self.branch(roles["o"], a * masks["o"] if self.sliced else a)
        return (a * masks["o"]) @ self.weight(roles["o"]).T + self.bias(roles["o"]) + branch

    def mlp(self, i, x):
        gate, up, down = (f"model.layers.{i}.mlp.{part}_proj" for part in ("gate", "up", "down"))
        mask = 1
        if self.mlp_keep[i] is not None and bool(self.context.any()):
            seen = self.score_rows(x)
            g = self.scored(i, "gate", gate, seen) + self.bias(gate)
            u = self.scored(i, "up", up, seen) + self.bias(up)
            scores = (F.silu(g) * u).norm(dim=0)
            mask = self.row_mask(len(scores), self.keep_best((i, "mlp"), list(scores), self.mlp_keep[i]))
        g, u = (x @ self.weight(n).T + self.bias(n) + self.branch(n, x) for n in (gate, up))
        h = F.silu(g) * u * mask
        return h @ self.weight(down).T + self.bias(down) + self.branch(down, h)

    # model

    def plan(self, labels, mask):
        self.context = torch.zeros(labels.shape, dtype=torch.bool)
        for b in range(labels.shape[0]):
            for t in range(labels.shape[1]):
                own = labels[b, t] != -100
                predicts = t + 1 < labels.shape[1] and labels[b, t + 1] != -100
                output = own or (predicts and not self.label_rule)
                self.context[b, t] = not output and bool(mask[b, t])

    def __call__(self, batch):
        """Logits ``[B, S, V]`` and loss; gradients are left on the adapters."""
        ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
        self.plan(labels, mask)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        allowed = (causal & mask[:, None].bool()) | torch.eye(ids.shape[1], dtype=torch.bool)
        x = self.p["model.embed_tokens.weight"][ids]
        for i in range(self.config.num_hidden_layers):
            name = f"model.layers.{i}"
            x = x + self.attention(i, self.norm(f"{name}.input_layernorm", x), allowed)
            x = x + self.mlp(i, self.norm(f"{name}.post_attention_layernorm", x))
        logits = self.norm("model.norm", x) @ self.p["lm_head.weight"].T
        loss = next_token_loss(logits, labels)
        loss.backward()
        gradients = {name: self.p[name.removeprefix("base_model.model.")].grad for name in self.trainable}
        return logits.detach(), (loss.detach(), gradients)
