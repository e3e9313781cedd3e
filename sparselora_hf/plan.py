"""Token plan: which rows of a batch are context, which are output, which enter the loss, which are padding.

Built on the host from the labels, exact for each token: packing, several turns and mixed lengths cost nothing.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from .config import TOKEN_RULES, check_choice
from .ops.transfer import to_device

__all__ = ["IGNORE_INDEX", "PLANNED_BY", "TokenPlan"]

IGNORE_INDEX = -100
PLANNED_BY = ("labels", "attention_mask", "position_ids", "shift_labels")  # what of a batch its plan is made from


@dataclasses.dataclass(frozen=True)
class TokenPlan:
    """Rows of the flattened batch ``[B · S]``, int64 and sorted; `context` and `output` are disjoint.

    Args:
        shape: ``(B, S)``.
        context: rows that may be sparse.
        output: rows that are dense.
        loss: rows whose prediction enters the loss; by default a subset of `output`.
        rest: all rows but `context`: output and padding.
        real: `context` and `output` together, or None when there is no padding.
        sequence: for each context row the number of its sequence, counted from 0.
        groups: number of different ones in `sequence`.
        targets: for each loss row the label it predicts.
        loss_in_context: whether a context row enters the loss, as the token rule ``label`` has it.
        right_padded: whether all that an attention mask hides is padding behind the last token of its sequence.
        unmasked: whether there is padding that no attention mask hides.
        loss_in_padding: whether a row that an attention mask hides enters the loss, as padding in front of a labelled
            token does.
    """

    shape: tuple[int, int]
    context: torch.Tensor
    output: torch.Tensor
    loss: torch.Tensor
    rest: torch.Tensor
    real: torch.Tensor | None
    sequence: torch.Tensor
    groups: int
    targets: torch.Tensor
    loss_in_context: bool
    right_padded: bool = False
    unmasked: bool = False
    loss_in_padding: bool = False

    @classmethod
    def of_inputs(cls, inputs: Mapping[str, Any], token_rule: str = "label_or_predictor") -> "TokenPlan":
        """Plan of a model's inputs, from all of `PLANNED_BY` that are among them; `labels` must be."""
        labels, mask, positions, shifted = (inputs.get(name) for name in PLANNED_BY)
        return cls.from_batch(labels, mask, positions, token_rule, shifted)

    @classmethod
    def from_batch(
        cls,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_rule: str = "label_or_predictor",
        shift_labels: torch.Tensor | None = None,
    ) -> "TokenPlan":
        """Plan of one micro-batch.

        Args:
            labels: ``[B, S]``, -100 where a token is not predicted.
            attention_mask: ``[B, S]`` with 0 on padding, or None. A mask of another form, a matrix for each row or a
                dictionary of several, leaves no token out.
            position_ids: ``[B, S]``; where it restarts a packed document begins. Without a mask a document of a
                single token is padding, which is how padding-free batches are filled up to a multiple. Positions of
                another shape are passed over.
            token_rule: see `SparseLoraConfig`.
            shift_labels: ``[B, S]``, what each position is to predict, where a batch brings it along. The loss is made
                of it, whatever `labels` hold then.

        Raises:
            ValueError: labels of another shape, or an unknown token rule.
        """
        _check_2d("labels", labels)
        check_choice("token_rule", token_rule, TOKEN_RULES)
        if shift_labels is None:
            labels = labels.detach().cpu()
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        else:
            _check_2d("shift_labels", shift_labels)
            targets = shift_labels.detach().cpu()
            labels = F.pad(targets[:, :-1], (1, 0), value=IGNORE_INDEX)
        labelled, predicts = labels != IGNORE_INDEX, targets != IGNORE_INDEX
        output = labelled | predicts if token_rule == "label_or_predictor" else labelled
        return cls._of_masks(output, predicts, targets, attention_mask, position_ids)

    @classmethod
    def of_pooled(
        cls, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, pad_token_id: int | None = None
    ) -> "TokenPlan":
        """Plan of a batch whose sequences are classified from the state of one token each: that one is dense.

        The token is the one that transformers' heads pool: the last that is not `pad_token_id`.

        Args:
            input_ids: ``[B, S]``.
            attention_mask: ``[B, S]`` with 0 on padding, or None.
            pad_token_id: padding token of the model; None pools the last position.

        Raises:
            ValueError: `input_ids` of another shape.
        """
        _check_2d("input_ids", input_ids)
        ids = input_ids.detach().cpu()
        is_text = torch.ones_like(ids) if pad_token_id is None else ids != pad_token_id
        last = (torch.arange(ids.shape[1], device="cpu") * is_text).argmax(1)
        pooled = torch.zeros(ids.shape, dtype=torch.bool, device="cpu").scatter_(1, last[:, None], True)
        return cls._of_masks(pooled, pooled, torch.full_like(ids, IGNORE_INDEX), attention_mask, None)

    @classmethod
    def _of_masks(
        cls,
        output: torch.Tensor,
        predicts: torch.Tensor,
        targets: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> "TokenPlan":
        """Plan from masks ``[B, S]`` of output and loss tokens and the target of each position."""
        is_2d = isinstance(attention_mask, torch.Tensor) and attention_mask.shape == output.shape
        starts = _starts(output.shape, position_ids)
        if is_2d:
            shown = attention_mask.detach().cpu() != 0
        elif attention_mask is None:
            shown = ~_lone(output.shape, position_ids)
        else:  # who sees whom, in a matrix or several: that says nothing about padding, so every token counts
            shown = torch.ones_like(output)
        real = shown | output | predicts
        is_whole = bool(real.all())
        is_context = real & ~output
        context, loss = _rows(is_context), _rows(predicts)
        sequence = _taken(starts.flatten().cumsum(0) - 1, context)
        return cls(
            shape=tuple(output.shape),
            context=context,
            output=_rows(output),
            loss=loss,
            rest=_rows(~is_context),
            real=None if is_whole else _rows(real),
            sequence=sequence,
            groups=len(sequence.unique_consecutive()),
            targets=_taken(targets.flatten(), loss),
            loss_in_context=bool((predicts & ~output).any()),
            right_padded=is_2d and torch.equal(real, shown) and _falls(shown),
            unmasked=not is_2d and not is_whole,
            loss_in_padding=is_2d and bool((predicts & ~shown).any()),
        )

    @property
    def head_rows(self) -> torch.Tensor:
        """Loss rows, or the first row where there is none: a head that is fed nothing would have no gradient."""
        return self.loss if len(self.loss) else self.loss.new_zeros(1)

    @property
    def head_targets(self) -> torch.Tensor:
        """Label of each of `head_rows`."""
        return self.targets if len(self.loss) else self.targets.new_full((1,), IGNORE_INDEX)

    @property
    def unshifted_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows ``[L + 1]`` and labels ``[1, L + 1]`` for a loss that holds each row against the label behind it.

        They are `head_rows` with their targets; the last row has no label behind it and stands for none.
        """
        return F.pad(self.head_rows, (0, 1)), F.pad(self.head_targets, (1, 0), value=IGNORE_INDEX)[None]

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding."""
        return len(self.context) + len(self.output)

    @property
    def context_share(self) -> float:
        """Share of context tokens among those that are not padding."""
        return len(self.context) / max(1, self.tokens)

    def rounded(self) -> "TokenPlan":
        """A plan whose counts repeat from batch to batch: the last context rows are output too, and some padding.

        Context rows are then a multiple of 64, or of 1/64 of all rows where that is more, but of 1/16 at most; output
        rows too, as far as there is padding to fill them up. What is computed beyond the plan is computed with all
        channels. Rounded again, a plan is the same.
        """
        rows = self.shape[0] * self.shape[1]
        multiple = max(1, min(max(64, rows // 64), rows // 16))
        keep = len(self.context) // multiple * multiple
        context, output = self.context[:keep], torch.cat([self.output, self.context[keep:]])
        filling = min(-len(output) % multiple, rows - self.tokens)
        if keep == len(self.context) and not filling:
            return self
        if filling:
            is_padding = torch.ones(rows, dtype=torch.bool, device=context.device).index_fill_(0, self.real, False)
            output = torch.cat([output, _rows(is_padding)[:filling]])
        output, sequence = output.sort().values, self.sequence[:keep]
        return dataclasses.replace(
            self,
            context=context,
            output=output,
            rest=torch.cat([self.rest, self.context[keep:]]).sort().values,
            real=None if keep + len(output) == rows else torch.cat([context, output]).sort().values,
            sequence=sequence,
            groups=len(sequence.unique_consecutive()),
        )

    def to(self, device: torch.device, non_blocking: bool = True) -> "TokenPlan":
        """The same plan with its rows on a device, in one copy that the host does not wait for.

        Args:
            device: the device.
            non_blocking: of no effect. `BatchEncoding`, which collators that pad by a tokenizer return, passes it to
                whatever it holds that can be moved.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rows = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        moved = to_device(torch.cat(list(rows.values())), device).split([len(value) for value in rows.values()])
        return dataclasses.replace(self, **dict(zip(rows, moved, strict=True)))


def _check_2d(name: str, tensor: torch.Tensor) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be of shape [batch, sequence], got {tuple(tensor.shape)}.")


def _rows(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten().nonzero().squeeze(1)


def _taken(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Values of some rows. Indexing with brackets wakes every core up for it, which takes thirty times as long."""
    return values.index_select(0, rows)


def _falls(mask: torch.Tensor) -> bool:
    """Whether no row of a mask goes up again."""
    return bool((mask[:, 1:] <= mask[:, :-1]).all())


def _starts(shape: torch.Size, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Whether a sequence starts at each of ``[B, S]`` positions."""
    starts = _at_zero(shape, position_ids)
    starts[:, 0] = True
    return starts


def _lone(shape: torch.Size, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Tokens that are a sequence of their own, with nobody to attend to them: padding of a batch without a mask.

    A batch of single tokens has none: these are steps through a sequence whose others lie in a cache.
    """
    starts = _at_zero(shape, position_ids)
    ends = torch.full_like(starts, shape[1] > 1)
    ends[:, :-1] = starts[:, 1:]
    return starts & ends


def _at_zero(shape: torch.Size, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Which of ``[B, S]`` positions are 0; none where there are no positions of this shape."""
    if position_ids is None or position_ids.shape != shape:
        return torch.zeros(shape, dtype=torch.bool, device="cpu")
    return position_ids.detach().cpu() == 0
