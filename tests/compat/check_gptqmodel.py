"""GPTQModel's answers with a checkpoint of format gptq or gptq_v2: `python check_gptqmodel.py FOLDER` in an environment with gptqmodel."""

from pathlib import Path

from answers import print_answers


def load(folder):
    """The model through the kernel in plain torch (the default one for CPUs crashes with a scale per channel), computing in float32.

    The kernel wants to be made for 16 bits, which round what isn't packed on the way: that is read once more.
    """
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model.float()
    stored = {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in stored:
                parameter.copy_(stored[name])
    return model, AutoTokenizer.from_pretrained(folder)


print_answers(load)
