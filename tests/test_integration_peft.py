"""peft's adapters, and models whose parameters come, go, freeze and change their shapes."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Iterable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import zoopt
from tests.compare import equal

# peft asks transformers for the old name of gradient checkpointing's flag.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
TINY = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "use_cache": False,
}
IDS = torch.randint(1, 32, (4, 12), generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([0, 1, 2, 0])
PERTURBATIONS = ["inplace", "virtual"]


def causal() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))


def classifier() -> nn.Module:
    config = transformers.LlamaConfig(**TINY, num_labels=3)
    return transformers.LlamaForSequenceClassification(config)


@dataclasses.dataclass(frozen=True)
class Method:
    """A peft method, how it learns and by how much the loss falls at least."""

    name: str
    config: Callable[[], peft.PeftConfig]
    lr: float
    zo_eps: float = 1e-2
    steps: int = 80
    falls: float = 0.1
    base: Callable[[], nn.Module] = causal

    def build(self, seed: int = 0) -> peft.PeftModel:
        torch.manual_seed(0)
        base = self.base()
        torch.manual_seed(seed)
        return peft.get_peft_model(base, self.config()).train()

    def loss(self, model: nn.Module) -> Tensor:
        labels = CLASSES if self.base is classifier else IDS
        loss: Tensor = model(input_ids=IDS, labels=labels).loss
        return loss

    def optimizer(self, model: nn.Module, **options: Any) -> zoopt.MeZO:
        # The clip is for AdaLoRA, whose slopes grow by orders of magnitude on the way.
        options = {"lr": self.lr, "zo_eps": self.zo_eps, "max_projected_grad": 2.0, **options}
        return zoopt.MeZO(model.named_parameters(), **{"seed": 7, **options})

    def train(self, model: nn.Module, optimizer: Any, steps: int) -> list[float]:
        return [optimizer.step(lambda: self.loss(model)) for _ in range(steps)]


def lora(**options: Any) -> peft.LoraConfig:
    options = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, **options)


def adalora(**options: Any) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        total_step=1000,
        lora_alpha=256,
        orth_reg_weight=0.1,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
        **options,
    )


LORA = Method("LoRA", lora, lr=4e-3)
# Its three factors begin near 0: little happens at first.
ADALORA = Method("AdaLoRA", adalora, lr=1e-2, steps=130)
METHODS = [
    LORA,
    ADALORA,
    Method(
        "prefix tuning",
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        lr=5e-2,
        zo_eps=1e-1,
    ),
    Method(
        "prompt tuning",
        lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        lr=2e-1,
        zo_eps=1e-1,
    ),
    Method(
        "IA3",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        ),
        lr=5e-2,
    ),
    Method(
        "LoRA classification",
        lambda: lora(
            target_modules=["q_proj", "v_proj"], modules_to_save=["score"], task_type="SEQ_CLS"
        ),
        lr=2e-3,
        falls=0.5,
        base=classifier,
    ),
]
methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
perturbations = pytest.mark.parametrize("perturbation", PERTURBATIONS)


def frozen(model: nn.Module) -> dict[str, Tensor]:
    still = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t.detach().clone() for name, t in [*still.items(), *model.named_buffers()]}


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@perturbations
@methods
def test_learns_with_a_frozen_base(method: Method, perturbation: str) -> None:
    model = method.build()
    before, start = frozen(model), trained(model)
    optimizer = method.optimizer(model, perturbation=perturbation)
    losses = method.train(model, optimizer, method.steps)
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - method.falls
    assert before
    assert equal(frozen(model), before)
    moved = {name for name, p in trained(model).items() if not torch.equal(p, start[name])}
    assert moved == start.keys()
    if method.base is classifier:
        assert any("modules_to_save" in name for name in moved)


@perturbations
@methods
def test_resumes_to_the_bit(method: Method, perturbation: str) -> None:
    """From the adapter's weights and the optimizer's state, over a base that is built anew."""
    options = {"perturbation": perturbation, "momentum": 0.9, "num_probes": 2}
    model = method.build()
    optimizer = method.optimizer(model, **options)
    method.train(model, optimizer, 4)
    file = io.BytesIO()
    rng = torch.get_rng_state()
    torch.save([peft.get_peft_model_state_dict(model), optimizer.state_dict()], file)
    losses = method.train(model, optimizer, 4)

    again = method.build(seed=1)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    peft.set_peft_model_state_dict(again, weights)
    resumed = method.optimizer(again, perturbation=perturbation, lr=0.5, seed=99)
    resumed.load_state_dict(state)
    torch.set_rng_state(rng)
    assert method.train(again, resumed, 4) == losses
    assert equal(trained(again), trained(model))
    assert equal(resumed.state_dict(), optimizer.state_dict())
    assert len(resumed.state) == len(trained(model))


def test_adalora_allocates_no_ranks_without_gradients() -> None:
    """peft takes the ranks' importance from `.grad`: it says so, and nothing has changed."""
    model = ADALORA.build()
    optimizer = ADALORA.optimizer(model)
    ADALORA.train(model, optimizer, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"unsupported operand type.*'NoneType'"):
        model.base_model.update_and_allocate(2)
    assert equal(dict(model.state_dict()), dict(before))


