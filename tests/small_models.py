"""Small models and tokenizers made on the spot: no test needs a download."""

import string

import torch
from safetensors.torch import load_file, save_file


def make_tokenizer(folder):
    """A character-level tokenizer with capitalised words and <s>, </s> as special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", *string.printable, "The", "One", "Once"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder)
    return fast


def make_model(folder, model_type="llama", dtype=torch.float32, **settings):
    """A small randomly initialised decoder with norms away from 1, saved with its tokenizer. settings: of its configuration; None drops one of the usual."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(folder)
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "max_position_embeddings": 128, "ffn_dim": 96, "word_embed_proj_dim": 64, "vocab_size": len(tokenizer),
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(1)
    given = {key: value for key, value in (sizes | settings).items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **given))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(4.0 if "embed" in name else 2.0)
    model.to(dtype).save_pretrained(folder)
    return folder


def make_packed(folder, out, **settings):
    """A checkpoint quantized without calibration: 4 bits in groups of 32, settings of QuantizeConfig aside."""
    import normtweak

    settings = {"bits": 4, "group_size": 32, "method": "rtn", "tweak": None} | settings
    normtweak.quantize(folder, out=out, config=normtweak.QuantizeConfig.from_dict(settings))
    return out


def tensors_of(folder):
    """All tensors of a folder by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def edit(folder, name, change):
    """Replace a tensor of a checkpoint by what `change` makes of it."""
    file = next(file for file in folder.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    save_file(tensors | {name: change(tensors[name])}, file, {"format": "pt"})


def scattered(folder):
    """A checkpoint with a linear whose act-order groups are its own, as desc_act gives them."""
    edit(folder, "model.layers.0.mlp.up_proj.g_idx", lambda g_idx: torch.randperm(64, dtype=torch.int32) // 32)
