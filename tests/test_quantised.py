"""Quantised layers: codes, the gradient of scales, PEQA, QZO, and MeZO over LoRA on 4 bits."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import zoopt
from zoopt.nn import QuantisedLinear, convert_to_quantised, train_scales
from zoopt.nn.packing import pack, unpack
from zoopt.nn.quantised import quantise

FORMS = [(bits, form) for bits in (3, 4, 8) for form in ("linear", "log")]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 7, bias=False)).to(dtype)
    with torch.no_grad():
        for number, param in enumerate(net.parameters()):
            param.copy_(normal(*param.shape, seed=number) / 4)
    return net


def loss_of(net: nn.Module) -> torch.Tensor:
    dtype = next(net.parameters()).dtype
    x, y = normal(16, 20, seed=8).to(dtype), normal(16, 7, seed=9).to(dtype)
    return (net(x) - y).square().mean()


@given(st.sampled_from([3, 4, 8]), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_codes_are_packed_without_loss(bits: int, m: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (m, n), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (m, -(-n // 8) * bits)
    assert torch.equal(unpack(packed, n, bits), codes)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_weight_is_off_by_half_a_scale(bits: int) -> None:
    """Or, at the ends, by the rounding of the zero point too: another half."""
    weight = normal(9, 50)
    weight[2, 16:32] = 0.0
    weight[3, :16] = weight[3, :16].abs() + 1.0  # 0 is in the range all the same
    codes, scale, zero = quantise(weight, bits, 16)
    assert scale.shape == zero.shape == (9, 4)
    assert bool((scale > 0).all())
    wide = scale.repeat_interleave(16, 1)[:, :50]
    again = wide * (codes.double() - zero.double().repeat_interleave(16, 1)[:, :50])
    assert bool(((again - weight).abs() <= wide * (1 + 1e-12)).all())
    assert float(((again - weight).abs() <= wide * (0.5 + 1e-12)).double().mean()) > 0.95
    assert not again[2, 16:32].any()


@pytest.mark.parametrize(("bits", "form"), FORMS)
def test_forward_and_gradients_are_autograds(bits: int, form: Any) -> None:
    """Against the same weight made of the scales by autograd, in float64."""
    layer = QuantisedLinear(
        normal(33, 50), nn.Parameter(normal(33, seed=3)), bits=bits, group_size=16, form=form
    )
    x = normal(2, 5, 50, seed=4).requires_grad_()
    leaf = layer.scale.detach().clone().requires_grad_()
    scale = leaf.exp() if form == "log" else leaf
    q = (
        unpack(layer.codes, 50, bits).double()
        - layer.zero.double().repeat_interleave(16, 1)[:, :50]
    )
    weight = scale.repeat_interleave(16, 1)[:, :50] * q
    torch.testing.assert_close(layer.materialise(), weight.detach(), rtol=1e-14, atol=0)
    out, own = layer(x), x.detach().clone().requires_grad_()
    expected = nn.functional.linear(own, weight, layer.bias.detach())
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    out.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(layer.scale.grad, leaf.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, own.grad, rtol=1e-10, atol=1e-10)
    assert layer.bias.grad is not None


def test_bytes_of_a_layer() -> None:
    """bits / 8 of a weight; float32 scale and one byte of zero point of a group."""
    for bits in (3, 4, 8):
        layer = QuantisedLinear(normal(64, 128, dtype=torch.bfloat16), bits=bits)
        held = [*layer.parameters(), *layer.buffers()]
        assert sum(tensor.nbytes for tensor in held) == 64 * 128 * bits // 8 + 64 * 2 * 5
        assert layer.scale.dtype == torch.float32
        assert layer(normal(3, 128, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.to(torch.bfloat16).scale.dtype == torch.float32
    assert layer.double().scale.dtype == torch.float64


def test_a_move_keeps_the_dtype() -> None:
    """That of the original weight, whose merged layer has it; a conversion changes it."""
    whole, beyond = (QuantisedLinear(normal(9, 16), group_size=size) for size in (16, 10**12))
    assert beyond.group_size == 16
    assert torch.equal(beyond.materialise(), whole.materialise())
    layer = QuantisedLinear(normal(9, 16, dtype=torch.bfloat16), bits=4, group_size=8)
    for move in (lambda: layer.to("cpu"), layer.share_memory, lambda: layer.to_empty(device="cpu")):
        assert move().dtype == torch.bfloat16
    assert layer.merge().weight.dtype == torch.bfloat16
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        assert layer.to(dtype).dtype == dtype
        assert layer.scale.dtype == torch.float32
    assert layer.double().dtype == layer.scale.dtype == torch.float64


@pytest.mark.parametrize(
    "build",
    [
        lambda params: zoopt.AdamW(params, lr=1e-3),
        lambda params: zoopt.SM3(params, lr=1e-2),
        lambda params: zoopt.GaLoreAdamW(params, lr=1e-2, rank=1, seed=0),
        lambda params: torch.optim.SGD(params, lr=1e-2),
    ],
    ids=["adamw", "sm3", "galore", "sgd"],
)
def test_peqa(build: Any) -> None:
    """Only scales move, the loss falls, and codes keep every bit."""
    net = convert_to_quantised(model(), lambda name, module: True, bits=4, group_size=8)
    before = copy.deepcopy(net.state_dict())
    optimizer = build(train_scales(net))
    start = loss_of(net).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
    assert loss_of(net).item() < 0.9 * start
    moved = {
        name for name, value in net.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == {"0.scale", "2.scale"}


@pytest.mark.parametrize("perturbation", ["inplace", "virtual"])
def test_qzo(perturbation: Any) -> None:
    """Zeroth-order on log scales: positive at any rate, clipped, codes bit-identical; resumes."""

    def build() -> tuple[nn.Module, Any]:
        net = convert_to_quantised(
            model(), lambda name, module: True, bits=4, group_size=8, form="log"
        )
        params = train_scales(net)
        return net, zoopt.MeZO(
            params,
            lr=1e-2,
            zo_eps=1e-3,
            max_projected_grad=100.0,
            perturbation=perturbation,
            num_probes=4,
            seed=0,
        )

    net, optimizer = build()
    before = copy.deepcopy(net.state_dict())
    start = loss_of(net).item()
    for step in range(120):
        if step == 60:
            file = io.BytesIO()
            torch.save([net.state_dict(), optimizer.state_dict()], file)
        optimizer.step(lambda: loss_of(net))
    assert loss_of(net).item() < 0.9 * start
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) is (not name.endswith("scale")), name
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other, resumed = build()
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for _ in range(60):
        resumed.step(lambda: loss_of(other))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    # A rate at which plain scales would change their sign.
    for group in resumed.param_groups:
        group["lr"] = 1.0
    for _ in range(5):
        resumed.step(lambda: loss_of(other))
    assert all(not bool((m.scale.exp() < 0).any()) for m in other.modules() if hasattr(m, "scale"))


def test_mezo_over_lora_on_four_bits() -> None:
    """MeZO with a hand-written LoRA over a 4-bit base: the loss falls, the base keeps its bits."""

    class Adapted(nn.Module):
        """A LoRA beside a frozen layer."""

        def __init__(self, base: nn.Module, rank: int = 2) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.down = nn.Parameter(normal(rank, 20, seed=5, dtype=torch.float32) / 4)
            self.up = nn.Parameter(torch.zeros(33, rank))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.base(x) + x @ self.down.T @ self.up.T
            return out

    net = convert_to_quantised(model(), lambda name, module: True, bits=4, group_size=8)
    net[0] = Adapted(net[0])
    net[2].requires_grad_(False)
    before = copy.deepcopy(net[0].base.state_dict())
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    assert {name for name, _ in trained} == {"0.down", "0.up"}
    optimizer = zoopt.MeZO(trained, lr=2e-2, zo_eps=1e-3, num_probes=4, seed=0)
    start = loss_of(net).item()
    for _ in range(150):
        optimizer.step(lambda: loss_of(net))
    assert loss_of(net).item() < 0.9 * start
    assert all(torch.equal(v, before[n]) for n, v in net[0].base.state_dict().items())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(normal(3, 8, 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(torch.tanh(x @ self.up[e].T) for e in range(3))


@pytest.mark.parametrize("form", ["linear", "log"])
def test_experts(form: Any) -> None:
    """Quantised as layers of their own would be; gradients of scales; merged weights."""
    net = nn.Sequential(Experts())
    dense = net[0].up.detach().clone()
    convert_to_quantised(net, lambda name, module: True, bits=4, group_size=8, form=form)
    alone = [QuantisedLinear(matrix, bits=4, group_size=8, form=form) for matrix in dense]
    assert torch.equal(net[0].up, torch.stack([layer.materialise() for layer in alone]))
    [(_, scale)] = train_scales(net)
    x = normal(6, 20, seed=2)
    net(x).square().sum().backward()
    sum(torch.tanh(layer(x)) for layer in alone).square().sum().backward()
    own = torch.cat([layer.scale.grad for layer in alone])
    torch.testing.assert_close(scale.grad, own, rtol=1e-10, atol=1e-10)
    before = net(x)
    assert torch.equal(zoopt.nn.merge(net)(x), before)
    assert type(net[0]) is Experts


def test_merge_and_refusals() -> None:
    net = convert_to_quantised(model(), lambda name, module: True, bits=3)
    before = loss_of(net)
    assert torch.equal(loss_of(zoopt.nn.merge(net)), before)
    with pytest.raises(ValueError, match="model must have quantised layers, got none"):
        train_scales(net)
    for bad, message in (
        ({"bits": 5}, "bits must be one of 3, 4, 8, got 5"),
        ({"group_size": 0}, "group_size must be a positive int, got 0"),
        ({"form": "square"}, "form must be one of 'linear', 'log', got 'square'"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_to_quantised(model(), **bad)