@perturbations
def test_adalora_keeps_to_ranks_that_have_been_allocated(perturbation: str) -> None:
    """Its last phase asks for no gradients: it masks what a first-order run has pruned."""
    model = ADALORA.build()
    names = [name for name in trained(model) if "lora_E" in name]
    model.peft_config["default"].rank_pattern = {
        name.removeprefix("base_model.model."): [True, False, True, False] for name in names
    }
    optimizer = ADALORA.optimizer(model, perturbation=perturbation)
    before = trained(model)
    for step in range(1001, 1011):
        ADALORA.train(model, optimizer, 1)
        model.base_model.update_and_allocate(step)
    for name, p in trained(model).items():
        assert not torch.equal(p, before[name])
        if name in names:
            assert (p.flatten() == 0).tolist() == [False, True, False, True]


def named(model: nn.Module, part: str) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if part in name]


def state_of(optimizer: Any, params: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in params}


@perturbations
def test_an_adapter_that_is_added_joins_the_run(perturbation: str) -> None:
    options = {"perturbation": perturbation, "momentum": 0.9, "lr": 5e-4}
    model = LORA.build()
    optimizer = zoopt.MeZO(named(model, ".default."), zo_eps=1e-2, seed=7, **options)
    losses = LORA.train(model, optimizer, 20)
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["default", "second"])
    first, second = named(model, ".default."), named(model, ".second.")
    kept = state_of(optimizer, first)
    optimizer.add_param_group({"params": second})
    assert [group["step"] for group in optimizer.param_groups] == [20, 20]
    assert equal(state_of(optimizer, first), kept)
    before = trained(model)
    losses += LORA.train(model, optimizer, 60)
    assert all(not torch.equal(p, before[name]) for name, p in first + second)
    assert sum(losses[-10:]) < sum(losses[:10]) - 1.0
    assert len(optimizer.state) == len(first) + len(second)

    # Adapters of one model take turns: the one that rests keeps its weights and its state.
    model.set_adapter("second")
    resting = copy.deepcopy(([p for _, p in first], state_of(optimizer, first)))
    moving = trained(model)
    LORA.train(model, optimizer, 2)
    assert equal(([p for _, p in first], state_of(optimizer, first)), resting)
    assert moving.keys() == {name for name, _ in second}
    assert not any(torch.equal(p, moving[name]) for name, p in second)


