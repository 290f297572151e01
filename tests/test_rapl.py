from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from gpsearch.profiling.rapl import PerfEvents, PerfPower, Rapl, Sources, Surroundings


def zone(root: Path, number: str, name: str, microjoules: int, span: int = 1_000_000) -> Path:
    """Write one RAPL zone as the kernel shows it."""
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    return folder


def power_unit(root: Path, cpus: str = "0,18", scale: str = "2.3283064365386962890625e-10") -> Path:
    """Write perf's power unit as the kernel shows it."""
    (root / "events").mkdir(parents=True)
    (root / "type").write_text("20\n")
    (root / "cpumask").write_text(f"{cpus}\n")
    (root / "events" / "energy-pkg").write_text("event=0x02\n")
    (root / "events" / "energy-pkg.scale").write_text(f"{scale}\n")
    return root


class Counts(PerfEvents):
    """The system call on a machine whose sockets have counted so much."""

    def __init__(self, counts: dict[int, int], refused: frozenset[int] = frozenset()) -> None:
        self.counts, self.refused, self.opened = counts, refused, list[tuple[int, int, int]]()

    def open(self, kind: int, config: int, cpu: int, pid: int = -1) -> int:
        if cpu in self.refused:
            raise PermissionError(13, "Permission denied")
        self.opened.append((kind, config, cpu))
        return cpu

    def read(self, file: int) -> int:
        return self.counts[file]

    def close(self, file: int) -> None:
        self.opened = [one for one in self.opened if one[2] != file]


# ---- powercap


def test_the_sockets_add_up_and_nothing_counts_twice(tmp_path: Path) -> None:
    zone(tmp_path, "0", "package-0", 300_000)
    zone(tmp_path, "0:0", "core", 200_000)
    zone(tmp_path, "0:1", "dram", 100_000)
    zone(tmp_path, "1", "package-1", 400_000)
    zone(tmp_path, "2", "psys", 900_000)
    rapl = Rapl(tmp_path)
    assert rapl.method == "rapl:package-0+package-1"
    assert rapl.wrap_j == 1
    assert rapl.joules() == pytest.approx(0.7)


def test_it_goes_on_where_a_counter_wraps_around(tmp_path: Path) -> None:
    first = zone(tmp_path, "0", "package-0", 900_000)
    second = zone(tmp_path, "1", "package-1", 100_000)
    rapl = Rapl(tmp_path)
    start = rapl.joules()
    (first / "energy_uj").write_text("50000")  # 0.9 J -> 1 J = 0 -> 0.05 J
    (second / "energy_uj").write_text("120000")
    assert rapl.joules() - start == pytest.approx(0.15 + 0.02)
    (first / "energy_uj").write_text("40000")  # and once more around
    assert rapl.joules() - start == pytest.approx(0.15 + 0.99 + 0.02)


# ---- perf


def test_perfs_counts_become_joules(tmp_path: Path) -> None:
    events = Counts({0: 2**32, 18: 2**33})
    power = PerfPower(power_unit(tmp_path), events)
    assert power.joules() == pytest.approx(3)
    assert events.opened == [(20, 2, 0), (20, 2, 18)]
    assert power.method == "perf:power/energy-pkg on 2 sockets"
    power.close()
    assert events.opened == []


def test_a_refused_socket_leaves_no_other_open(tmp_path: Path) -> None:
    events = Counts({0: 1}, frozenset({18}))
    with pytest.raises(PermissionError):
        PerfPower(power_unit(tmp_path), events)
    assert events.opened == []


def test_the_system_call_counts() -> None:
    software, task_clock_ns = 1, 1
    events = PerfEvents()
    try:
        file = events.open(software, task_clock_ns, cpu=-1, pid=0)
    except OSError as error:
        pytest.skip(f"perf_event_open is closed here: {error}")
    before = events.read(file)
    sum(range(100_000))
    assert events.read(file) > before
    events.close(file)


def test_what_the_system_call_refuses_is_an_oserror() -> None:
    with pytest.raises(OSError, match=r"Invalid|No such|not permitted|denied|not implemented|RAPL"):
        PerfEvents().open(1, 10**6, cpu=-1, pid=0)


# ---- which one, or why none


def sources(tmp_path: Path, events: PerfEvents | None = None) -> Sources:
    """Return counters, surroundings and a system call that are all in a folder."""
    return Sources(
        (tmp_path / "powercap", tmp_path / "mounted"),
        tmp_path / "power",
        events or Counts({}),
        Surroundings(tmp_path / "root"),
    )


