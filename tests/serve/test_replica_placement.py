"""Replicas and GPUs: shares that pack, memory that suffices, and the CPU for whoever reserved nothing."""

from types import ModuleType

import pytest
import torch

from hrs.errors import HRSError
from hrs.export.opening import OpenedModel
from hrs.gpu import GpuProperties
from hrs.training.memory import CUDA_OVERHEAD_BYTES
from serve.app import build
from serve.placement import (
    Placement,
    estimate_replica_bytes,
    place,
    place_replicas,
    replica_device,
    visible_devices,
)
from serve.settings import Settings
from tests.simulated_gpu import GIB, SimulatedGpu, simulated_gpus


def gpu(index: int, free_gib: float) -> GpuProperties:
    free = int(free_gib * GIB)
    return GpuProperties(index=index, name="GPU", total_bytes=24 * GIB, free_bytes=free, capability=(8, 9))


@pytest.mark.parametrize("n_gpus", [1, 2, 3, 8])
@pytest.mark.parametrize("n_replicas", range(1, 10))
def test_shares_pack(n_replicas: int, n_gpus: int) -> None:
    placement = place(n_replicas, GIB, [gpu(index, 20) for index in range(n_gpus)])
    tenants = -(-n_replicas // n_gpus)
    assert placement.gpus == tuple(range(n_gpus))
    assert placement.share * tenants <= 1 < placement.share * (tenants + 1)
    assert placement.share == round(placement.share, 4)  # what Ray can reserve


def test_gpus_without_room_are_left_out() -> None:
    gpus = [gpu(0, 1), gpu(1, 9), gpu(2, 13)]
    assert place(1, 5 * GIB, gpus) == Placement(gpus=(1, 2), share=1.0)
    assert place(2, 5 * GIB, gpus) == Placement(gpus=(1, 2), share=1.0)
    assert place(2, 6 * GIB, [gpu(0, 1), gpu(1, 13)]) == Placement(gpus=(1,), share=0.5)
    with pytest.raises(HRSError, match=r"each of 3 replicas .* about 6\.0 GiB of a GPU, and 1\.0, 9\.0, 13\.0 GiB are"):
        place(3, 6 * GIB, gpus)
    with pytest.raises(HRSError, match=r"^a replica of this model needs .* say --device cpu$"):
        place(1, 20 * GIB, gpus)


def test_devices_are_named_as_the_environment_numbers_them() -> None:
    placement = Placement(gpus=(0, 2), share=1.0)
    assert visible_devices(placement, None) == "0,2"
    assert visible_devices(placement, "5, GPU-12, 7") == "5,7"


def test_the_parent_opens_no_gpu(opened: OpenedModel) -> None:
    settings = Settings(model="m", max_replicas=3)
    with simulated_gpus(SimulatedGpu(), SimulatedGpu()) as cuda:
        assert place_replicas(settings, opened) == Placement(gpus=(0, 1), share=0.5)
        assert place_replicas(settings.model_copy(update={"device": "cpu"}), opened) == Placement(gpus=(), share=0.0)
        assert not cuda.is_initialized() and cuda.calls == []
    with (
        simulated_gpus(SimulatedGpu(used_bytes=16 * GIB - 2**29)),
        pytest.raises(HRSError, match=r"and 0\.5 GiB are free"),
    ):
        place_replicas(settings, opened)
    with simulated_gpus():
        assert place_replicas(settings, opened) == Placement(gpus=(), share=0.0)
        with pytest.raises(HRSError, match="there is no GPU on this machine that torch can use"):
            place_replicas(settings.model_copy(update={"device": "cuda"}), opened)


def test_the_estimate_holds_weights_and_full_slots(opened: OpenedModel) -> None:
    model, n_layers = opened.model, opened.config.model.n_layers
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    keys_and_values = 2 * n_layers * model.max_seq_len * model.d_model * 4
    one, three = (estimate_replica_bytes(model, n_layers, slots) for slots in (1, 3))
    assert three - one == 2 * keys_and_values
    assert one > weights + keys_and_values + CUDA_OVERHEAD_BYTES


def test_who_reserves_no_gpu_uses_the_cpu() -> None:
    with simulated_gpus(SimulatedGpu(), SimulatedGpu()) as cuda:
        for changes in ({}, {"device": "cpu", "gpus_per_replica": 0.5}):
            assert replica_device(Settings(model="m", **changes)) == torch.device("cpu")
        assert cuda.calls == []
    with pytest.raises(HRSError, match="device is cuda and gpus_per_replica is 0"):
        build(Settings(model="m", device="cuda"))


@pytest.mark.parametrize(
    "settings", [{"model": "runs/key"}, {"storage": "here"}, {"memories": "./store"}, {"api_key_file": "keys.txt"}]
)
def test_relative_paths_are_refused_where_replicas_would_read_them(settings: dict[str, str]) -> None:
    with pytest.raises(HRSError, match="replicas have other working directories: give its whole path"):
        build(Settings(**{"model": "m"} | settings))
    for model in ("mlflow:hrs@champion", "mlflow:hrs/1", "v1-tiny@dense_baseline/0", "~/run", "/runs/key", "v1-tiny"):
        build(Settings(model=model))


def test_gpus_that_are_only_numbers_are_no_gpus() -> None:
    """On a machine without a GPU Ray reserves what it was told to have."""
    with simulated_gpus():
        assert replica_device(Settings(model="m", gpus_per_replica=0.5)) == torch.device("cpu")


def test_a_replica_keeps_to_its_share_of_the_gpu() -> None:
    with simulated_gpus(SimulatedGpu(total_bytes=16 * GIB)) as cuda:
        device = replica_device(Settings(model="m", gpus_per_replica=0.25))
        assert device == cuda.tensor_device(0)
        assert cuda.caps[0] == pytest.approx(4 * GIB - CUDA_OVERHEAD_BYTES, rel=1e-6)
        assert replica_device(Settings(model="m", gpus_per_replica=1, device="cuda")) == device


def test_every_replica_gets_a_gpu_of_a_real_ray(ray_local: ModuleType) -> None:
    """Three replicas on the two logical GPUs of the tests' Ray: all start, and each sees one GPU."""
    placement = place(3, GIB, [gpu(0, 20), gpu(1, 20)])

    @ray_local.remote(num_cpus=0, num_gpus=placement.share)
    class Tenant:
        def seen(self) -> str | None:
            import os

            return os.environ.get("CUDA_VISIBLE_DEVICES")

    tenants = [Tenant.remote() for _ in range(3)]
    try:
        seen = ray_local.get([tenant.seen.remote() for tenant in tenants], timeout=120)
    finally:
        for tenant in tenants:
            ray_local.kill(tenant)
    assert sorted(seen) in (["0", "0", "1"], ["0", "1", "1"])
