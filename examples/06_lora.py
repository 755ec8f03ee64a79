"""LoRA adapters of a peft model, trained with forward passes; the base model does not change.

The optimizer takes all of the model's parameters. It perturbs and updates only those that require a
gradient, which are the adapters. The model is a tiny LLaMA with random weights that learns one
sequence by heart.
"""

from __future__ import annotations

import peft
import torch
import transformers

import zoopt


def build() -> peft.PeftModel:
    """Build a tiny LLaMA with LoRA adapters on its attention and feed-forward layers."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        use_cache=False,
    )
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)


def main(steps: int = 500) -> dict[str, float]:
    """Train for `steps` steps; return the loss before and after and the sizes involved.

    `changed_base_weights` counts the elements of the base model that have changed.
    """
    torch.manual_seed(0)
    model = build()
    tokens = torch.randint(32, (1, 16))
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = zoopt.MeZO(model.named_parameters(), lr=2e-3, zo_eps=1e-2)

    def closure() -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    with torch.no_grad():
        before = closure().item()
    for _ in range(steps):
        optimizer.step(closure)
    with torch.no_grad():
        after = closure().item()

    now = dict(model.named_parameters())
    return {
        "loss_before": before,
        "loss": after,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "frozen": sum(p.numel() for p in base.values()),
        "changed_base_weights": sum(int((now[name] != p).sum()) for name, p in base.items()),
    }


if __name__ == "__main__":
    figures = main()
    print(f"loss {figures['loss_before']:.3f} -> {figures['loss']:.3f}")
    print(f"{figures['trained']:,} adapter weights trained")
    print(f"{figures['changed_base_weights']} of {figures['frozen']:,} base weights changed")
