"""Fold LoRA updates into model weights, and take them out again."""
