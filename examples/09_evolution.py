"""A language model learns from a reward on its text, without any derivative.

A small GPT-2 with random weights repeats itself. The reward is the share of distinct tokens in the
text that it writes. In every generation, a population of perturbed models writes text in one batch
(`evaluate_batched`), with the library's own model and `generate`. The weights then move towards the
members that scored above average.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

import zoopt

VOCABULARY, WRITTEN = 64, 12
MEMBERS, PROMPTS = 64, 4


def language_model() -> transformers.GPT2LMHeadModel:
    """Two layers, 28,032 parameters, random weights."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=None,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def main(steps: int = 80) -> dict[str, float]:
    """Train for `steps` generations; return the mean reward before and after."""
    model = language_model()
    prompts = torch.arange(0, VOCABULARY, VOCABULARY // PROMPTS).unsqueeze(1)
    held_out = prompts + 5

    def rewards(prompts: Tensor) -> Tensor:
        """For each prompt, the share of distinct tokens in the text that follows it."""
        texts = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=WRITTEN,
            do_sample=False,
        )
        distinct = [len(set(text[1:])) for text in texts.tolist()]
        return torch.tensor(distinct) / WRITTEN

    def fitness() -> Tensor:
        """Each member's mean reward; a member's prompts are adjacent in the batch."""
        return rewards(prompts.repeat(MEMBERS, 1)).view(MEMBERS, PROMPTS).mean(1)

    before = {
        "reward_before": rewards(prompts).mean().item(),
        "held_out_before": rewards(held_out).mean().item(),
    }
    optimizer = zoopt.EvolutionStrategy(
        model.named_parameters(), lr=0.2, sigma=0.05, population_size=MEMBERS, rank=1, seed=0
    )
    for _ in range(steps):
        optimizer.update(optimizer.evaluate_batched(fitness, examples=PROMPTS))
    return {
        **before,
        "reward": rewards(prompts).mean().item(),
        "held_out": rewards(held_out).mean().item(),
    }


if __name__ == "__main__":
    figures = main()
    print(f"distinct tokens          {figures['reward_before']:.0%} -> {figures['reward']:.0%}")
    print(f"after prompts never seen {figures['held_out_before']:.0%} -> {figures['held_out']:.0%}")
