"""Calibration text for a small model, as the pipeline asks for it."""

from normtweak import CalibrationConfig, calibration, models
from normtweak.calibration import Author
from normtweak.progress import Silent


def author(folder, **changes):
    model = models.ModelFolder(folder)
    given = {"tokenizer": model.tokenizer, "vocabulary": model.config.vocab_size, "model_type": "llama", "load": lambda: models.load(folder)}
    return Author(**(given | {"identity": model.digest} | changes))


def run(folder, seed=0, **settings):
    config = CalibrationConfig(**({"samples": 5, "length": 20} | settings))
    return calibration.prepare(config, author(folder), seed)(Silent())


def ids(folder, seed=0, **settings):
    return run(folder, seed, **settings).tokens
