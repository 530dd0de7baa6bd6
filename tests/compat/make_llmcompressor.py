"""A 4-bit checkpoint by llm-compressor: `python make_llmcompressor.py FLOAT OUT [--asymmetric]` in an environment with llmcompressor."""

import argparse


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("float")
    parser.add_argument("out")
    parser.add_argument("--asymmetric", action="store_true")
    options = parser.parse_args()
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from calibration import SENTENCES

    model = AutoModelForCausalLM.from_pretrained(options.float, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.float)
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=64, symmetric=not options.asymmetric)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    rows = Dataset.from_list([dict(tokenizer(text)) for text in SENTENCES])
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(model=model, dataset=rows, recipe=recipe, max_seq_length=64, num_calibration_samples=len(SENTENCES))
    model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
