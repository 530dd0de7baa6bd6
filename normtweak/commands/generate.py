"""`normtweak generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..terminal import Activations, Device, Model, errors


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of activations: float32, bfloat16, or auto, the faster here.")] = "float32",
    activations: Activations = None,
    device: Device = "auto",
) -> None:
    """Continue a text with MODEL."""
    from .. import models
    from ..activations import compute_dtype, device_of
    from ..text import check_prompt, continue_text

    check_prompt(prompt)
    place = device_of(device)
    precision = compute_dtype(dtype, place)
    tokenizer = models.load_tokenizer(model)
    result = continue_text(
        models.load(model, dtype=precision, device=place, activations=activations),
        tokenizer,
        prompt,
        max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    # as it is, tabs and all
    typer.secho(prompt, bold=True, nl=False)
    typer.echo(result.text)
    errors.out(f"{result.tokens} tokens in {result.seconds:.2f} s: {result.tokens / result.seconds:.1f} tokens/s")
