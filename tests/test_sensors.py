"""Sensors of throttling and of other work, read from made-up trees of /sys and /proc."""

import json
import os
import stat
from pathlib import Path

import pytest

from edgeft.profiles.sensors import swap_and_steal, throttle_state, throttled

CPU = "sys/devices/system/cpu"
PI = "sys/devices/platform/soc/soc:firmware/get_throttled"


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def states(root: Path, before: dict[str, object], after: dict[str, object]) -> list[str]:
    """What is said between two states of a tree; both go through JSON, as in a report."""
    found = [
        json.loads(json.dumps(throttle_state(tree(root, files), tools=False))) for files in (before, after)
    ]
    return throttled(*found)


def put_on_path(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def policy(
    number: int, now: int, cap: int, highest: int, driver: str = "cpufreq-dt", governor: str = "performance"
):
    folder = f"{CPU}/cpufreq/policy{number}"
    return {
        f"{folder}/scaling_cur_freq": now * 1000,
        f"{folder}/scaling_max_freq": cap * 1000,
        f"{folder}/cpuinfo_max_freq": highest * 1000,
        f"{folder}/scaling_driver": driver,
        f"{folder}/scaling_governor": governor,
    }


def test_a_box_without_sensors_says_so_and_not_that_it_is_well(tmp_path):
    state = throttle_state(tmp_path, tools=False)
    assert state.pop("sensors") == []
    assert set(state.values()) == {None}
    assert throttled(throttle_state(tmp_path, tools=False), throttle_state(tmp_path, tools=False)) == []


def test_this_box_answers_without_error():
    state = throttle_state()
    assert all(state[name] is not None for name in state["sensors"])
    assert isinstance(throttled(state, state), list)


def test_x86_counters_count_between_the_states(tmp_path):
    names = [
        f"{CPU}/cpu{n}/thermal_throttle/{kind}_throttle_count"
        for n in (0, 11)
        for kind in ("core", "package")
    ]
    before = dict(zip(names, (5, 7, 0, 7), strict=True))
    assert throttle_state(tree(tmp_path, before), tools=False)["throttle_events"] == {
        "core": 5,
        "package": 14,
    }
    assert states(tmp_path, before, before) == []
    words = states(tmp_path, before, {names[2]: 3})
    assert words == ["the CPU throttled for heat: 3 core events more, over all its CPUs"]


def test_a_counter_that_shows_up_late_is_no_throttling(tmp_path):
    late = {f"{CPU}/cpu0/thermal_throttle/core_throttle_count": 9}
    assert states(tmp_path, {}, late) == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("0", "0", []),
        ("0", "1", ["under-voltage"]),
        ("0", "50000", ["under-voltage", "the CPU was throttled"]),  # both were and are over
        ("50000", "50000", []),  # since boot, before the block
        ("50000", "d0000", ["the soft temperature limit was active"]),
        ("20002", "20000", ["the CPU's frequency was capped"]),  # when the block began
        ("50005", "50005", ["under-voltage", "the CPU was throttled"]),
    ],
)
def test_raspberry_pi_bits(tmp_path, before, after, said):
    assert states(tmp_path, {PI: before}, {PI: after}) == [f"the firmware says: {what}" for what in said]


def test_raspberry_pi_by_vcgencmd_where_the_kernel_shows_nothing(tmp_path, monkeypatch):
    put_on_path(
        tmp_path / "bin", "vcgencmd", '[ "$1" = get_throttled ] && echo throttled=0x50005', monkeypatch
    )
    state = throttle_state(tmp_path)
    assert state["pi_bits"] == 0x50005 and "pi_bits" in state["sensors"]
    assert throttle_state(tmp_path, tools=False)["pi_bits"] is None
    assert throttle_state(tree(tmp_path, {PI: "0"}))["pi_bits"] == 0  # the kernel's word is cheaper
    put_on_path(tmp_path / "bin", "vcgencmd", "echo 'VCHI initialization failed'; exit 255", monkeypatch)
    (tmp_path / PI).unlink()
    assert throttle_state(tmp_path)["pi_bits"] is None


