"""A little text for the peers to calibrate on."""

_SENTENCES = (
    "The river runs through the valley, and on its banks the farmers grow wheat, barley and a little flax for the weavers of the town below.",
    "In the beginning the machine could only add; years later somebody taught it to multiply, and after that nothing in the office was the same.",
    "A good library keeps its promises: what it says about its arguments is true, and what it raises when they are wrong can be read in one line.",
    "Water boils at one hundred degrees at the level of the sea, and at fewer in the mountains, where the air above it weighs less than it does here.",
    "She wrote the letter on a Tuesday, folded it twice, and put it into the pocket of a coat that nobody was going to wear before the winter came.",
    "If a number divides two others, it divides their sum and their difference; from that alone follows the oldest algorithm that is still in use.",
    "The committee met in March, in June and again in October, and each time it decided that the matter should be looked at by another committee.",
    "To bake the bread, mix flour, water, salt and yeast, wait until the dough has doubled, fold it, wait again, and heat the oven as far as it goes.",
)
# peers drop short texts, or stop
SENTENCES = [" ".join(_SENTENCES[i:] + _SENTENCES[:i]) for i in range(len(_SENTENCES))]
