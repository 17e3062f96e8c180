"""An instance knows its GPUs by the names that NVIDIA's tools give them."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest
import torch

from tests.power.fake_nvml import UUIDS, FakeGpu, FakeNvml
from twolane.connector.gpus import gpu_uuids

BARE = [uuid.removeprefix("GPU-") for uuid in UUIDS]  # as torch has them


@pytest.fixture
def two_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of two visible GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda rank: SimpleNamespace(uuid=BARE[rank]))


def test_a_machine_without_gpus_names_none() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    assert gpu_uuids(2) == []


@pytest.mark.usefixtures("two_visible")
@pytest.mark.parametrize("visible", [None, "0,1", f"{UUIDS[0]}, {UUIDS[1]}", "GPU-0,GPU-1"])
def test_each_rank_has_the_visible_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    """How CUDA_VISIBLE_DEVICES names them is torch's to read."""
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_uuids(1) == [UUIDS[0]]
    assert gpu_uuids(2) == list(UUIDS)
    assert gpu_uuids(4) == list(UUIDS), "as far as this process sees them"


@pytest.mark.usefixtures("two_visible")
def test_of_a_slice_it_is_the_whole_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"MIG-{UUIDS[1]}/3/0,MIG-11111111-2222-3333-4444-555555555555")
    fake = FakeNvml(FakeGpu(UUIDS[0])).install(monkeypatch)
    fake.nvmlDeviceGetHandleByUUID = {"MIG-11111111-2222-3333-4444-555555555555": "slice"}.__getitem__  # type: ignore[attr-defined]
    fake.nvmlDeviceGetDeviceHandleFromMigDeviceHandle = {"slice": (1, 0)}.__getitem__  # type: ignore[attr-defined]
    assert gpu_uuids(2) == [UUIDS[1], UUIDS[0]]
    assert fake.num_open == 0


@pytest.mark.usefixtures("two_visible")
def test_whatever_goes_wrong_the_instance_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _rank: SimpleNamespace())  # an older torch
    assert gpu_uuids(2) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-11111111-2222-3333-4444-555555555555")
    fake = FakeNvml().install(monkeypatch)

    def unknown(uuid: str) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    fake.nvmlDeviceGetHandleByUUID = unknown  # type: ignore[attr-defined]
    assert gpu_uuids(1) == []
    assert fake.num_open == 0