def surround(tmp_path: Path, *, container: bool = False, virtual: bool = False) -> None:
    """Let this be a container, a virtual machine, or neither."""
    (tmp_path / "root" / "proc").mkdir(parents=True)
    flags = "flags\t\t: fpu sse hypervisor avx\n" if virtual else "flags\t\t: fpu sse avx\n"
    (tmp_path / "root" / "proc" / "cpuinfo").write_text(flags)
    if container:
        (tmp_path / "root" / ".dockerenv").touch()


def test_powercap_comes_first(tmp_path: Path) -> None:
    zone(tmp_path / "powercap", "0", "package-0", 300_000)
    power_unit(tmp_path / "power")
    meter = sources(tmp_path, Counts({0: 0, 18: 0})).meter()
    assert not isinstance(meter, str)
    assert (meter.method, meter.wrap_j) == ("rapl:package-0", 1)


def test_a_mounted_folder_serves_in_a_container(tmp_path: Path) -> None:
    surround(tmp_path, container=True)
    zone(tmp_path / "mounted", "0", "package-0", 300_000)
    meter = sources(tmp_path).meter()
    assert not isinstance(meter, str)
    assert meter.joules() == pytest.approx(0.3)


def test_perf_serves_where_powercap_cannot_be_read(tmp_path: Path) -> None:
    file = zone(tmp_path / "powercap", "0", "package-0", 300_000) / "energy_uj"
    power_unit(tmp_path / "power", cpus="0")
    file.unlink()
    file.symlink_to(file)  # a loop, which root cannot read either
    meter = sources(tmp_path, Counts({0: 2**32})).meter()
    assert not isinstance(meter, str)
    assert (meter.method, meter.joules()) == ("perf:power/energy-pkg on 1 socket", 1)


@pytest.mark.parametrize(
    ("container", "virtual", "reason"),
    [
        (False, False, r"no RAPL counter under .*powercap: an older or another processor"),
        (True, False, r"this is a container, .* `-v /sys/class/powercap/intel-rapl:.*mounted:ro`"),
        (False, True, "this is a virtual machine, .*: measure on a bare machine"),
        (True, True, "this is a virtual machine"),
    ],
)
def test_where_there_is_no_counter_the_surroundings_say_why(
    tmp_path: Path, container: bool, virtual: bool, reason: str
) -> None:
    surround(tmp_path, container=container, virtual=virtual)
    why_not = sources(tmp_path).meter()
    assert isinstance(why_not, str)
    assert re.search(reason, why_not)


@pytest.mark.parametrize(
    ("container", "remedy"),
    [(False, "kernel.perf_event_paranoid=0"), (True, "--cap-add PERFMON")],
)
def test_where_counters_are_closed_the_remedy_opens_them(
    tmp_path: Path, container: bool, remedy: str
) -> None:
    surround(tmp_path, container=container)
    power_unit(tmp_path / "power")
    why_not = sources(tmp_path, Counts({}, frozenset({0, 18}))).meter()
    assert isinstance(why_not, str)
    assert remedy in why_not
    assert ("udev" in why_not) is not container


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_roots_files_are_named_as_such(tmp_path: Path) -> None:
    surround(tmp_path)
    (zone(tmp_path / "powercap", "0", "package-0", 0) / "energy_uj").chmod(0)
    assert "readable by root only" in str(sources(tmp_path).meter())


@pytest.mark.parametrize(
    ("file", "content"),
    [("energy_uj", ""), ("energy_uj", "many"), ("max_energy_range_uj", ""),
     ("max_energy_range_uj", "0")],
)  # fmt: skip
def test_a_counter_that_makes_no_sense_is_not_used(tmp_path: Path, file: str, content: str) -> None:
    surround(tmp_path)
    (zone(tmp_path / "powercap", "0", "package-0", 0) / file).write_text(content)
    assert "RAPL cannot be read" in str(sources(tmp_path).meter())


def test_a_counter_whose_range_cannot_be_read_is_not_used(tmp_path: Path) -> None:
    surround(tmp_path)
    span = zone(tmp_path / "powercap", "0", "package-0", 0) / "max_energy_range_uj"
    span.unlink()
    span.symlink_to(span)  # a loop, which root cannot read either
    assert "RAPL cannot be read" in str(sources(tmp_path).meter())


def test_a_processor_list_with_ranges_is_understood(tmp_path: Path) -> None:
    events = Counts(dict.fromkeys(range(8), 1))
    power = PerfPower(power_unit(tmp_path, cpus="0-2,7"), events)
    assert [cpu for *_, cpu in events.opened] == [0, 1, 2, 7]
    power.close()
