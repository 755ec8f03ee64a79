"""Quantised layers of torchao and bitsandbytes: adopted, trained, and with a delta beside them.

Both run on the CPU.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import zoopt
from zoopt.nn import QuantisedLinear, adopt_quantised, convert_to_sparse_delta, train_scales

with warnings.catch_warnings():
    # torchao and what it imports use names that torch has deprecated.
    warnings.simplefilter("ignore")
    import bitsandbytes
    import torchao.quantization as torchao


def float_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))


def loss_of(net: nn.Module) -> torch.Tensor:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    return (net(x) - torch.sin(3 * x)).square().mean()


def bnb(kind: str, **options: Any) -> nn.Sequential:
    net = float_model()
    for number in (0, 2):
        old = net[number]
        cls = bitsandbytes.nn.Linear8bitLt if kind == "int8" else bitsandbytes.nn.Linear4bit
        own: Any = {"has_fp16_weights": False, "threshold": 0.0}
        if kind != "int8":
            own = {"quant_type": kind, "compute_dtype": torch.float32, **options}
        new = cls(old.in_features, old.out_features, **own)
        new.load_state_dict(old.state_dict())
        net[number] = new
    return net.to("cpu")


def ao(config: Any) -> nn.Sequential:
    net = float_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao.quantize_(net, config)
    return net


def intx(bits: int, **options: Any) -> nn.Sequential:
    granularity = torchao.PerGroup(32)
    dtype = getattr(torch, f"int{bits}")
    return ao(torchao.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity, **options))


MODELS: dict[str, Any] = {
    "bitsandbytes nf4": lambda: bnb("nf4"),
    "bitsandbytes nf4 not nested": lambda: bnb("nf4", compress_statistics=False),
    "bitsandbytes fp4": lambda: bnb("fp4"),
    "bitsandbytes int8": lambda: bnb("int8"),
    "torchao int4": lambda: intx(4),
    "torchao int3": lambda: intx(3),
    "torchao int8 groups": lambda: intx(8),
    "torchao int4 with zero points": lambda: intx(4, mapping_type=torchao.MappingType.ASYMMETRIC),
    "torchao int8 rows": lambda: ao(torchao.Int8WeightOnlyConfig()),
}


def own_weight(layer: Any, name: str) -> torch.Tensor:
    """The weight by the package's own function."""
    if name.startswith("torchao"):
        return layer.weight.dequantize()
    if name.endswith("int8"):
        return layer.weight.data.float() * (layer.weight.SCB / 127.0).unsqueeze(1)
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("form", ["linear", "log"])
@pytest.mark.parametrize("name", MODELS)
def test_adopted_layers_have_the_same_weights_and_train(name: str, form: Any) -> None:
    """To the rounding of one product; then PEQA lowers the loss, and codes keep their bits."""
    net = MODELS[name]()
    weights = [own_weight(net[number], name) for number in (0, 2)]
    bias = net[0].bias
    assert adopt_quantised(net, form=form) is net
    for number, weight in zip((0, 2), weights, strict=True):
        assert type(net[number]) is QuantisedLinear
        # A rounding of e^log s is 2^-23 |log s|, with |log s| < 8; of a product 2^-24.
        relative = 2.0**-19 if form == "log" else 2.0**-22
        torch.testing.assert_close(net[number].materialise(), weight, rtol=relative, atol=0.0)
    assert net[0].bias is bias
    before = copy.deepcopy(net.state_dict())
    optimizer = zoopt.AdamW(train_scales(net), lr=5e-2 if form == "log" else 2e-3)
    start = loss_of(net).item()
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
    assert loss_of(net).item() < 0.95 * start
    moved = {n for n, v in net.state_dict().items() if not torch.equal(v, before[n])}
    assert moved == {"0.scale", "2.scale"}
    mezo = zoopt.MeZO(train_scales(net), lr=1e-6, max_projected_grad=100.0, seed=0)
    mezo.step(lambda: loss_of(net))
    if "bitsandbytes" in name and "int8" not in name:
        with pytest.raises(ValueError, match="model must have layers of integer codes, got none"):
            zoopt.QES(net, lr=1.0)
    else:
        zoopt.QES(net, lr=1e-3, seed=0).step(lambda: loss_of(net))


@pytest.mark.parametrize("name", MODELS)
def test_a_sparse_delta_beside_them(name: str) -> None:
    """The layer's outputs at first; the loss falls; afterwards the layers are as before."""
    net = MODELS[name]()
    weights = [own_weight(net[number], name).clone() for number in (0, 2)]
    layers = [net[0], net[2]]
    optimizer = zoopt.SparseDeltaAdamW(
        convert_to_sparse_delta(net, density=0.1), lr=1e-2, update_gap=4, window=3, seed=0
    )
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.linear(x, weights[0], layers[0].bias)
    torch.testing.assert_close(net[0](x), expected, rtol=1e-5, atol=1e-6)
    start = loss_of(net).item()
    for _ in range(12):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
    assert loss_of(net).item() < 0.9 * start
    zoopt.nn.remove_sparse_delta(net)
    for number, layer, weight in zip((0, 2), layers, weights, strict=True):
        assert net[number] is layer
        assert torch.equal(own_weight(layer, name), weight)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="model must have quantised layers of torchao or bitsandb"):
        adopt_quantised(float_model())
    fresh = bitsandbytes.nn.Linear4bit(64, 8)
    with pytest.raises(ValueError, match="4-bit layer of bitsandbytes must be quantised, got one"):
        adopt_quantised(nn.Sequential(fresh))
    uneven = nn.Sequential(bitsandbytes.nn.Linear4bit(96, 8, quant_type="nf4")).to("cpu")
    with pytest.raises(ValueError, match="blocks must divide a row of 96 weights, got blocks of"):
        adopt_quantised(uneven)
    with pytest.raises(ValueError, match=r"got a bare Linear4bit; wrap it in nn.Sequential"):
        adopt_quantised(bnb("nf4")[0], lambda name, module: True)
    for made in (MODELS["torchao int4"](), bnb("nf4"), bnb("int8")):
        with pytest.raises(
            TypeError, match=r"got '0.weight', which is quantised; .*adopt_quantised"
        ):
            zoopt.nn.convert_to_quantised(made)
    floating = bitsandbytes.nn.Linear8bitLt(64, 8)
    with pytest.raises(ValueError, match="8-bit layer of bitsandbytes must be quantised, got a w"):
        adopt_quantised(nn.Sequential(floating))
