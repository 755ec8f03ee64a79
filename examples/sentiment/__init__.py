"""The parts of ``examples/finetune_sentiment.py``."""
