import json
import logging

import pytest
import torch

from normtweak_kernels import tuning
from normtweak_kernels.launch import DEQUANT_GEMM_GPU, DequantGemvGpu, nearest_architecture

CONFIGS = DequantGemvGpu(num_warps=8, chunks=2), DequantGemvGpu(num_warps=4, chunks=1)


class TooLarge(Exception):
    pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Some GPU/{index}")
    for cached in (tuning._file, tuning._read):
        cached.cache_clear()
    yield tmp_path / "normtweak" / "launch"
    for cached in (tuning._file, tuning._read):
        cached.cache_clear()


def test_a_choice_is_found_again_by_its_gpu_and_its_name(cache):
    name = tuning.key("op", "gemv", M=1, N=64)
    assert tuning.chosen(name, CONFIGS, 0) is None
    file = tuning.note({name: CONFIGS[1]}, 0)
    assert file == cache / "Some-GPU-0.json"
    tuning.note({"other": CONFIGS[0]}, 0)
    tuning._read.cache_clear()
    assert tuning.chosen(name, CONFIGS, 0) == CONFIGS[1]
    assert tuning.chosen("other", CONFIGS, 0) == CONFIGS[0]
    assert tuning.chosen(name, CONFIGS, 1) is None
    assert tuning.chosen(name, CONFIGS, None) is None
    assert [path.name for path in cache.iterdir()] == [file.name]


def test_what_is_no_longer_in_the_list_is_not_launched(cache):
    tuning.note({"name": CONFIGS[1]}, 0)
    assert tuning.chosen("name", CONFIGS[:1], 0) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"name": 3}'])
def test_a_file_that_is_none_of_ours_changes_nothing(cache, caplog, content):
    cache.mkdir(parents=True)
    (cache / "Some-GPU-0.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert tuning.chosen("name", CONFIGS, 0) is None
    assert ("can't be read" in caplog.text) == (content == "{")
    tuning.note({"name": CONFIGS[0]}, 0)
    assert json.loads((cache / "Some-GPU-0.json").read_text())["name"] == {"num_warps": 8, "chunks": 2}


def test_a_write_that_fails_leaves_what_was_there(cache, monkeypatch):
    tuning.note({"name": CONFIGS[0]}, 0)
    monkeypatch.setattr(tuning.os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tuning.note({"name": CONFIGS[1]}, 0)
    assert tuning.chosen("name", CONFIGS, 0) == CONFIGS[0]
    assert len(list(cache.iterdir())) == 1


def test_the_fastest_that_fits_is_taken():
    def run(config):
        if config == CONFIGS[0]:
            raise TooLarge
        return {4: 2.0, 16: 1.0}[config.num_warps]

    def tune(*configs):
        return tuning.tune(configs, run, TooLarge, measure=lambda call: call())

    assert tune(*CONFIGS, DequantGemvGpu(16, 1)) == (DequantGemvGpu(16, 1), 1.0)
    assert tune(*CONFIGS) == (CONFIGS[1], 2.0)
    with pytest.raises(ValueError, match="tune: configs must hold one that fits the GPU, got 1 that don't"):
        tune(CONFIGS[0])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("sm_80", "sm_80"),
        ("sm_87", "sm_86"),
        ("sm_90", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("gfx90a", "gfx942"),
        ("gfx950", "gfx942"),
    ],
)
def test_an_architecture_without_a_list_takes_its_forerunners(name, nearest):
    assert nearest_architecture(name, DEQUANT_GEMM_GPU) == nearest


@pytest.mark.parametrize(("num_warps", "chunks"), [(0, 1), (3, 1), (64, 1), (4, 0), (4, 3), (4, 16)])
def test_launches_are_checked(num_warps, chunks):
    with pytest.raises(ValueError, match="DequantGemvGpu: (num_warps|chunks) must be a power of two of at most"):
        DequantGemvGpu(num_warps, chunks)
