import pytest
import torch
from torch import nn

from normtweak import models
from normtweak.activations import BlockCalls, Stream, compute_dtype, embed_all
from small_models import make_model

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gpt_neox": {},
    "opt": {},
    "phi3": {},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "glm4": {},
    "gpt2": {},
    "openai-gpt": {},
    "bloom": {},
    "falcon": {"head_dim": None, "num_key_value_heads": None, "alibi": True},
    "mixtral": {"num_local_experts": 4},
}
# Their final norm, and whatever else comes before the output head.
HEADS = {"llama": {}, "gemma2": FAMILIES["gemma2"], "gpt2": {}, "bloom": {}, "opt": {"word_embed_proj_dim": 32}, "cohere": {}}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("batch_size", [2, 3])
def test_blocks_in_turn_give_what_the_model_gives(tmp_path, model_type, batch_size):
    folder = make_model(tmp_path, model_type, **FAMILIES[model_type])
    model = models.load(folder)
    blocks = model.get_submodule(models.block_path(model))
    tokens = torch.randint(2, 90, (5, 24))
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
        stream = Stream(embed_all(calls := BlockCalls(model, blocks), tokens, batch_size), calls, batch_size, torch.float32)
        torch.testing.assert_close(stream.hidden, expected[0])
        last = []
        handle = blocks[-1].register_forward_hook(lambda module, args, output: last.append(output if isinstance(output, torch.Tensor) else output[0]))
        model(input_ids=tokens, use_cache=False)
        handle.remove()
        for index, block in enumerate(blocks):
            stream = stream.moved(stream.through(block, index))
            torch.testing.assert_close(stream.hidden, [*expected[: len(blocks)], *last][index + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", HEADS)
def test_what_leaves_the_blocks_reaches_the_head(tmp_path, model_type):
    model = models.load(make_model(tmp_path, model_type, **HEADS[model_type]))
    blocks = model.get_submodule(models.block_path(model))
    tokens = torch.randint(2, 90, (4, 24))
    head, seen = model.get_output_embeddings(), []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
        calls = BlockCalls(model, blocks)
        stream = Stream(embed_all(calls, tokens, 2), calls, 2, torch.float32)
        for index, block in enumerate(blocks):
            stream = stream.moved(stream.through(block, index))
        for rows in stream.starts():
            calls.leave(tokens[rows], stream.hidden[rows], head)
        handle.remove()
        expected, *parts = seen
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-4)
        # nothing stays behind: the model runs as before
        assert torch.equal(model(tokens, use_cache=False).logits, logits)


class TupleModel(nn.Module):
    """Blocks give tuples, as older families' do."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(TupleBlock() for _ in range(3))

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, shift=2.0)[0]
        return x


class TupleBlock(nn.Module):
    def forward(self, x, shift):
        return (x + shift, None)


def test_blocks_that_give_tuples():
    model = TupleModel()
    tokens = torch.randint(0, 10, (3, 5))
    calls = BlockCalls(model, model.blocks)
    stream = Stream(embed_all(calls, tokens, 2), calls, 2, torch.float32)
    for index, block in enumerate(model.blocks):
        stream = stream.moved(stream.through(block, index))
    torch.testing.assert_close(stream.hidden, model(tokens))


def test_a_model_that_skips_blocks_is_refused():
    model = TupleModel()
    model.forward = lambda input_ids, use_cache: model.blocks[0](model.embed(input_ids))
    with pytest.raises(ValueError, match="activations: the model must call each of its 3 blocks once, got 1 calls"):
        BlockCalls(model, model.blocks).embed(torch.zeros(1, 4, dtype=torch.int64))
    assert type(model.blocks[0]).forward is TupleBlock.forward
    assert "forward" not in vars(model.blocks[0])


def test_compute_dtype():
    assert compute_dtype("float32") == torch.float32
    assert compute_dtype("bfloat16") == torch.bfloat16
    assert compute_dtype("auto") in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="compute_dtype: name must be auto, float32 or bfloat16, got fp32"):
        compute_dtype("fp32")


class PositionalModel(nn.Module):
    """Blocks are given a positional argument, which depends on the tokens where `watching`."""

    def __init__(self, watching):
        super().__init__()
        self.embed, self.watching = nn.Embedding(10, 4), watching
        self.blocks = nn.ModuleList(PositionalBlock() for _ in range(2))

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, self.embed(input_ids) if self.watching else torch.ones(4))
        return x


class PositionalBlock(nn.Module):
    def forward(self, x, shift):
        return x + shift


def test_positional_arguments_are_repeated():
    model = PositionalModel(watching=False)
    tokens = torch.randint(0, 10, (4, 5))
    calls = BlockCalls(model, model.blocks)
    stream = Stream(embed_all(calls, tokens, 2), calls, 2, torch.float32)
    for index, block in enumerate(model.blocks):
        stream = stream.moved(stream.through(block, index))
    torch.testing.assert_close(stream.hidden, model(tokens))


def test_arguments_that_depend_on_the_tokens_are_refused():
    model = PositionalModel(watching=True)
    with pytest.raises(ValueError, match="activations: a block's arguments must not depend on the tokens"):
        embed_all(BlockCalls(model, model.blocks), torch.arange(10).view(2, 5), 1)