@perturbations
def test_deleting_an_adapter_does_not_disturb_the_others(perturbation: str) -> None:
    options = {"perturbation": perturbation, "zo_eps": 1e-2, "lr": 5e-4, "seed": 7}
    model = LORA.build()
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["default", "second"])
    optimizer = zoopt.MeZO(named(model, "lora_"), **options)
    LORA.train(model, optimizer, 3)
    model.delete_adapter("second")
    twin = copy.deepcopy(model)
    rng = torch.get_rng_state()
    LORA.train(model, optimizer, 3)

    alone = zoopt.MeZO(named(twin, ".default."), **options)
    alone.param_groups[0].update(step=3, draw=3)
    torch.set_rng_state(rng)
    LORA.train(twin, alone, 3)
    assert equal(trained(model), trained(twin))
    assert optimizer.last_step == alone.last_step


def test_merged_adapters_are_missed() -> None:
    """Virtually with an error; in place the loss does not depend on them, hence no update."""
    for perturbation in PERTURBATIONS:
        model = LORA.build().eval()
        optimizer = LORA.optimizer(model, perturbation=perturbation)
        LORA.train(model, optimizer, 2)
        merged = model.merge_and_unload()
        before = copy.deepcopy(merged.state_dict())
        if perturbation == "virtual":
            with pytest.raises(RuntimeError, match="read none of the optimizer's parameters"):
                LORA.train(merged, optimizer, 1)
        else:
            LORA.train(merged, optimizer, 1)
            assert optimizer.last_step is not None
            assert optimizer.last_step.projected_grads == (0.0,)
        assert equal(dict(merged.state_dict()), dict(before))


@perturbations
def test_parameters_freeze_and_thaw_with_their_state(perturbation: str) -> None:
    model = LORA.build()
    optimizer = LORA.optimizer(model, perturbation=perturbation, momentum=0.9, lr=2e-4)
    LORA.train(model, optimizer, 2)
    norms, adapters = named(model, "norm"), named(model, "lora_")
    assert len(optimizer.state) == len(adapters)
    for _, p in norms:
        p.requires_grad_(True)
    before = trained(model)
    LORA.train(model, optimizer, 2)
    assert not any(torch.equal(p, before[name]) for name, p in norms)
    assert len(optimizer.state) == len(adapters) + len(norms)
    for _, p in norms:
        p.requires_grad_(False)
    kept = copy.deepcopy(([p for _, p in norms], state_of(optimizer, norms)))
    LORA.train(model, optimizer, 2)
    assert equal(([p for _, p in norms], state_of(optimizer, norms)), kept)


def test_a_checkpoint_is_refused_over_resized_embeddings() -> None:
    model = causal()
    optimizer = LORA.optimizer(model, momentum=0.9)
    LORA.train(model, optimizer, 1)
    saved = optimizer.state_dict()
    model.resize_token_embeddings(40, mean_resizing=False)
    anew = LORA.optimizer(model, momentum=0.9)
    with pytest.raises(ValueError, match=r"parameters of the same shapes, \[\[40, 32\]"):
        anew.load_state_dict(saved)
    assert not anew.state
    # The new optimizer is the way on.
    before = trained(model)
    LORA.train(model, anew, 1)
    assert not any(torch.equal(p, before[name]) for name, p in trained(model).items())


@perturbations
def test_a_parameter_that_shrinks_outgrows_its_state(perturbation: str) -> None:
    model = LORA.build()
    optimizer = LORA.optimizer(model, perturbation=perturbation, momentum=0.9)
    LORA.train(model, optimizer, 1)
    for _, p in named(model, "lora_A"):
        p.data = p.data[:2].clone()
    for _, p in named(model, "lora_B"):
        p.data = p.data[:, :2].clone()
    before, state = trained(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"of shape \(2, 32\) must be .* got .* \(4, 32\)"):
        LORA.train(model, optimizer, 1)
    assert equal([trained(model), optimizer.state_dict()], [before, state])

    for _, p in named(model, "lora_"):
        optimizer.state.pop(p)
    LORA.train(model, optimizer, 1)
    assert not any(torch.equal(p, before[name]) for name, p in trained(model).items())
    assert optimizer.param_groups[0]["step"] == 2
