"""SpIEL beside a frozen weight, float or quantised: the entries are those of SpIEL in place."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import zoopt
from tests.test_quantised import loss_of, model
from zoopt.nn import SparseDeltaLinear, convert_to_quantised, convert_to_sparse_delta

OPTIONS: dict[str, Any] = {"lr": 1e-2, "update_gap": 4, "window": 3, "drop_fraction": 0.4}


def everything(name: str, module: nn.Module) -> bool:
    return True


def optimizer_of(params: Any, **options: Any) -> zoopt.SparseDeltaAdamW:
    return zoopt.SparseDeltaAdamW(params, **{**OPTIONS, "density": 0.1, "seed": 0, **options})


def two_passes(net: nn.Module) -> None:
    for _ in range(2):
        (loss_of(net) * 0.5).backward()


def two_calls_one_pass(net: nn.Module) -> None:
    (loss_of(net) * 0.5 + loss_of(net) * 0.5).backward()


@pytest.mark.parametrize("passes", [two_passes, two_calls_one_pass])
@pytest.mark.parametrize("window", [3, 4])
@pytest.mark.parametrize("growth", ["accumulated", "momentum"])
def test_beside_a_float_weight_it_is_spiel_in_place(
    growth: Any, window: int, passes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with micro-batches or a layer that runs twice, scaled gradients, gradients
    dropped before a step, and a dL/dW of several chunks: the same entries, and changes equal to
    rounding."""
    monkeypatch.setattr("zoopt.nn.linear.CHUNK", 100)
    inside, beside = model(torch.float64), model(torch.float64)
    base = copy.deepcopy(inside)
    options = {"growth": growth, "window": window, "weight_decay": 0.1}
    weights = [(name, p) for name, p in inside.named_parameters() if p.dim() == 2]
    deltas = convert_to_sparse_delta(beside, everything, density=0.1)
    assert [name for name, _ in deltas] == ["0.delta", "2.delta"]
    first, second = optimizer_of(weights, **options), optimizer_of(deltas, **options)
    seen = set()
    for step in range(14):
        for net, optimizer in ((inside, first), (beside, second)):
            if step == 5:
                (loss_of(net) * 3.0).backward()
                optimizer.zero_grad()
            passes(net)
            for group in optimizer.param_groups:
                for param in group["params"]:
                    param.grad.mul_(0.25)
            optimizer.step()
            optimizer.zero_grad()
        for number in (0, 2):
            layer, state = beside[number], first.state[inside[number].weight]
            assert torch.equal(layer.index, state["index"])
            change = (inside[number].weight - base[number].weight).view(-1)[layer.index.long()]
            torch.testing.assert_close(layer.delta, change, rtol=1e-9, atol=1e-12)
            own = second.state[layer.delta]
            for name in ("exp_avg", "exp_avg_sq", "age"):
                torch.testing.assert_close(own[name], state[name], rtol=1e-9, atol=1e-18)
        seen |= set(beside[0].index.tolist())
    assert len(seen) > 1.3 * beside[0].delta.numel()


def build(bits: int = 4, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    net = convert_to_quantised(model(dtype), everything, bits=bits, group_size=8)
    return net, optimizer_of(convert_to_sparse_delta(net, density=0.1), **options)


def step(net: nn.Module, optimizer: Any) -> float:
    optimizer.zero_grad()
    loss = loss_of(net)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("growth", ["accumulated", "momentum"])
@pytest.mark.parametrize("bits", [4, 8])
def test_over_quantised_layers(bits: int, growth: Any, fused: bool) -> None:
    """The loss falls, codes and scales keep their bits, the number of entries stays; a run that is
    loaded in the middle of a window continues to the bit."""
    net, optimizer = build(bits, growth=growth)
    handles = [zoopt.fuse_backward(net, optimizer)] if fused else []
    frozen = {n: v.clone() for n, v in net.state_dict().items() if ".base." in n}
    start = loss_of(net).item()
    for number in range(23):
        if number == 7:
            file = io.BytesIO()
            torch.save([net.state_dict(), optimizer.state_dict()], file)
        step(net, optimizer)
        assert net[0].index.unique().numel() == net[0].delta.numel() == 66
    assert loss_of(net).item() < 0.9 * start
    assert all(torch.equal(net.state_dict()[name], value) for name, value in frozen.items())
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other, resumed = build(bits, growth=growth)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    other = copy.deepcopy(other)
    copied = optimizer_of([(n, p) for n, p in other.named_parameters() if n.endswith("delta")])
    copied.load_state_dict(resumed.state_dict())
    if fused:
        handles.append(zoopt.fuse_backward(other, copied))
    for _ in range(16):
        step(other, copied)
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    for handle in handles:
        handle.remove()


def test_merge_file_and_removal(tmp_path: Any) -> None:
    """Merged, it is a float layer with the same outputs; the file goes onto the base and off it."""
    net, optimizer = build(dtype=torch.bfloat16)
    base = copy.deepcopy(zoopt.nn.remove_sparse_delta(copy.deepcopy(net)))
    for _ in range(9):
        step(net, optimizer)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    merged = zoopt.nn.merge(copy.deepcopy(net))
    assert [type(layer) for layer in merged] == [nn.Linear, nn.Tanh, nn.Linear]
    assert torch.equal(merged(x), net(x))
    assert not torch.equal(base(x), net(x))
    path = tmp_path / "delta.pt"
    torch.save(zoopt.sparse_delta(optimizer), path)
    assert path.stat().st_size < 4000
    delta = torch.load(path, weights_only=True)
    assert set(delta) == {"0.weight", "2.weight"}
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match=r"have the delta of '0.weight' yet; apply it first"):
        zoopt.remove_delta(base, delta)
    zoopt.apply_delta(base, delta)
    assert torch.equal(base(x), net(x))
    with pytest.raises(ValueError, match=r"must not have the delta of '0.weight' yet; remove it"):
        zoopt.apply_delta(base, delta)
    with pytest.raises(ValueError, match=r"must hold what the delta made, got other entries of '0"):
        zoopt.remove_delta(base, {**delta, "0.weight": delta["2.weight"]})
    zoopt.remove_delta(base, delta)
    assert all(torch.equal(v, before[n]) for n, v in base.state_dict().items())
    assert base.state_dict().keys() == before.keys()
    with pytest.raises(ValueError, match=r"must have the layers of the delta, got none for '9.wei"):
        zoopt.apply_delta(base, {"9.weight": delta["0.weight"]})
    small = {"index": torch.tensor([10**6]), "value": torch.ones(1)}
    with pytest.raises(ValueError, match=r"the delta's sizes, got 33 x 20 for '0.weight'"):
        zoopt.apply_delta(base, {"0.weight": small})
    negative = {"index": torch.tensor([-1]), "value": torch.ones(1)}
    base[0].bias.requires_grad_()
    for damaged in ({**delta, "9.weight": small}, {**delta, "2.weight": negative}):
        with pytest.raises(ValueError, match="model must have"):
            zoopt.apply_delta(base, damaged)
        assert base[0].bias.requires_grad