def test_cooling_devices_count_and_fans_do_not(tmp_path):
    thermal = "sys/class/thermal"
    files = {
        f"{thermal}/cooling_device0/type": "pwm-fan",
        f"{thermal}/cooling_device0/cur_state": 4,
        f"{thermal}/cooling_device1/type": "cpufreq-cpu0",
        f"{thermal}/cooling_device1/cur_state": 0,
        f"{thermal}/cooling_device2/type": "intel_powerclamp",
        f"{thermal}/cooling_device2/cur_state": -1,
        f"{thermal}/thermal_zone0/temp": 61500,
        f"{thermal}/thermal_zone1/temp": 48000,
    }
    state = throttle_state(tree(tmp_path, files), tools=False)
    assert state["cooling"] == {"cpufreq-cpu0 1": 0, "intel_powerclamp 2": -1}
    assert state["temperature_c"] == 61.5
    assert states(tmp_path, files, files) == []
    hot = {f"{thermal}/cooling_device1/cur_state": 3}
    assert states(tmp_path, files, hot) == ["the kernel cooled by cpufreq-cpu0 1 (step 3)"]
    assert states(tmp_path, hot, files) == ["the kernel cooled by cpufreq-cpu0 1 (step 3)"]


def test_a_lowered_cap_is_told_of_the_kind_of_core_that_it_fell_on(tmp_path):
    little, big = policy(0, 1800, 1800, 1800), policy(4, 2400, 2400, 2400)
    assert states(tmp_path, little | big, little | big) == []
    words = states(tmp_path, little | big, policy(4, 1500, 1500, 2400))
    assert words == ["the CPU's frequency was capped at 1500 MHz, from 2400"]


@pytest.mark.parametrize(
    ("driver", "governor", "now", "said"),
    [
        (
            "cpufreq-dt",
            "performance",
            1500,
            ["the CPU runs at 1500 of 2400 MHz, though its governor is performance"],
        ),
        ("cpufreq-dt", "performance", 2390, []),
        ("cpufreq-dt", "ondemand", 600, []),  # idle
        ("intel_pstate", "performance", 1500, []),  # 2400 is a boost of one core
    ],
)
def test_a_clock_below_its_cap(tmp_path, driver, governor, now, said):
    files = policy(0, now, 2400, 2400, driver, governor) | policy(1, 2400, 2400, 2400, driver, governor)
    assert states(tmp_path, files, files) == said


def test_gpu_reasons_by_a_stand_in_for_nvidia_smi(tmp_path, monkeypatch):
    put_on_path(
        tmp_path / "bin",
        "nvidia-smi",
        "echo '0x0000000000000001, 41'; echo '0x0000000000000024, 83'",
        monkeypatch,
    )
    state = throttle_state(tmp_path)
    assert state["sensors"] == ["gpu"]
    assert state["gpu"] == [{"bits": 1, "temperature_c": 41}, {"bits": 0x24, "temperature_c": 83}]
    assert throttled(state, state) == [
        "GPU 1 was held at its power limit",
        "GPU 1 was slowed down by the driver for heat",
    ]


def test_gpu_reasons_under_their_new_name_and_where_there_are_none(tmp_path, monkeypatch):
    refuses = (
        'case "$1" in *clocks_throttle_reasons*) echo not a valid field; exit 2;; esac; echo "0x8, [N/A]"'
    )
    put_on_path(tmp_path / "bin", "nvidia-smi", refuses, monkeypatch)
    assert throttle_state(tmp_path)["gpu"] == [{"bits": 8, "temperature_c": None}]
    put_on_path(tmp_path / "bin", "nvidia-smi", "echo '[N/A], 50'", monkeypatch)
    assert throttle_state(tmp_path)["sensors"] == []


def test_swap_and_steal(tmp_path):
    tick = os.sysconf("SC_CLK_TCK")
    ticks = " ".join(str(n * tick) for n in (10, 20, 30, 400, 5, 6, 7, 8, 0, 0))
    tree(
        tmp_path,
        {
            "proc/vmstat": "pgpgin 1\npswpin 12\npswpout 34\npgfault 99\npgmajfault 56",
            "proc/stat": f"cpu  {ticks}\ncpu0 1 1 1 1 1 1 1 1 0 0\nctxt 5",
        },
    )
    assert swap_and_steal(tmp_path) == {
        "swap_in_pages": 12, "swap_out_pages": 34, "major_faults": 56, "steal_s": 8, "busy_s": 60,
    }  # fmt: skip


def test_swap_and_steal_where_the_kernel_does_not_tell(tmp_path):
    tree(tmp_path, {"proc/stat": "cpu 1 2 3 4", "proc/vmstat": "pgmajfault 7"})
    found = swap_and_steal(tmp_path)
    assert found["steal_s"] is None and found["swap_in_pages"] is None
    assert found["major_faults"] == 7 and found["busy_s"] > 0
    assert set(swap_and_steal(tmp_path / "nothing").values()) == {None}
