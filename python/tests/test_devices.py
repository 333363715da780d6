import os
from pathlib import Path

import pytest

from vllm_bridge import versions
from vllm_bridge.errors import BridgeError
from vllm_bridge.memory import GIB
from vllm_bridge.sizing import devices
from vllm_bridge.sizing.devices import Device, named


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("h100", "H100 SXM 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
        ("H100 NVL", "H100 NVL 94GB"),
        ("NVIDIA GH200 480GB", "GH200 96GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("a100 40", "A100 SXM 40GB"),
        ("A10", "A10 24GB"),
        ("a10g", "A10G 24GB"),
        ("Tesla T4", "T4 16GB"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090 24GB"),
        ("rtx4090", "RTX 4090 24GB"),
        ("4090", "RTX 4090 24GB"),
        ("RTX 4070", "RTX 4070 12GB"),
        ("rtx 4070 ti", "RTX 4070 Ti 12GB"),
        ("RTX 4070 Ti SUPER", "RTX 4070 Ti Super 16GB"),
        ("RTX 4060 Ti 16 GB", "RTX 4060 Ti 16GB"),
        ("RTX 3080 12GiB", "RTX 3080 12GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada 48GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Server 96GB"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 96GB"),
        ("NVIDIA GB10", "DGX Spark 128GB"),
        ("orin nano", "Jetson Orin Nano 8GB"),
        ("AMD Instinct MI300X", "MI300X 192GB"),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX 24GB"),
        ("7900 xt", "RX 7900 XT 20GB"),
        ("Intel(R) Data Center GPU Max 1550", "Max 1550 128GB"),
        ("gaudi3", "Gaudi 3 128GB"),
    ],
)
def test_names_are_matched_as_people_and_drivers_write_them(given: str, name: str) -> None:
    assert [device.name for device in named(given)] == [name]


def test_what_is_said_of_a_device() -> None:
    (h100,) = named("H100")
    assert h100.kind == "cuda"
    assert h100.memory == 80 * GIB
    assert h100.capability == (9, 0)
    assert h100.bandwidth == 3.35e12
    assert h100.source == "https://www.techpowerup.com/gpu-specs/"
    (mi300x,) = named("MI300X")
    assert (mi300x.kind, mi300x.memory, mi300x.capability) == ("rocm", 192 * GIB, (9, 4))


def test_error_correction_takes_a_part_of_the_memory() -> None:
    # nvidia-smi of a T4 says 15360 MiB, that of an A10G 23028 MiB.
    assert named("T4")[0].memory == 15360 * 2**20
    assert named("A10G")[0].memory == pytest.approx(23028 * 2**20, rel=0.001)
    assert named("RTX 3090")[0].memory == 24 * GIB


@pytest.mark.parametrize("given", ["2x A10G", "2xA10G", "2 \u00d7 A10G", "A10G x2", "a10g X 2"])
def test_several_of_one(given: str) -> None:
    assert named(given) == named("A10G") * 2


def test_a_list_of_devices() -> None:
    assert [d.name for d in named(["2x L4", "24GiB"])] == ["L4 24GB", "L4 24GB", "24GiB"]
    with pytest.raises(BridgeError) as error:
        named([])
    assert error.value.reason == "invalid_option"


@pytest.mark.parametrize("given", ["24GiB", "24 GiB", "24GB", "24 gb"])
def test_a_size_alone_is_a_device_of_that_size(given: str) -> None:
    assert named(given) == (Device(given, "gpu", 24 * GIB, source=given),)


def test_processors() -> None:
    (cpu,) = named("cpu 64GiB")
    assert (cpu.kind, cpu.memory, cpu.bandwidth) == ("cpu", 64 * GIB, None)
    (cpu,) = named("CPU 1.5 GB, 80GB/s")
    assert (cpu.kind, cpu.memory, cpu.bandwidth) == ("cpu", GIB * 3 // 2, 80e9)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("H1000", "H100"),
        ("NVIDIA RTX 4095", "RTX 4090 24GB"),
        ("MI300Y", "MI300"),
        ("A10H", "A10"),
        ("toaster", None),
        ("", None),
        ("0x A10G", None),
        ("0x", None),
    ],
)
def test_what_is_not_known_is_refused_with_the_nearest(given: str, nearest: str | None) -> None:
    with pytest.raises(BridgeError) as error:
        named(given)
    assert error.value.reason == "invalid_option"
    if nearest is not None:
        assert error.value.details["nearest"].startswith(nearest)
        assert f"Did you mean `{nearest}" in error.value.message
    assert "give the size: `24GiB`" in error.value.message


@pytest.mark.parametrize(
    "given",
    [
        *("", "24", "0GiB", "9" * 400 + "GiB", "cpu 0GiB", "cpu 64GiB 0GB/s", "24GiB\0"),
        *("\u0663x A10G", "999999x H100", "h100,h100", "A" * 10_000),
    ],
    ids=lambda given: given[:16],
)
def test_what_can_be_no_device_is_refused(given: str) -> None:
    with pytest.raises(BridgeError) as refused:
        named(given)
    assert refused.value.reason == "invalid_option"
    assert "give the size" in refused.value.remedy
    assert len(refused.value.message) < 250


@pytest.mark.parametrize("given", [["24GiB", "cpu 8GiB"], ["H100", "MI300X"]])
def test_devices_of_several_kinds_run_no_engine(given: list[str]) -> None:
    with pytest.raises(BridgeError, match="several kinds"):
        named(given)
    assert len(named(["24GiB", "RTX 4090"])) == 2


def test_each_device_of_the_table_is_found_by_its_own_name() -> None:
    table = devices.every()
    assert len(table) >= 60
    assert len({device.name for device in table}) == len(table)
    for device in table:
        assert named(device.name) == (device,)


def test_the_figures_of_the_table_are_of_their_kind() -> None:
    for device in devices.every():
        assert 6 * GIB <= device.memory <= 288 * GIB
        assert device.bandwidth is not None
        assert 1e11 <= device.bandwidth <= 8e12
        assert device.source.startswith("https://")
        if device.kind == "cuda":
            assert device.capability is not None
            assert (7, 0) <= device.capability <= (12, 1)


# -- this machine


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in the place of nvidia-smi, which prints what is in the file that is returned."""
    program, said = tmp_path / "nvidia-smi", tmp_path / "said"
    program.write_text(f"#!/bin/sh\ncat {said}\n", encoding="ascii")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(versions, "is_cpu_build", lambda: False)
    said.write_text(
        "0, GPU-aa, NVIDIA H100 80GB HBM3, 81559, 9.0\n"
        "1, GPU-bb, NVIDIA Something New, 4096, 13.7\n"
        "2, GPU-cc, NVIDIA Thor, [N/A], 11.0\n",
        encoding="ascii",
    )
    return said


def test_this_machines_gpus_are_what_nvidia_smi_says(smi: Path) -> None:
    first, second = devices.here()
    assert first == Device(
        "NVIDIA H100 80GB HBM3", "cuda", 81559 * 2**20, (9, 0), 3.35e12, "nvidia-smi"
    )
    assert second == Device("NVIDIA Something New", "cuda", 4 * GIB, (13, 7), None, "nvidia-smi")


@pytest.mark.parametrize("visible", ["1", "GPU-bb", "GPU-bb,7"])
def test_only_visible_gpus_count(smi: Path, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [device.name for device in devices.here()] == ["NVIDIA Something New"]


@pytest.mark.parametrize("said", ["", "NVIDIA-SMI has failed\n"])
def test_without_gpus_it_is_the_processor(smi: Path, said: str) -> None:
    smi.write_text(said, encoding="ascii")
    (cpu,) = devices.here()
    assert cpu.kind == "cpu"
    assert 0 < cpu.memory < 2**50


def test_a_vllm_for_processors_does_not_look_for_gpus(
    smi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "is_cpu_build", lambda: True)
    assert [device.kind for device in devices.here()] == ["cpu"]
