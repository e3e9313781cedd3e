"""CUDA graphs of decoder layers, on a CPU by a double that does again what a GPU would replay."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from helpers import lora_model, make_batch
from looping import CHECKPOINTED, GRAPHS, SETTINGS, batches, loop, quantised_model, train
from tape import Here, Taped
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint

from sparselora_hf import sparsify
from sparselora_hf import state as state_module
from sparselora_hf.graphs import form as form_module
from sparselora_hf.graphs import layer as layer_module
from sparselora_hf.graphs import recording as recording_module
from sparselora_hf.graphs import series as series_module
from sparselora_hf.plan import TokenPlan


@pytest.fixture
def doubles(monkeypatch):
    """Layers are recorded on a CPU."""
    monkeypatch.setattr(layer_module, "Recording", Taped)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: "default")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(series_module, "Place", Here)
    monkeypatch.setattr(state_module, "can_record", lambda device: True)
    monkeypatch.setattr(Here, "recordings", [])
    return Here.recordings


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(("forms", "autocast"), [(1, False), (2, False), (2, True)])
def test_replayed_steps_train_as_launched_ones(doubles, launched, settings, forms, autocast):
    steps, config = batches(12, forms), GRAPHS.replace(**settings)
    want = launched(config, steps, autocast=autocast)
    assert not doubles
    assert_equal(want, train(config, steps, autocast=autocast))
    assert sum(recording.replays for recording in doubles) >= 6 * 5  # three layers, both ways


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_checkpointed_layers_are_replayed_with_what_they_recompute(doubles, launched, settings):
    config = without_recomputation(GRAPHS.replace(**settings))
    options = {"autocast": True, "gather": 2, "checkpointing": CHECKPOINTED, "lora": {"dropout": 0.5}}
    want = launched(config, batches(12, forms=2), **options)
    assert not doubles
    assert_equal(want, train(config, batches(12, forms=2), **options))
    assert replays(doubles) >= 6 * 5


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_quantised_layers_are_launched(doubles, caplog, kind):
    run = loop(GRAPHS, 10, base=lambda: quantised_model(kind))
    for _ in range(4):
        run.step(batches(1)[0])
    assert not doubles
    assert "is quantised" in caplog.text


def without_recomputation(config):
    """On a CPU the saving checkpoints in a way of its own."""
    return config.replace(exact=tuple(set(config.exact) - {"recomputation"}))


@pytest.fixture
def launched(monkeypatch):
    """Trains without recordings, on the same rows."""

    def run(*args, **kwargs):
        with monkeypatch.context() as without:
            without.setattr(series_module.Graphs, "take", lambda self, batch, form: None)
            return train(*args, **kwargs)

    return run


def assert_equal(one, other):
    assert one[0] == other[0]
    assert all(torch.equal(*pair) for pair in zip(one[1], other[1], strict=True))


@pytest.fixture
def run(doubles):
    """A loop whose batch has been recorded."""
    run = loop(GRAPHS, 100)
    for _ in range(5):
        run.step(batches(1)[0])
    run.figures()
    return run


def replays(doubles):
    return sum(recording.replays for recording in doubles)


def gradients_of(run, loss):
    grads = torch.autograd.grad(loss, [p for p in run.trained if p.requires_grad], allow_unused=True)
    return [None if grad is None else grad.clone() for grad in grads]


def assert_close(one, other):
    for got, want in zip(one, other, strict=True):
        assert (got is None and want is None) or torch.allclose(got, want, rtol=1e-5, atol=1e-8)


# prompts and answers whose plans have as many rows of each kind, and in what they differ
ALIKE = {
    "whether layers are given a mask": (((10, 10, 10), (4, 4, 4)), ((10, 10, 9), (4, 4, 4)), "right", {}),
    "sequences with context": (
        ((10, 10, 11), (4, 4, 3)),
        ((14, 14, 0), (0, 0, 14)),
        "right",
        {"criterion": "svd_mean"},
    ),
    "exact savings": (((10, 10, 1), (4, 4, 12)), ((10, 10, 0), (4, 4, 12)), "left", {}),
}


@pytest.mark.parametrize(("one", "other", "side", "settings"), ALIKE.values(), ids=ALIKE)
def test_batches_with_as_many_rows_of_each_kind_are_told_apart(doubles, launched, one, other, side, settings):
    plans = [TokenPlan.of_inputs(make_batch(*lengths, side)).rounded() for lengths in (one, other)]
    assert len({(len(plan.context), len(plan.output), plan.real is None) for plan in plans}) == 1
    config = GRAPHS.replace(start_step=0, **settings)
    steps = [make_batch(*(one, other)[i % 2], side, seed=i) for i in range(12)]
    assert_equal(launched(config, steps, autocast=True), train(config, steps, autocast=True))
    assert len(doubles) == 2 * 6
    assert replays(doubles) == 10 * 6  # all but the first of each form


def test_rows_that_lie_elsewhere_are_those_of_the_batch(doubles, launched):
    lengths = [((10, 9, 8), (3, 3, 4)), ((8, 10, 9), (4, 3, 3))]
    plans = [TokenPlan.of_inputs(make_batch(*of)).rounded() for of in lengths]
    assert len({(len(plan.context), len(plan.output), plan.groups) for plan in plans}) == 1
    assert not torch.equal(plans[0].sequence, plans[1].sequence)
    config = GRAPHS.replace(start_step=0, criterion="svd_mean")
    steps = [make_batch(*lengths[i % 2], seed=i) for i in range(6)]
    assert_equal(launched(config, steps), train(config, steps))
    assert len(doubles) == 6
    assert replays(doubles) == 5 * 6


def test_dropout_is_drawn_as_in_launched_steps(doubles, launched):
    """A run that is resumed meets and records its batches later."""
    options = {"lora": {"dropout": 0.5}}
    assert_equal(launched(GRAPHS, batches(12), **options), train(GRAPHS, batches(12), **options))
    assert replays(doubles)


@pytest.mark.parametrize("gather", [2, 3])
def test_accumulated_gradients_are_those_of_launched_steps(doubles, launched, gather):
    steps = batches(12, forms=2)
    assert_equal(launched(GRAPHS, steps, gather=gather), train(GRAPHS, steps, gather=gather))
    assert replays(doubles)


def test_a_second_forward_before_the_backward_of_the_first_is_launched(run, doubles):
    one, other = batches(2)
    want = [gradients_of(run, run.forward(batch)) for batch in (one, other)]
    before = replays(doubles)
    losses = [run.forward(batch) for batch in (one, other)]
    assert replays(doubles) == before + 3
    assert_close(gradients_of(run, losses[0]), want[0])
    assert_close(gradients_of(run, losses[1]), want[1])


@pytest.mark.parametrize("checkpointing", [None, CHECKPOINTED], ids=["kept", "checkpointed"])
def test_a_forward_between_those_of_a_batch_that_is_recorded_leaves_its_gradients(doubles, monkeypatch, checkpointing):
    def gradients():
        run = loop(without_recomputation(GRAPHS.replace(start_step=0)), 100, checkpointing=checkpointing)
        one, other = batches(2)
        run.step(one)
        losses = [run.forward(batch) for batch in (one, other)]  # the first is recorded
        return [grad for loss in losses for grad in gradients_of(run, loss)]

    got = gradients()
    assert len(doubles) == 6
    monkeypatch.setattr(series_module.Graphs, "take", lambda self, batch, form: None)
    assert_close(got, gradients())


def test_a_forward_without_backward_is_let_go(run, doubles):
    batch = batches(1)[0]
    want = gradients_of(run, run.forward(batch))
    loss = run.forward(batch)
    del loss
    before = replays(doubles)
    assert_close(gradients_of(run, run.forward(batch)), want)
    assert replays(doubles) == before + 6


@pytest.mark.parametrize("layers", [None, [2, 3]])
def test_a_loss_that_is_kept_after_its_backward_holds_up_nothing(doubles, layers):
    run = loop(GRAPHS.replace(start_step=0), 100, lora={"layers_to_transform": layers})
    kept = []
    for batch in batches(5):
        kept.append(run.forward(batch))
        kept[-1].backward()
    assert run.figures()["sparselora/replayed"] == 3 / 5


@pytest.mark.parametrize("checkpointing", [None, CHECKPOINTED], ids=["kept", "checkpointed"])
def test_a_batch_without_backward_leaves_no_half_recording(doubles, launched, monkeypatch, checkpointing):
    made, init = [], layer_module.LayerGraph.__init__
    monkeypatch.setattr(
        layer_module.LayerGraph,
        "__init__",
        lambda self, *args: made.append(weakref.ref(self)) or init(self, *args),
    )

    def losses():
        config = without_recomputation(GRAPHS.replace(start_step=0))
        run, batch = loop(config, 100, checkpointing=checkpointing), batches(1)[0]
        run.step(batch)
        run.forward(batch)  # it is recorded
        return [run.step(batch) for batch in batches(5)]

    got = losses()
    assert len(doubles) == 3 + 6
    assert replays(doubles) == 3 + 5 * 6
    doubles.clear()
    gc.collect()
    assert [graph() for graph in made[:3]] == [None] * 3
    monkeypatch.setattr(series_module.Graphs, "take", lambda self, batch, form: None)
    assert got == losses()


def test_a_layer_that_is_called_twice_for_a_batch_keeps_what_its_first_call_saved(run, doubles):
    batch, calls = batches(1)[0], []
    layer = run.model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    for _ in range(2):  # it is recorded anew, with the hook
        run.step(batch, learn=False)
    run.optimizer.zero_grad()
    want = gradients_of(run, run.forward(batch))
    before = replays(doubles)
    loss = run.forward(batch)
    args, kwargs = calls[-1]
    layer(torch.zeros_like(args[0]), **kwargs)
    assert replays(doubles) == before + 3
    assert_close(gradients_of(run, loss), want)


def test_a_layer_that_is_given_more_by_place_is_launched(run, doubles, caplog):
    batch = batches(1)[0]
    want = run.forward(batch).item()
    before = replays(doubles)
    _layer(run).register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0], kwargs.pop("attention_mask")), kwargs), with_kwargs=True
    )
    assert run.forward(batch).item() == want
    assert replays(doubles) == before + 2
    assert "layer 2 and those above are not made CUDA graphs: it is given more" in caplog.text


def test_a_second_backward_is_refused(run):
    loss = run.forward(batches(1)[0])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cuda_graphs=False"):
        loss.backward()


def test_a_late_backward_of_a_batch_whose_memory_was_used_again_is_refused(run):
    loss = run.forward(batches(1)[0])
    loss.backward(retain_graph=True)
    run.forward(batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match="cuda_graphs=False"):
        loss.backward()


def _disable(run):
    run.model.base_model.disable_adapter_layers()


def _freeze(run):
    layer = run.model.get_base_model().model.layers[1]
    layer.self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)


def _watch(run):
    seen = []
    run.model.get_base_model().model.layers[2].mlp.register_forward_hook(lambda *args: seen.append(1))
    return seen


def _scale(run):
    for module in run.model.modules():
        if hasattr(module, "lora_A"):
            module.scaling = {name: 3 * value for name, value in module.scaling.items()}


def _move(run):
    weight = run.model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight
    weight.data = weight.data.clone().mul_(2)


def _layer(run):
    return run.model.get_base_model().model.layers[2]


def _watch_backward(run):
    seen = []
    _layer(run).mlp.register_full_backward_pre_hook(lambda *args: seen.append(1))
    return seen


def _sharpen(run):
    _layer(run).self_attn.scaling *= 2


def _replace(run):
    own = _layer(run).mlp.forward
    _layer(run).mlp.forward = lambda x: 2 * own(x)


CHANGES = [_disable, _freeze, _watch, _scale, _move, _watch_backward, _sharpen, _replace]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_not_replayed(run, doubles, launched, change, monkeypatch):
    batch = batches(1)[0]
    run.step(batch)
    seen = change(run)
    with monkeypatch.context() as without:
        without.setattr(series_module.Graphs, "take", lambda self, batch, form: None)
        loss = run.forward(batch)
        want = loss.item(), gradients_of(run, loss) if loss.requires_grad else None
    loss = run.forward(batch)
    assert loss.item() == want[0]
    if want[1] is not None:
        assert_close(gradients_of(run, loss), want[1])
    assert seen is None or len(seen) == 2


def test_what_is_added_between_layers_leaves_the_lower_result_alone(run, launched, monkeypatch):
    """As images are added to the first layers of Qwen3-VL, in some batches and not in others."""
    batch = batches(1)[0]
    added = False
    layer = run.model.get_base_model().model.layers[1]
    layer.register_forward_pre_hook(lambda module, args: (args[0] * args[0], *args[1:]) if added else None)
    for added in (False, False, False, True, True, False, True):  # noqa: B007
        with monkeypatch.context() as without:
            without.setattr(series_module.Graphs, "take", lambda self, batch, form: None)
            want = gradients_of(run, run.forward(batch))
        assert_close(gradients_of(run, run.forward(batch)), want)


def test_a_mask_for_one_layer_alone_is_not_passed_over(run, launched, monkeypatch):
    batch = batches(1)[0]
    hidden = False
    mask = torch.zeros(3, 1, 14, 14).masked_fill_(torch.ones(14, 14).triu(1).bool(), -torch.inf)
    mask[..., 1:, 0] = -torch.inf
    _layer(run).register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "attention_mask": mask} if hidden else kwargs), with_kwargs=True
    )
    for hidden in (False, True, False):  # noqa: B007
        with monkeypatch.context() as without:
            without.setattr(series_module.Graphs, "take", lambda self, batch, form: None)
            want = gradients_of(run, run.forward(batch))
        assert_close(gradients_of(run, run.forward(batch)), want)


def test_a_form_is_not_recorded_over_and_over(run, doubles, monkeypatch, caplog):
    monkeypatch.setattr(series_module, "_TRIES", 2)
    made = len(doubles)
    for batch in batches(8):
        _scale(run)
        run.step(batch)
    assert len(doubles) == made + 6
    assert "are not made CUDA graphs" not in caplog.text


def test_parameters_that_a_layer_does_not_use_have_no_gradient(doubles):
    def add(model):
        model.get_base_model().model.layers[1].spare = torch.nn.Parameter(torch.ones(3))

    run = loop(GRAPHS.replace(start_step=0), 100, change=add)
    for batch in batches(4):
        run.step(batch)
    assert replays(doubles)
    assert run.model.get_base_model().model.layers[1].spare.grad is None


def test_after_a_change_layers_are_recorded_anew(run, doubles):
    _scale(run)
    made = len(doubles)
    for _ in range(3):
        run.step(batches(1)[0])
    assert len(doubles) == made + 6
    assert run.figures()["sparselora/replayed"] > 0


def test_hooks_of_checkpointed_layers_are_called_once(doubles):
    run = loop(without_recomputation(GRAPHS), 10, checkpointing=CHECKPOINTED)
    seen, layer = [], run.model.get_base_model().model.layers[1]
    layer.register_forward_pre_hook(lambda module, args: seen.append(1))
    for _ in range(5):
        run.step(batches(1)[0])
    assert len(seen) == 5
    assert replays(doubles) == 3 * 2 * 3  # three layers, both ways; of the five steps two meet their forms


def test_what_checkpoints_a_layer_is_given_back_whatever_happens(doubles):
    run = loop(without_recomputation(GRAPHS), 10, checkpointing=CHECKPOINTED)
    layers = run.model.get_base_model().model.layers
    before = [layer._gradient_checkpointing_func for layer in layers]
    for _ in range(4):
        run.step(batches(1)[0])
    stop = layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        run.step(batches(1)[0])
    stop.remove()
    assert [layer._gradient_checkpointing_func for layer in layers] == before
    assert not [layer for layer in layers if "_sparselora_checkpoint" in vars(layer)]
    done = replays(doubles)
    run.step(batches(1)[0])
    assert replays(doubles) > done
    run.handle.restore()
    assert [layer._gradient_checkpointing_func for layer in layers] == before


def fail(module, args):
    raise RuntimeError("stop here")


@pytest.mark.parametrize("then", ["nothing", "other dropout"])
def test_what_checkpoints_a_layer_is_its_own_after_an_interrupt(doubles, then):
    """PyTorch calls no hook behind a forward that Ctrl-C ends."""

    def interrupt(module, args):
        raise KeyboardInterrupt

    run = loop(without_recomputation(GRAPHS), 10, checkpointing=CHECKPOINTED)
    layers = run.model.get_base_model().model.layers
    stop = layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.step(batches(1)[0])
    stop.remove()
    if then != "nothing":
        run.model.gradient_checkpointing_enable(CHECKPOINTED | {"preserve_rng_state": False})
    run.step(batches(1)[0])
    want = CHECKPOINTED if then == "nothing" else CHECKPOINTED | {"preserve_rng_state": False}
    assert [layer._gradient_checkpointing_func.func for layer in layers] == [checkpoint] * 4
    assert [layer._gradient_checkpointing_func.keywords for layer in layers] == [want] * 4


@pytest.mark.parametrize(
    "way",
    [{"use_reentrant": True}, {"use_reentrant": False, "preserve_rng_state": False}, lambda run, *args: run(*args)],
    ids=["reentrant", "other dropout", "a function of one's own"],
)
def test_other_ways_of_checkpointing_are_launched(doubles, caplog, way):
    run = loop(without_recomputation(GRAPHS), 10, checkpointing=way if isinstance(way, dict) else CHECKPOINTED)
    run.model.enable_input_require_grads()
    if callable(way):
        for layer in run.model.get_base_model().model.layers:
            layer._gradient_checkpointing_func = way
    for _ in range(4):
        run.step(batches(1)[0])
    assert not doubles
    assert "it is checkpointed, and not by gradient_checkpointing_kwargs={'use_reentrant': False}" in caplog.text


def test_caches_are_launched(doubles, caplog, monkeypatch):
    monkeypatch.setattr(series_module, "_TRIAL", 2)
    run = loop(GRAPHS, 10)
    run.model.config.use_cache = True
    for _ in range(4):
        run.step(batches(1)[0])
    assert not doubles
    assert "it is given a DynamicCache (model.config.use_cache = False spares it)" in caplog.text
    assert "had a shape that had come before" not in caplog.text


class OtherParameter(torch.nn.Parameter):
    """As quantised and spread weights are."""


def _give_other_type(layer):
    base = layer.mlp.up_proj.base_layer
    base.weight = OtherParameter(base.weight.data, requires_grad=False)


def _turn(layer):
    weight = layer.mlp.up_proj.base_layer.weight
    weight.data = weight.data.t().contiguous().t()


def _add_integers(layer):
    layer.mlp.register_parameter("scales", torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False))


ODD = [
    (lambda layer: layer.register_forward_hook(lambda *args: None), "others are given what it gives"),
    (lambda layer: setattr(layer, "_get_fsdp_state", None), "take its parameters apart"),
    (lambda layer: layer.mlp.register_forward_hook(lambda *args: None), "mlp has hooks"),
    (lambda layer: layer.mlp.register_forward_pre_hook(lambda *args: None), "mlp has hooks"),
    (lambda layer: layer.mlp.register_full_backward_hook(lambda *args: None), "mlp has hooks"),
    (lambda layer: layer.mlp.register_full_backward_pre_hook(lambda *args: None), "mlp has hooks"),
    (lambda layer: setattr(layer.mlp, "lora_A", torch.nn.ParameterDict()), "no plain LoRA"),
    (_give_other_type, "is quantised"),
    (_turn, "is quantised"),
    (_add_integers, "is quantised"),
]


@pytest.mark.parametrize(("change", "reason"), ODD)
def test_layers_that_are_out_of_the_ordinary_are_launched(doubles, caplog, change, reason):
    run = loop(GRAPHS.replace(start_step=0), 10)
    change(run.model.get_base_model().model.layers[0])
    for batch in batches(3):
        run.step(batch)
    assert not doubles
    assert reason in caplog.text


def test_adapters_of_another_kind_are_launched(doubles, caplog):
    run = loop(GRAPHS.replace(start_step=0), 10, lora={"use_dora": True})
    for batch in batches(3):
        run.step(batch)
    assert not doubles
    assert "no plain LoRA" in caplog.text


WATCHED = [
    (lambda: torch.autograd.set_detect_anomaly(True), "what is saved"),
    (torch.autograd.graph.save_on_cpu, "what is saved"),
    (lambda: register_module_forward_hook(lambda *args: None), "hooks on all modules"),
    (lambda: register_module_forward_pre_hook(lambda *args: None), "hooks on all modules"),
]


@pytest.mark.parametrize(("watch", "reason"), WATCHED)
def test_what_others_watch_is_launched(run, doubles, caplog, watch, reason):
    before = replays(doubles)
    with watch():
        run.step(batches(1)[0])
    assert replays(doubles) == before
    assert reason in caplog.text
    run.step(batches(1)[0])
    assert replays(doubles) == before + 6


def test_evaluation_with_gradients_is_launched_and_leaves_recordings_as_they_are(run, doubles):
    batch = batches(1)[0]
    before = replays(doubles)
    run.model.eval()
    for _ in range(4):
        run.model(**batch).loss.backward()
    assert replays(doubles) == before
    run.model.train()
    run.step(batch)
    assert replays(doubles) == before + 6


@pytest.mark.parametrize(
    ("put", "now", "before"),
    [(torch.set_autocast_enabled, True, False), (torch.set_autocast_dtype, torch.bfloat16, torch.float16)],
)
def test_another_autocast_is_another_form(run, doubles, put, now, before):
    done = replays(doubles)
    put("cuda", now)
    try:
        run.step(batches(1)[0])
    finally:
        put("cuda", before)
    assert replays(doubles) == done
    run.step(batches(1)[0])
    assert replays(doubles) == done + 6


def test_a_dropout_that_is_switched_off_is_not_replayed(doubles, monkeypatch):
    run = loop(GRAPHS.replace(start_step=0), 10, lora={"dropout": 0.5})
    batch = batches(1)[0]
    for _ in range(4):
        run.step(batch, learn=False)
    assert replays(doubles)
    for module in run.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    got = run.forward(batch).item()
    monkeypatch.setattr(series_module.Graphs, "take", lambda self, batch, form: None)
    assert got == run.forward(batch).item()


def test_results_of_layers_that_learn_nothing_are_there_until_the_backward(doubles):
    def without_norm(model):  # the last layer keeps its input for backward
        model.get_base_model().model.layers[3].input_layernorm = torch.nn.Identity()

    run = loop(GRAPHS.replace(start_step=0), 100, change=without_norm, lora={"layers_to_transform": [3]})
    one, other = batches(2)
    for _ in range(3):
        run.step(one, learn=False)
    assert replays(doubles)
    want = [gradients_of(run, run.forward(batch)) for batch in (one, other)]
    losses = [run.forward(batch) for batch in (one, other)]
    assert_close(gradients_of(run, losses[0]), want[0])
    assert_close(gradients_of(run, losses[1]), want[1])


def test_gradients_that_accumulate_below_the_layers_are_not_overwritten(doubles, monkeypatch):
    def gradient():
        run = loop(GRAPHS.replace(start_step=0), 10)
        added = torch.zeros(3, 14, 64, requires_grad=True)
        for step, batch in enumerate(batches(5)):
            if step == 3:
                added.grad = None  # it is then taken from a replay
            run.handle.begin_step(step)
            embeds = run.model.get_input_embeddings()(batch["input_ids"]) + added
            rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
            run.model(inputs_embeds=embeds, **rest).loss.backward()
        return added.grad

    got = gradient()
    assert replays(doubles)
    monkeypatch.setattr(series_module.Graphs, "take", lambda self, batch, form: None)
    assert torch.allclose(got, gradient(), rtol=1e-5, atol=1e-7)


def test_merged_adapters_leave_a_loss_without_gradient(run, doubles):
    run.model.merge_adapter()
    before = replays(doubles)
    for batch in batches(4):
        assert not run.forward(batch).requires_grad
    assert replays(doubles) > before
    run.model.unmerge_adapter()
    assert run.forward(batches(1)[0]).requires_grad


def test_statistics_from_a_checkpoint_are_not_those_of_the_recordings(doubles, tmp_path):
    run = loop(GRAPHS.replace(criterion="static"), 100)
    for batch in batches(8):
        run.step(batch, learn=False)
    run.handle.save(tmp_path)
    assert run.handle.state.graphs._series
    assert run.handle.load(tmp_path)
    assert not run.handle.state.graphs._series


def test_a_new_run_and_a_restored_model_know_no_recordings(run, doubles):
    graphs = run.handle.state.graphs
    assert graphs._series
    run.handle.begin_run(10)
    assert not graphs._series
    made = len(doubles)
    run.step(batches(1)[0])
    assert len(doubles) == made  # the first batch of a form runs as ever
    run.handle.restore()
    before = replays(doubles)
    run.model(**batches(1)[0]).loss.backward()
    assert replays(doubles) == before


def test_a_run_after_one_that_an_error_ended_is_replayed_while_the_traceback_is_kept(run, doubles):
    def fail(*args):
        raise KeyboardInterrupt

    hook = run.model.get_base_model().model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt) as kept:
        run.step(batches(1)[0])
    hook.remove()
    assert run.handle.state.graphs.under_way.pending == 3
    run.handle.begin_run(100)
    before = replays(doubles)
    for batch in batches(3):
        run.step(batch)
    assert replays(doubles) == before + 2 * 6
    assert kept


def test_a_copy_of_the_model_records_for_itself(run, doubles):
    twin = copy.deepcopy(run.model)
    graphs = twin.get_base_model().model.layers[0].__dict__["_sparselora"][0].graphs
    assert graphs is not run.handle.state.graphs
    assert not graphs._series
    pickle.loads(pickle.dumps(run.model))


def test_figures_tell_the_share_of_replayed_batches(doubles):
    run = loop(GRAPHS.replace(start_step=0), 100)
    for _ in range(8):
        run.step(batches(1)[0])
    assert run.figures()["sparselora/replayed"] == 6 / 8  # one is met, one recorded
    assert not run.figures()


@pytest.mark.parametrize("forms", [1, 2])
def test_a_run_whose_shapes_do_not_come_again_is_told_the_remedy(doubles, caplog, monkeypatch, forms):
    monkeypatch.setattr(series_module, "_TRIAL", 10)
    monkeypatch.setattr(series_module, "_FORMS", 1)  # two by turns drive each other out
    run = loop(GRAPHS.replace(start_step=0), 100)
    for step in range(20):
        run.step(batches(2, forms=forms)[step % forms])
    assert ("pad_to_multiple_of=max_length" in caplog.text) == (forms == 2)


def test_forms_beyond_the_most_are_forgotten(doubles, monkeypatch):
    monkeypatch.setattr(series_module, "_FORMS", 1)
    run = loop(GRAPHS.replace(start_step=0), 100)
    for step in range(12):
        run.step(batches(2, forms=2)[step // 3 % 2])
    assert len(run.handle.state.graphs._series) == 1
    assert run.figures()["sparselora/replayed"] == (1 + 1 + 2 + 2) / 12


def test_random_sets_and_models_without_plain_layers_do_without(caplog):
    run = loop(GRAPHS.replace(criterion="random"), 10)
    assert run.handle.state.graphs is None
    assert 'cuda_graphs is of no effect: criterion "random" draws on the host' in caplog.text
    single = sparsify(lora_model(layers=1), GRAPHS.replace(attention_sparsity=0.0))
    assert single.state.graphs is None
    assert "cuda_graphs is of no effect: there is no layer but the last" in caplog.text


def test_a_cpu_records_nothing(caplog):
    run = loop(GRAPHS, 10)
    want = loop(GRAPHS.replace(cuda_graphs=False), 10)
    for batch in batches(5):
        assert run.step(batch) == want.step(batch)
    assert not run.handle.state.graphs._series
    assert run.figures()["sparselora/replayed"] == 0
    assert caplog.text.count("cuda_graphs is of no effect: it takes an NVIDIA GPU") == 1


def test_a_layer_that_waits_for_the_device_is_launched_and_those_above_it(doubles, launched, caplog, monkeypatch):
    asked, look = [], form_module.has_waited
    monkeypatch.setattr(form_module, "has_waited", lambda run: asked.append(look(run)) or len(asked) % 2 == 0)
    steps = batches(8)
    assert_equal(launched(GRAPHS, steps), train(GRAPHS, steps))
    assert "layer 1 and those above are not made CUDA graphs: it waits for the device" in caplog.text
    assert len(doubles) == 2 * 2  # the first layer, both ways, dense and sparse
    assert replays(doubles)


@pytest.mark.parametrize("waits", [False, True])
def test_what_makes_the_host_wait_is_noticed(monkeypatch, waits):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run():
        assert modes[-1] == "warn"
        assert not torch.is_grad_enabled()
        warnings.warn("called a synchronizing CUDA operation" if waits else "something else", stacklevel=1)

    warnings.simplefilter("ignore")  # whatever a user has put
    assert recording_module.has_waited(run) == waits
    assert modes[-1] == "default"


def test_what_was_narrowed_without_gradients_is_narrowed_again(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: "default")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: done.append("cleared"))
    recording_module.has_waited(lambda: done.append("run"))
    assert done == ["run", "cleared"]


def test_a_fault_while_recording_names_the_remedy(doubles, monkeypatch):
    def fail(self):
        raise RuntimeError("operation not permitted")

    run = loop(GRAPHS.replace(start_step=0), 10)
    run.step(batches(1)[0])
    monkeypatch.setattr(layer_module.LayerGraph, "_run_backward", fail)
    with pytest.raises(RuntimeError, match=r"backward cannot be recorded .*not permitted.*cuda_graphs=False"):
        run.step(batches(1)[0])


@pytest.mark.parametrize("shape", [(3, 14), (8, 512), (2, 100), (1, 16), (16, 640)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_rounded_plan_leaves_no_row_out(shape, side):
    generator = torch.Generator().manual_seed(sum(shape))
    rows, length = shape
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=generator).tolist()
    answers = [int(n * torch.rand((), generator=generator)) for n in lengths]
    pairs = [(n - a, a) for n, a in zip(lengths, answers, strict=True)]
    batch = make_batch(tuple(p for p, _ in pairs), tuple(a for _, a in pairs), side)
    plan = TokenPlan.of_inputs(batch)
    rounded = plan.rounded()
    total = plan.shape[0] * plan.shape[1]
    multiple = max(1, min(max(64, total // 64), total // 16))
    context, output, real = (set(part.tolist()) for part in (rounded.context, rounded.output, plan.context))
    assert len(context) % multiple == 0
    assert context <= real
    assert len(real) - len(context) < multiple
    assert not context & output
    assert set(plan.output.tolist()) <= output
    assert len(output) % multiple == 0 or len(context) + len(output) == total
    assert context | set(rounded.rest.tolist()) == set(range(total))
    assert not context & set(rounded.rest.tolist())
    kept = set(range(total)) if rounded.real is None else set(rounded.real.tolist())
    assert kept == context | output
    assert (rounded.groups, len(rounded.sequence)) == (len(rounded.sequence.unique()), len(context))
    for part in (rounded.context, rounded.output, rounded.rest, *([] if rounded.real is None else [rounded.real])):
        assert (part.diff() > 0).all()
    assert torch.equal(rounded.loss, plan.loss)
    assert rounded.rounded() is rounded


@pytest.mark.parametrize(
    ("device", "backend", "can"),
    [("cuda", "native", True), ("cuda", "cudaMallocAsync", False), ("cpu", "native", False)],
)
def test_where_work_can_be_recorded(monkeypatch, device, backend, can):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    monkeypatch.setattr(torch.version, "hip", None)
    assert recording_module.can_record(torch.device(device)) == can
