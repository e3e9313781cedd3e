import pytest
import torch
from helpers import flatten_batch, make_batch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparselora_hf.plan import IGNORE_INDEX, TokenPlan

RULES = ["label_or_predictor", "label"]
N = IGNORE_INDEX


def slow_plan(labels, mask=None, positions=None, rule="label_or_predictor") -> dict:
    """The definition, token by token."""
    context, output, loss, real, sequence, targets = [], [], [], [], [], []
    number = -1
    rows, length = labels.shape

    def starts(b, t):
        return t == 0 or (positions is not None and bool(positions[b, t] == 0))

    def alone(b, t):
        return positions is not None and length > 1 and all(positions[b, i] == 0 for i in (t, t + 1) if i < length)

    for b in range(rows):
        for t in range(length):
            row = b * length + t
            if starts(b, t):
                number += 1
            own = labels[b, t] != N
            predicts = t + 1 < length and labels[b, t + 1] != N
            if predicts:
                loss.append(row)
                targets.append(int(labels[b, t + 1]))
            if own or (predicts and rule == "label_or_predictor"):
                output.append(row)
                real.append(row)
            elif predicts or (not alone(b, t) if mask is None else mask[b, t]):
                context.append(row)
                sequence.append(number)
                real.append(row)
    lists = {
        "context": context,
        "output": output,
        "loss": loss,
        "real": real,
        "sequence": sequence,
        "targets": targets,
    }
    hidden = None if mask is None else [row for row in range(rows * length) if not mask.flatten()[row]]
    ends = hidden is not None and all(not mask[b, t + 1] or mask[b, t] for b in range(rows) for t in range(length - 1))
    return lists | {
        "rest": [row for row in range(rows * length) if row not in context],
        "groups": len(set(sequence)),
        "loss_in_context": bool(set(loss) & set(context)),
        "right_padded": ends and not set(hidden) & set(real),
        "unmasked": mask is None and len(real) < rows * length,
        "loss_in_padding": hidden is not None and bool(set(hidden) & set(loss)),
    }


def assert_plan(plan: TokenPlan, want: dict, rows: int) -> None:
    for name in ("context", "output", "loss", "rest", "sequence", "targets"):
        got = getattr(plan, name)
        assert got.dtype == torch.int64
        assert got.tolist() == want[name], name
    assert (list(range(rows)) if plan.real is None else plan.real.tolist()) == want["real"]
    assert (plan.real is None) == (len(want["real"]) == rows)
    for name in ("groups", "loss_in_context", "right_padded", "unmasked", "loss_in_padding"):
        assert getattr(plan, name) == want[name], name
    assert plan.tokens == len(want["real"])


CASES = {
    "right": make_batch(side="right"),
    "left": make_batch(side="left"),
    "padding-free": flatten_batch(make_batch()),
    "no context": {"labels": torch.arange(6).view(2, 3)},
    "no output": {"labels": torch.full((2, 3), N)},
    "several turns": {"labels": torch.tensor([[N, N, 5, 6, N, N, N, 7, N, 8, 9, N]])},
    "label on the first token": {"labels": torch.tensor([[3, N, N, 4], [N, N, N, N]])},
    "one token": {"labels": torch.tensor([[5]])},
    "one token, without a label": {"labels": torch.tensor([[N]])},
    "one token at 0": {"labels": torch.tensor([[N], [5]]), "position_ids": torch.tensor([[0], [0]])},
    "padding in the middle": {
        "labels": torch.tensor([[N, N, N, 5, N]]),
        "attention_mask": torch.tensor([[1, 0, 0, 1, 0]]),
    },
    "label behind padding": {
        "labels": torch.tensor([[N, N, 5, 6], [N, N, N, 7]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    },
    "label on padding": {
        "labels": torch.tensor([[N, 5, N, 6]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0]]),
    },
    "packed rows": {
        "labels": torch.tensor([[N, N, 4, N, N, 5], [N, N, N, N, 3, 3]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]]),
    },
    "padding-free to a multiple": {
        "labels": torch.tensor([[N, N, 4, N, 5, N, N, N]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]]),
    },
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_a_loop(case, rule):
    labels, mask, positions = case["labels"], case.get("attention_mask"), case.get("position_ids")
    plan = TokenPlan.from_batch(labels, mask, positions, rule)
    assert_plan(plan, slow_plan(labels, mask, positions, rule), labels.numel())


@st.composite
def batches(draw):
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))

    def grid(values):
        line = st.lists(values, min_size=length, max_size=length)
        return torch.tensor(draw(st.lists(line, min_size=rows, max_size=rows)))

    labels = grid(st.sampled_from([N, N, 1, 2]))
    mask = grid(st.integers(0, 2)) if draw(st.booleans()) else None
    positions = grid(st.integers(0, 2)) if draw(st.booleans()) else None
    return labels, mask, positions


