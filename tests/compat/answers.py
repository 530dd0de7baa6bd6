"""What is compared between loaders: one prompt's next-token logits and greedy continuation, by whichever engine holds the model.

Imported by the scripts beside it, which run in the peers' own environments: needs torch and transformers alone.
"""

import json
import sys

import torch

PROMPT = "The capital of France is"
NEW_TOKENS = 64


@torch.no_grad()
def answers(model, tokenizer):
    """Greedy ids and the last position's logits for PROMPT."""
    ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    greedy = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
    logits = model(ids).logits[0, -1].float()
    return {"greedy": greedy.tolist(), "logits": logits.tolist()}


def print_answers(load):
    """Load the folder that the command line names and print the answers as one line of JSON, the last one."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    print(json.dumps(answers(*load(sys.argv[1]))))
