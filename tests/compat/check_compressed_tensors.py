"""Plain transformers' answers with a checkpoint: `python check_compressed_tensors.py FOLDER` in an environment with compressed-tensors (or auto-round, for its own)."""

from answers import print_answers


def load(folder):
    """The model in float32, its weights decompressed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


print_answers(load)