class Sizes(TorchDispatchMode):
    """How many elements the results of matrix products have."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.products.append(out.numel())
        return out


def test_the_gradient_of_the_whole_weight_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """With candidates wanted or not, products of weights' size are a chunk at a time."""
    monkeypatch.setattr("zoopt.nn.linear.CHUNK", 5 * 64)
    net = nn.Sequential(nn.Linear(64, 96, bias=False))
    optimizer = optimizer_of(convert_to_sparse_delta(net, everything, density=0.1))
    for _ in range(5):
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        loss = net(x).square().sum()
        with Sizes() as sizes:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert max(sizes.products) == 5 * 64
        assert len(sizes.products) > 20


def test_a_gradient_that_is_not_finite_chooses_nothing() -> None:
    net, optimizer = build()
    (loss_of(net) * torch.nan).backward()
    optimizer.step()
    assert not net[0].placed
    assert int(optimizer.state[net[0].delta]["step"]) == 0
    for number in range(1, 5):  # The window is steps 2 to 4.
        optimizer.zero_grad()
        (loss_of(net) * (torch.nan if number == 3 else 1.0)).backward()
        if number == 3:
            for _, param in net.named_parameters():
                param.grad = None if param.grad is None else param.grad.nan_to_num(0.0)
        before = net[0].index.clone()
        optimizer.step()
    assert torch.equal(net[0].index, before)


def test_a_layer_has_one_delta() -> None:
    """A second conversion is refused whole; a bare layer becomes its base, as others do."""
    net, _ = build()
    for target in (None, everything):
        with pytest.raises(ValueError, match=r"not have a sparse delta yet, got '0', which has on"):
            convert_to_sparse_delta(net, target)
        assert net[0].delta.requires_grad
        assert not isinstance(net[0].base, SparseDeltaLinear)
    base = net[0].base
    with pytest.raises(ValueError, match=r"must not have a sparse delta yet, got ''"):
        convert_to_sparse_delta(net[0])
    assert zoopt.nn.remove_sparse_delta(net[0]) is base
    zoopt.nn.remove_sparse_delta(net)
    assert [name for name, _ in convert_to_sparse_delta(net)] == ["0.delta", "2.delta"]


def test_a_layer_in_several_places_is_left_as_it_is() -> None:
    """As other conversions leave tied layers: a delta would be in one of the places only."""
    shared = nn.Linear(8, 8)
    net = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(8, 4))
    assert [name for name, _ in convert_to_sparse_delta(net, everything)] == ["3.delta"]
    assert net[0] is net[2] is shared
    with pytest.raises(ValueError, match="target must match a linear layer"):
        convert_to_sparse_delta(nn.Sequential(shared, shared), everything)


def test_refuses() -> None:
    net = model()
    with pytest.raises(ValueError, match=r"model must have quantised layers, got none"):
        convert_to_sparse_delta(net)
    with pytest.raises(ValueError, match="density must be a finite number > 0 and <= 1, got 2"):
        convert_to_sparse_delta(net, everything, density=2.0)
    with pytest.raises(TypeError, match=r"a layer must be an nn.Linear or a quantised one"):
        SparseDeltaLinear(nn.Tanh())
    for entries in (65, -1, 2.0):
        with pytest.raises(ValueError, match=r"entries must be an int from 0 to 64, as many as"):
            SparseDeltaLinear(nn.Linear(8, 8), entries=entries)  # type: ignore[arg-type]
    bare, uneven = nn.Linear(8, 8), model()
    with pytest.raises(ValueError, match=r"got a bare Linear; wrap it in nn.Sequential"):
        convert_to_sparse_delta(bare, everything)
    uneven.append(nn.Linear(7, 1))
    uneven[3].in_features = 0
    with pytest.raises(ValueError, match=r"base must have weights, got 1 x 0"):
        convert_to_sparse_delta(uneven, everything)
    for unchanged in (bare, uneven):
        assert all(param.requires_grad for param in unchanged.parameters())
        assert not any(isinstance(m, SparseDeltaLinear) for m in unchanged.modules())
    net = convert_to_quantised(model(), everything, bits=4, group_size=8)
    deltas = convert_to_sparse_delta(net, density=0.1)
    loss_of(net).backward()
    before = net[2].delta.detach().clone()
    late = optimizer_of(deltas, window=4)
    with pytest.raises(RuntimeError, match=r"gradient of '0.delta' must come from a backward pass"):
        late.step()
    assert torch.equal(net[2].delta, before)
