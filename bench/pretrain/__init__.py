"""First-order methods pre-training at one budget of tokens: `python -m bench.pretrain`."""
