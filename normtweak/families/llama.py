"""Llama and what is built like it."""

from . import Family

FAMILY = Family(
    model_types=("llama", "mistral", "qwen2"),
    blocks="model.layers",
)
