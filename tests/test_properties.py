"""Any batch, labels, layout and schedule: the sparse model equals the masked dense one.

The default profile tries some hundred cases; `pytest --hypothesis-profile=thorough tests/test_properties.py` tries
thousands (see conftest).
"""

import dataclasses
import functools

import torch
from helpers import ATTENTION, MLP, SPARSE, VOCAB, add_lora, gradients, tiny_model
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import MaskedDense, double_norms, next_token_loss

from sparselora_hf import TokenPlan, sparsify

IGNORED, LAYERS, LONGEST, TOL = -100, 2, 9, 1e-8
SPARSITIES = (0.0, 0.0, 0.25, 0.5, 0.9, 0.99)


@functools.cache
def model(targets):
    """One model for all cases: each finds it plain again."""
    small = {"hidden_size": 32, "intermediate_size": 40, "heads": (4, 2), "layers": LAYERS}
    return add_lora(double_norms(tiny_model(**small, attention_bias=True, mlp_bias=True)), targets).double().train()


@dataclasses.dataclass
class Sequence:
    """Tokens of one sequence and where they carry a label."""

    ids: list[int]
    labelled: list[bool]


@st.composite
def patterns(draw, length: int) -> list[bool]:
    """Labels as they come: none, all, an answer at the end, several turns, the first token, anything."""
    kind = draw(st.sampled_from(["none", "all", "answer", "turns", "first", "any"]))
    start = draw(st.integers(0, length))
    return {
        "none": [False] * length,
        "all": [True] * length,
        "answer": [t >= start for t in range(length)],
        "turns": [(t // max(1, start)) % 2 == 1 for t in range(length)],
        "first": [t == 0 for t in range(length)],
        "any": draw(st.lists(st.booleans(), min_size=length, max_size=length)),
    }[kind]


@st.composite
def sequences(draw) -> Sequence:
    length = draw(st.integers(1, LONGEST))
    ids = draw(st.lists(st.integers(3, VOCAB - 1), min_size=length, max_size=length))
    return Sequence(ids, draw(patterns(length)))


def padded(rows: list[Sequence], side: str, extra: int = 0) -> dict[str, torch.Tensor]:
    """A batch with padding on a side, and ``extra`` columns of padding alone."""
    width = max(len(row.ids) for row in rows) + extra
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for b, row in enumerate(rows):
        first = 0 if side == "right" else width - len(row.ids)
        place = slice(first, first + len(row.ids))
        ids[b, place], mask[b, place] = torch.tensor(row.ids), 1
        labels[b, place] = torch.where(torch.tensor(row.labelled), ids[b, place], IGNORED)
        if first:
            labels[b, first] = IGNORED  # padding predicts nothing
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def packed(rows: list[Sequence]) -> dict[str, torch.Tensor]:
    """The same sequences in one row; first tokens carry no label there, nothing precedes them."""
    batch = padded(rows, "right")
    real = batch["attention_mask"].bool()
    positions = torch.arange(real.shape[1]).expand(real.shape)
    labels = batch["labels"].masked_fill(positions == 0, IGNORED)
    parts = {"input_ids": batch["input_ids"], "labels": labels, "position_ids": positions}
    return {name: part[real][None] for name, part in parts.items()} | {"use_cache": False}


@st.composite
def schedules(draw) -> dict[str, dict[str, float]]:
    """A sparsity for each layer and part."""
    layers = st.lists(st.sampled_from(SPARSITIES), min_size=LAYERS, max_size=LAYERS)
    return {
        part: {str(layer): value for layer, value in enumerate(draw(layers))}
        for part in ("mlp_sparsity", "attention_sparsity")
    }


SETTINGS = st.fixed_dictionaries(
    {
        "criterion": st.sampled_from(["svd", "svd_mean", "oracle"]),
        "token_rule": st.sampled_from(["label_or_predictor", "label"]),
        "lora_branch": st.sampled_from(["dense", "sliced"]),
        "exact": st.booleans(),
    }
)


def sparse_step(net, batch, config):
    """Loss and gradients of a sparse step; the reference that its sets and factors call for."""
    with sparsify(net, config, progress=False) as handle:
        keeps = [
            [d.keep if d.outcome == "sparse" else None for d in handle.decisions if d.name.endswith(part)]
            for part in ("mlp", "self_attn")
        ]
        factors = {key: (f.up @ f.down).double() for key, f in handle.state.criterion.factors.items()}
        handle.set_enabled(True)
        if config.exact:
            rows = (batch["labels"], batch.get("attention_mask"), batch.get("position_ids"))
            plan = TokenPlan.from_batch(*rows, config.token_rule)
            handle.state.begin(plan, batch["labels"].device, loss_only=True)
            handle.state.pinned = True
        net.zero_grad(set_to_none=True)
        loss = next_token_loss(net(**batch).logits, batch["labels"])
        loss.backward()
        result = loss.detach(), gradients(net)
    reference = MaskedDense(
        net,
        *keeps,
        factors if config.criterion != "oracle" else None,
        label_rule=config.token_rule == "label",
        mean_tokens=config.criterion == "svd_mean",
        sliced=config.lora_branch == "sliced",
    )
    return result, reference


def reference_batch(rows: list[Sequence], layout: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the reference is given: it knows padding alone."""
    if layout != "packed":
        return batch
    alike = padded(rows, "right")
    alike["labels"][:, 0] = IGNORED
    alike["attention_mask"][[len(row.ids) == 1 for row in rows]] = 0  # nobody attends to it, nothing predicts it
    return alike


LAYOUTS = {
    "right": lambda rows: padded(rows, "right"),
    "left": lambda rows: padded(rows, "left"),
    "padding alone": lambda rows: padded(rows, "right", extra=3),
    "packed": packed,
}


@given(
    rows=st.lists(sequences(), min_size=1, max_size=3),
    layout=st.sampled_from(sorted(LAYOUTS)),
    targets=st.sampled_from([ATTENTION, ATTENTION + MLP]),
    schedule=schedules(),
    settings=SETTINGS,
)
def test_sparse_model_equals_the_masked_dense_one(rows, layout, targets, schedule, settings):
    net, batch = model(targets), LAYOUTS[layout](rows)
    got, reference = sparse_step(net, batch, SPARSE.replace(**schedule, **settings))
    want = reference(reference_batch(rows, layout, batch))[1]
    assume(reference.gap > 1e-5)  # a tie may be broken either way
    assert abs(float(got[0] - want[0])) < TOL * max(1, float(want[0]))
    for name, gradient in want[1].items():
        expected = torch.zeros_like(got[1][name]) if gradient is None else gradient
        torch.testing.assert_close(got[1][name], expected, rtol=TOL, atol=TOL * float(expected.abs().max()) + 1e-15)
