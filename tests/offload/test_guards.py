"""Reading, copying and editing a wrapped module gives real values or is refused with the mend, never NaN in silence."""

from __future__ import annotations

import copy
import io
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload import SGD, AdamW, EngineClosed, OffloadConfig, OffloadEngine, PlaceholderOverwritten

FP32 = {"dtype": torch.float32}


class Model(nn.Module):
    """Tied weights, a frozen unit, an integer parameter, a bare parameter and both kinds of buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.embed = nn.Embedding(11, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.scale = nn.Parameter(torch.full((8,), 0.75))
        self.codes = nn.Parameter(torch.arange(8, dtype=torch.int8), requires_grad=False)
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.frozen(self.block(self.embed(tokens))) * self.scale + self.codes
        return self.head(self.norm(x))


TOKENS = torch.arange(12) % 11


def train(engine: OffloadEngine, num_steps: int = 1) -> None:
    for _ in range(num_steps):
        engine.backward(engine(TOKENS).float().square().mean())
        engine.step()


@pytest.fixture
def engine(settings: dict[str, Any]) -> Any:
    with OffloadEngine(Model(), AdamW(lr=1e-2), OffloadConfig(**FP32, **settings)) as engine:
        yield engine


# -- reading


def test_released_parameter_keeps_shape_and_shows_nan(engine: OffloadEngine) -> None:
    original = Model()
    for (name, parameter), (_, expected) in zip(
        engine.module.named_parameters(), original.named_parameters(), strict=True
    ):
        assert parameter.shape == expected.shape and parameter.dtype == expected.dtype, name
        assert parameter.requires_grad == expected.requires_grad
        assert parameter.untyped_storage().nbytes() == parameter.element_size()
        if parameter.dtype.is_floating_point:
            assert parameter.isnan().all() and parameter.norm().isnan()
        else:
            assert (parameter == 0x5A).all()


def test_no_two_parameters_share_a_placeholder(engine: OffloadEngine) -> None:
    addresses = [p.untyped_storage().data_ptr() for p in engine.module.parameters()]
    assert len(set(addresses)) == len(addresses)


def test_parameter_read_through_its_module_is_fetched(kit: SimpleNamespace, engine: OffloadEngine) -> None:
    original = Model()
    module = engine.module
    for ours, theirs in (
        (module.block[0].weight, original.block[0].weight),
        (module.head.weight, original.head.weight),
        (module.scale, original.scale),
        (module.codes, original.codes),
        (module.get_parameter("frozen.bias"), original.frozen.bias),
    ):
        assert kit.bits(ours) == kit.bits(theirs)
    train(engine)
    assert next(module.block.parameters()).isnan().all(), "the copies last no longer than the step"
    fresh = module.block[0].weight.detach().clone()
    with engine.gather("block.*") as parameters:
        assert kit.bits(fresh) == kit.bits(parameters["block.0.weight"].value)
    assert kit.bits(fresh) != kit.bits(original.block[0].weight)


def test_module_state_dict_gives_real_values(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with OffloadEngine(Model(), SGD(), OffloadConfig(dtype=dtype, **settings)) as engine:
            ours, expected = engine.module.state_dict(), Model().state_dict()
            assert list(ours) == list(expected)
            for name, value in expected.items():
                is_cast = value.dtype.is_floating_point and name in dict(
                    Model().named_parameters(remove_duplicate=False)
                )
                assert kit.bits(ours[name]) == kit.bits(value.to(dtype) if is_cast else value), name
            assert ours["head.weight"].data_ptr() == ours["embed.weight"].data_ptr(), "tied stays shared"
            assert ours["block.0.weight"].data_ptr() != ours["frozen.weight"].data_ptr()
            part = engine.module.block.state_dict()
            assert kit.bits(part["0.weight"]) == kit.bits(ours["block.0.weight"])


def test_module_state_dict_is_a_copy(kit: SimpleNamespace, engine: OffloadEngine) -> None:
    """Handed-out values neither change with training nor change it."""
    before = engine.module.state_dict()
    kept = {name: kit.bits(value) for name, value in before.items() if name != "norm.num_batches_tracked"}
    names = dict(engine.module.named_parameters())
    train(engine)
    after = engine.module.state_dict()
    for name in names:
        assert kit.bits(before[name]) == kept[name]
    assert kit.bits(after["embed.weight"]) != kept["embed.weight"]
    assert after["head.weight"].data_ptr() == after["embed.weight"].data_ptr()
    after["embed.weight"].zero_()
    with engine.gather("embed.weight") as parameters:
        assert parameters["embed.weight"].value.any()


def test_torch_save_of_the_state_dict(kit: SimpleNamespace, engine: OffloadEngine) -> None:
    file = io.BytesIO()
    torch.save(engine.module.state_dict(), file)
    file.seek(0)
    loaded = Model()
    loaded.load_state_dict(torch.load(file))
    for name, value in Model().state_dict().items():
        assert kit.bits(loaded.state_dict()[name]) == kit.bits(value), name


def test_engine_state_dict_is_in_full_precision(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    with OffloadEngine(Model(), AdamW(lr=1e-2), OffloadConfig(keep_fp32=["norm.*"], **settings)) as engine:
        expected = Model().state_dict()
        ours = engine.state_dict()
        assert list(ours) == list(expected)
        for name, value in expected.items():
            assert ours[name].dtype == value.dtype or name.startswith("frozen"), name
            if not name.startswith("frozen"):  # a frozen parameter has no master: it is what it computes with
                assert kit.bits(ours[name]) == kit.bits(value), name
        assert kit.bits(ours["frozen.weight"]) == kit.bits(expected["frozen.weight"].bfloat16())
        assert ours["head.weight"].data_ptr() == ours["embed.weight"].data_ptr()
        with torch.inference_mode():
            again = engine.state_dict()
        assert all(kit.bits(again[name]) == kit.bits(ours[name]) for name in ours)


# -- refusals

REFUSED = {
    "deepcopy": (copy.deepcopy, r"deep-copying Model is refused; .*engine.state_dict\(\)"),
    "deepcopy of a part": (lambda m: copy.deepcopy(m.block), r"deep-copying Sequential is refused"),
    "deepcopy of a parameter": (
        lambda m: copy.deepcopy(next(m.parameters())),
        r"copying parameter '\w+(\.weight)?' is refused",
    ),
    "pickle": (pickle.dumps, r"pickling Model is refused; .*engine.state_dict\(\)"),
    "torch.save": (lambda m: torch.save(m, io.BytesIO()), r"pickling Model is refused"),
    "to": (lambda m: m.to(torch.float64), r"moving or casting Model is refused; .*OffloadConfig"),
    "half": (lambda m: m.half(), r"moving or casting Model is refused"),
    "part.to": (lambda m: m.block.to("cpu"), r"moving or casting Sequential is refused"),
    "share_memory": (lambda m: m.share_memory(), r"moving or casting Model is refused"),
    "load_state_dict": (
        lambda m: m.load_state_dict(Model().state_dict()),
        r"load_state_dict on Model .*engine.load_state_dict",
    ),
    "part.load_state_dict": (
        lambda m: m.block.load_state_dict(Model().block.state_dict()),
        r"load_state_dict on Sequential .*engine.load_state_dict",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_whole_module_copies_and_moves_are_refused(kit: SimpleNamespace, engine: OffloadEngine, name: str) -> None:
    action, message = REFUSED[name]
    before = kit.state_of(engine)
    with pytest.raises(RuntimeError, match=message):
        action(engine.module)
    kit.assert_same_state(kit.state_of(engine), before)
    train(engine)


# -- edits that would be lost


def test_placeholder_written_to_raises_at_the_next_fetch(engine: OffloadEngine) -> None:
    with torch.no_grad():
        next(engine.module.block.parameters()).fill_(1.0)
    with pytest.raises(
        PlaceholderOverwritten, match=r"'block.0.weight'.* written to .*engine.gather\('block.0.weight', write=True\)"
    ):
        engine(TOKENS)


def test_placeholder_replaced_raises_at_the_next_fetch(engine: OffloadEngine) -> None:
    next(engine.module.block.parameters()).data = torch.zeros(8, 8)
    with pytest.raises(PlaceholderOverwritten, match=r"'block.0.weight'.* replaced .*engine.gather"):
        engine(TOKENS)


def test_reinitialisation_through_the_module_raises(engine: OffloadEngine) -> None:
    """`module.apply(init)` reads parameters through their modules, so it edits copies."""
    with torch.no_grad():
        engine.module.block[0].weight.zero_()
    with pytest.raises(PlaceholderOverwritten, match=r"'block.0.weight' was edited in place.*engine.gather"):
        train(engine)


def test_a_read_without_an_edit_is_fine(engine: OffloadEngine) -> None:
    assert engine.module.block[0].weight.isfinite().all()
    train(engine, 2)


# -- gather


def test_gathered_edit_holds(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    """Value, states, step and frozen values written inside `gather` are what the next step starts from."""
    config = OffloadConfig(**settings, keep_fp32=["norm.*"])  # batch norm of bf16 wants weights as its statistics
    with OffloadEngine(Model(), AdamW(lr=1e-2), config) as engine:
        train(engine, 2)
        fine = 1.0 + 2.0**-20  # not a bfloat16: the master must hold it
        with engine.gather("block.*", "frozen.weight", write=True) as parameters:
            assert set(parameters) == {"block.0.weight", "block.0.bias", "frozen.weight"}
            parameters["block.0.weight"].value.fill_(fine)
            parameters["block.0.weight"].states["exp_avg"].fill_(0.125)
            parameters["block.0.bias"].step = 40
            parameters["frozen.weight"].value.fill_(0.5)
        state = kit.state_of(engine)
        assert (state["block.0.weight"].value == fine).all()
        assert (state["block.0.weight"].states["exp_avg"] == 0.125).all()
        assert state["block.0.weight"].states["exp_avg_sq"].any()
        assert (state["block.0.bias"].step, state["block.0.weight"].step) == (40, 2)
        assert (engine.module.frozen.weight == 0.5).all()
        assert (engine.module.state_dict()["block.0.weight"] == 1.0).all()
        train(engine)
        assert kit.state_of(engine)["block.0.bias"].step == 41


def test_gathered_gradient_edit_holds(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    with OffloadEngine(Model(), SGD(lr=1.0), OffloadConfig(**FP32, **settings)) as engine:
        before = kit.state_of(engine)
        engine.backward(engine(TOKENS).square().mean())
        with engine.gather("*", write=True) as parameters:
            assert parameters["frozen.weight"].grad is None
            for parameter in parameters.values():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            parameters["scale"].grad.fill_(3.0)
            parameters["block.0.bias"].grad[0] = 4.0
        info = engine.step()
        after = kit.state_of(engine)
        assert info.grad_norm == (8 * 9.0 + 16.0) ** 0.5
        assert torch.equal(after["scale"].value, before["scale"].value - 3.0)
        assert after["block.0.bias"].value[0] == before["block.0.bias"].value[0] - 4.0
        assert kit.bits(after["block.0.weight"].value) == kit.bits(before["block.0.weight"].value)


def test_gather_without_write_changes_nothing(kit: SimpleNamespace, engine: OffloadEngine) -> None:
    before = kit.state_of(engine)
    with engine.gather("*") as parameters:
        for parameter in parameters.values():
            parameter.value.zero_()
    kit.assert_same_state(kit.state_of(engine), before)


def test_exception_inside_gather_writes_nothing(kit: SimpleNamespace, engine: OffloadEngine) -> None:
    before = kit.state_of(engine)
    with pytest.raises(ZeroDivisionError), engine.gather("*", write=True) as parameters:
        parameters["scale"].value.zero_()
        raise ZeroDivisionError
    kit.assert_same_state(kit.state_of(engine), before)


def test_gather_of_nothing(engine: OffloadEngine) -> None:
    with pytest.raises(KeyError, match=r"no parameter matches 'layers.\*'; names look like"), engine.gather("layers.*"):
        pass


def test_gather_finds_tied_parameters_under_every_name(engine: OffloadEngine) -> None:
    with engine.gather("head.weight", write=True) as parameters:
        assert parameters["head.weight"] is parameters["embed.weight"]
        parameters["head.weight"].value.fill_(0.25)
    assert (engine.module.embed.weight == 0.25).all()


# -- state dicts


def test_load_state_dict_round_trip(kit: SimpleNamespace, settings: dict[str, Any]) -> None:
    with OffloadEngine(Model(), AdamW(lr=1e-2), OffloadConfig(**settings, keep_fp32=["norm.*"])) as engine:
        train(engine, 2)
        saved = engine.state_dict()
        states = kit.state_of(engine)
        train(engine, 2)
        assert kit.bits(engine.state_dict()["embed.weight"]) != kit.bits(saved["embed.weight"])
        engine.load_state_dict(saved)
        again = engine.state_dict()
        for name, value in saved.items():
            assert kit.bits(again[name]) == kit.bits(value), name
        after = kit.state_of(engine)
        assert kit.bits(after["embed.weight"].states["exp_avg"]) != kit.bits(states["embed.weight"].states["exp_avg"])
        train(engine)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: d.pop("scale"), KeyError, r"missing \['scale'\]"),
        (lambda d: d.update(extra=torch.ones(1)), KeyError, r"unexpected \['extra'\]"),
        (
            lambda d: d.update(scale=torch.ones(9)),
            ValueError,
            r"'scale' has shape \(9,\) in state_dict and \(8,\) in the model",
        ),
    ],
)
def test_state_dict_that_does_not_fit(
    kit: SimpleNamespace, engine: OffloadEngine, change: Any, error: type[Exception], message: str
) -> None:
    before = kit.state_of(engine)
    saved = {name: torch.zeros_like(value) for name, value in engine.state_dict().items()}
    change(saved)
    with pytest.raises(error, match=message):
        engine.load_state_dict(saved)
    kit.assert_same_state(kit.state_of(engine), before)


def test_load_state_dict_takes_a_part_if_not_strict(kit: SimpleNamespace, engine: OffloadEngine) -> None:
    engine.load_state_dict(
        {"scale": torch.zeros(8), "norm.running_mean": torch.ones(8), "other": torch.ones(1)}, strict=False
    )
    assert (engine.module.scale == 0).all()
    assert (engine.module.norm.running_mean == 1).all()
    assert kit.bits(engine.module.block[0].weight) == kit.bits(Model().block[0].weight)


def test_optimizer_takes_its_own_state_dict(kit: SimpleNamespace, engine: OffloadEngine) -> None:
    before = kit.state_of(engine)
    engine.optimizer.load_state_dict(engine.optimizer.state_dict())
    kit.assert_same_state(kit.state_of(engine), before)


# -- the end


CLOSED = {
    "call": lambda e: e(TOKENS),
    "backward": lambda e: e.backward(torch.ones((), requires_grad=True)),
    "step": lambda e: e.step(),
    "optimizer.step": lambda e: e.optimizer.step(),
    "state_dict": lambda e: e.state_dict(),
    "module.state_dict": lambda e: e.module.state_dict(),
    "load_state_dict": lambda e: e.load_state_dict({}),
    "clip_grad_norm_": lambda e: e.clip_grad_norm_(1.0),
    "gather": lambda e: e.gather("*").__enter__(),
    "unit": lambda e: e.module.block(torch.ones(2, 8)),
}


@pytest.mark.parametrize("name", CLOSED)
def test_use_after_close(settings: dict[str, Any], name: str) -> None:
    engine = OffloadEngine(Model(), AdamW(), OffloadConfig(**FP32, **settings))
    train(engine)
    engine.close()
    with pytest.raises(EngineClosed, match=r"the engine is closed; build a new model and a new OffloadEngine"):
        CLOSED[name](engine)


def test_backward_of_a_loss_that_outlives_the_engine(settings: dict[str, Any]) -> None:
    engine = OffloadEngine(Model(), AdamW(), OffloadConfig(**FP32, **settings))
    loss = engine(TOKENS).square().mean()
    engine.close()
    with pytest.raises(EngineClosed):
        loss.backward()


def test_parameter_read_after_close(settings: dict[str, Any]) -> None:
    engine = OffloadEngine(Model(), AdamW(), OffloadConfig(**FP32, **settings))
    engine.close()
    with pytest.raises(
        RuntimeError, match=r"'frozen.weight' was read after engine.close\(\).*engine.state_dict\(\) before"
    ):
        _ = engine.module.frozen.weight


def test_double_close(settings: dict[str, Any]) -> None:
    with OffloadEngine(Model(), AdamW(), OffloadConfig(**FP32, **settings)) as engine:
        train(engine)
        engine.close()
        engine.close()
    engine.optimizer.zero_grad()


def test_close_with_work_in_flight(settings: dict[str, Any]) -> None:
    """Right after a backward gradients are still on their way; closing must wait for them and return."""
    for _ in range(5):
        engine = OffloadEngine(Model(), AdamW(), OffloadConfig(**FP32, **settings))
        engine.backward(engine(TOKENS).square().mean())
        engine.close()


def test_module_cannot_be_wrapped_twice(engine: OffloadEngine) -> None:
    with pytest.raises(ValueError, match=r"wrapped by an engine, and that can be done once; build a new one"):
        OffloadEngine(engine.module, AdamW(), OffloadConfig(**FP32))
    train(engine)
