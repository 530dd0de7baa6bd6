"""Fixed seeds, and the models that tests share."""

import pytest
import torch

from small_models import make_model


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """Folder of a small llama in float32, tied embeddings."""
    return make_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def embedded_model():
    """The embedded SmolLM2-135M's folder; where its package is missing the tests that need it fail and say how to install it."""
    from normtweak import models

    return models.resolve(models.EMBEDDED)