@given(batch=batches(), rule=st.sampled_from(RULES))
def test_any_batch_against_a_loop(batch, rule):
    plan = TokenPlan.from_batch(*batch, rule)
    assert_plan(plan, slow_plan(*batch, rule), batch[0].numel())
    assert not set(plan.context.tolist()) & set(plan.output.tolist())
    if rule == "label_or_predictor":
        assert set(plan.loss.tolist()) <= set(plan.output.tolist())


@pytest.mark.parametrize("rule", RULES)
def test_padding_side_and_packing_change_no_token(rule):
    """The same tokens are context, output and loss, wherever the padding is."""
    kinds = []
    for batch in (make_batch(side="right"), make_batch(side="left"), flatten_batch(make_batch())):
        plan = TokenPlan.from_batch(batch["labels"], batch.get("attention_mask"), batch.get("position_ids"), rule)
        ids = batch["input_ids"].flatten()
        kinds.append(
            [ids[rows].tolist() for rows in (plan.context, plan.output, plan.loss)] + [plan.sequence.tolist()]
        )
    assert kinds[0] == kinds[1] == kinds[2]


def test_no_loss_still_gives_the_head_a_row():
    plan = TokenPlan.from_batch(torch.full((2, 3), N))
    assert plan.head_rows.tolist() == [0]
    assert plan.head_targets.tolist() == [N]
    some = TokenPlan.from_batch(torch.tensor([[N, 4, 5]]))
    assert (some.head_rows.tolist(), some.head_targets.tolist()) == ([0, 1], [4, 5])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "labels", [[N, N, 4, 5, N, 6], [4, 4, 4, 4, 4, 4]], ids=["beside labels", "whatever these say"]
)
def test_shifted_labels_go_before_labels(labels, rule):
    shifted = torch.tensor([[N, 4, 5, N, 6, N]])
    inputs = {"labels": torch.tensor([labels]), "shift_labels": shifted}
    assert_plan(TokenPlan.of_inputs(inputs, rule), slow_plan(torch.tensor([[N, N, 4, 5, N, 6]]), rule=rule), 6)


def test_label_of_a_token_behind_the_last_one():
    """A sequence that was cut in two has it."""
    plan = TokenPlan.of_inputs({"labels": torch.tensor([[N, N]]), "shift_labels": torch.tensor([[N, 7]])})
    assert (plan.loss.tolist(), plan.targets.tolist(), plan.output.tolist()) == ([1], [7], [1])


@pytest.mark.parametrize("positions", [None, torch.zeros(1, 3, dtype=torch.long)], ids=["no positions", "positions 0"])
@pytest.mark.parametrize("form", [lambda mask: mask, lambda mask: {"full_attention": mask}], ids=["4-D", "dictionary"])
def test_mask_of_another_form_says_nothing_about_padding(form, positions):
    """Nor do positions beside it: tokens that all stand at 0 may see each other."""
    plan = TokenPlan.from_batch(torch.tensor([[N, N, 3]]), form(torch.ones(1, 1, 3, 3)), positions)
    assert plan.real is None
    assert not plan.right_padded


def test_positions_of_another_form_say_nothing_about_padding():
    """Those of images have three axes."""
    plan = TokenPlan.from_batch(torch.tensor([[N, N, 3]]), None, torch.zeros(3, 1, 3, dtype=torch.long))
    assert plan.real is None
    assert plan.sequence.tolist() == [0]


def test_context_share():
    assert TokenPlan.from_batch(torch.tensor([[N, N, N, N, 5]])).context_share == pytest.approx(3 / 5)
    empty = TokenPlan.from_batch(torch.tensor([[N]]), torch.tensor([[0]]))
    assert (empty.tokens, empty.context_share) == (0, 0)


def test_labels_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"\[batch, sequence\], got \(3,\)"):
        TokenPlan.from_batch(torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"shift_labels .*\[batch, sequence\], got \(3,\)"):
        TokenPlan.from_batch(torch.tensor([[1, 2, 3]]), shift_labels=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"input_ids .*\[batch, sequence\], got \(3,\)"):
        TokenPlan.of_pooled(torch.tensor([1, 2, 3]))


def test_an_unknown_token_rule():
    with pytest.raises(ValueError, match="token_rule: 'labels' is not one of label_or_predictor, label"):
        TokenPlan.from_batch(torch.tensor([[1, 2, 3]]), token_rule="labels")


def test_to_moves_every_tensor():
    plan = TokenPlan.from_batch(torch.tensor([[N, N, N, 3]]), torch.tensor([[1, 0, 1, 1]])).to(torch.device("meta"))
    tensors = [value for value in vars(plan).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7
    assert all(tensor.is_meta for tensor in tensors)


def test_a_plan_wakes_no_other_core():
    """PyTorch's bracket indexing splits a few thousand values among all cores, each of which then waits, spinning."""
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(str(func))
            return func(*args, **(kwargs or {}))

    labels = torch.full((8, 512), -100)
    labels[:, 300:] = 1
    with Watch():
        plan = TokenPlan.from_batch(labels, torch.ones_like(labels))
    assert len(plan.context) == 8 * 299
    assert not seen & {"aten.index.Tensor", "aten.take.default"}
