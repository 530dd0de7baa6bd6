"""normtweak's answers with a checkpoint: `python check_normtweak.py FOLDER`."""

from answers import print_answers


def load(folder):
    """The packed model in float32."""
    import normtweak

    return normtweak.load(folder), normtweak.load_tokenizer(folder)


print_answers(load)
