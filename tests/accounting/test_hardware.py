"""Hardware as it is written: what it means, what is refused, and how fast a ring over it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from thence.accounting.hardware import MOST, known_devices, parse_hardware
from thence.errors import UserError


@pytest.mark.parametrize(
    ("text", "name", "per_node", "nodes"),
    [
        ("h100", "h100", 1, 1),
        ("h100x8", "h100", 8, 1),
        ("H100x8", "h100", 8, 1),
        ("h100x16", "h100", 8, 2),
        ("h100x4x2", "h100", 4, 2),
        ("a100-80gx16", "a100-80g", 8, 2),
        ("mi300xx8", "mi300x", 8, 1),
        ("mi300x", "mi300x", 1, 1),
        ("l40sx4", "l40s", 4, 1),
        ("rtx4090x1", "rtx4090", 1, 1),
        ("gh200x16", "gh200", 4, 4),
        ("h100-pciex2", "h100-pcie", 2, 1),
        ("cpux2", "cpu", 2, 1),
    ],
)
def test_a_spelling_says_devices_and_nodes(text: str, name: str, per_node: int, nodes: int) -> None:
    found = parse_hardware(text)
    assert (found.device.name, found.per_node, found.nodes) == (name, per_node, nodes)


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        ("h10x8", "no hardware 'h10x8'", "did you mean h100x1"),
        ("x8", "no hardware", "NAMExCOUNT"),
        ("h100x", "no hardware", "NAMExCOUNT"),
        ("h100x8x2x2", "no hardware", "NAMExCOUNT"),
        ("h100x٣", "no hardware", "NAMExCOUNT"),
        ("h100x0", "no device", "1 or more"),
        ("h100x8x0", "no device", "1 or more"),
        ("h100x12", "no whole number of nodes of 8", "h100x8x2"),
        (f"h100x{8 * MOST}", "more than 1,000,000", "fewer"),
        ("missing.toml", "no such file", "h100x8"),
    ],
)
def test_what_is_no_hardware_is_refused_with_a_remedy(text: str, problem: str, remedy: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_hardware(text)
    assert problem in refused.value.problem and remedy in refused.value.remedy


def test_every_device_has_a_source_and_no_figure_in_the_wrong_unit() -> None:
    for name in known_devices():
        device = parse_hardware(name).device
        assert device.source
        if device.on_host:
            assert (device.memory, device.peak, device.bandwidth) == (None, (), None)
            continue
        assert device.memory is not None and 10e9 < device.memory < 1e12
        peaks = [device.peak_of(size) for size in (2, 4, 8)]
        known = [peak for peak in peaks if peak is not None]
        assert known == sorted(known, reverse=True) and known[-1] > 1e12 and known[0] < 1e16
        assert device.bandwidth is not None and 1e11 < device.bandwidth < 1e14
        assert device.within is not None and (device.between or 0) < device.within < device.bandwidth


def test_a_file_of_ones_own_lies_over_a_known_device(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('like = "h100"\nmemory_gb = 94\nper_node = 4\nnodes = 2\nprice_per_hour = 2.5\n')
    found = parse_hardware(str(file))
    assert (found.ranks, found.device.memory, found.price) == (8, 94e9, 2.5)
    assert found.device.peak == parse_hardware("h100").device.peak
    assert "own.toml" in found.device.source and "datasheet" in found.device.source
    assert parse_hardware(str(file), 3.0).price == 3.0


@pytest.mark.parametrize(
    ("text", "field", "line"),
    [
        ("memory_gb = -1", "memory_gb", 1),
        ("memory = 80", "memory", 1),
        ('like = "h1000"', "like", 1),
        ("bfloat16_tflops = 9", "memory_gb", None),
        ("memory_gb = 80\nnodes = 0", "nodes", 2),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_with_its_line(
    text: str, field: str, line: int | None, tmp_path: Path
) -> None:
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        parse_hardware(str(file))
    assert (refused.value.field, refused.value.line, refused.value.file) == (field, line, str(file))


def test_a_ring_goes_over_the_links_that_it_needs() -> None:
    two = parse_hardware("h100x16")  # 450 GB/s within a node, 50 a port between nodes
    assert two.link(8) == (450e9, "within the node")
    assert two.link(16) == (400e9, "between nodes"), "eight ports together"
    assert two.link(2, 8) == (50e9, "between nodes"), "one rank of each node"
    assert two.link(4, 4) == (100e9, "between nodes"), "two ranks of each node"
    assert parse_hardware("h100x8").link(8) == (450e9, "within the node")
    assert parse_hardware("l40sx8x2").link(16)[0] is None, "cards whose ports are not known"
