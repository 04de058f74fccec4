"""What a plan is made for: devices, how many, and how they are linked, from datasheets or a TOML file of your own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Le

from thence.accounting.published import published_table
from thence.errors import UserError
from thence.settings.limits import Processes, Text
from thence.settings.section import Section
from thence.settings.toml_file import read_toml
from thence.settings.validation import validated
from thence.wording import shown

FLAG = "--hardware"
MOST = 1_000_000
"""Devices that a plan can be asked for."""
Figure = Annotated[float, Gt(0), Le(1e9)]
_COUNTS = re.compile(r"(?:x(\d{1,9}))?(?:x(\d{1,9}))?", re.ASCII)


class OwnHardware(Section):
    """Hardware in a TOML file of your own."""

    name: Text = ""
    """What the plan calls it."""
    like: Text | None = None
    """A known device whose figures hold where the file has none."""
    memory_gb: Figure | None = None
    """Memory of a device, 10^9 bytes."""
    bfloat16_tflops: Figure | None = None
    """Peak of matrix products in bfloat16 without sparsity, 10^12 FLOPs a second."""
    float32_tflops: Figure | None = None
    """The same in float32, without TF32."""
    float64_tflops: Figure | None = None
    """The same in float64."""
    bandwidth_gb_s: Figure | None = None
    """Of a device's own memory, 10^9 bytes a second."""
    within_node_gb_s: Figure | None = None
    """What a device can send to others of its node, in one direction."""
    between_nodes_gb_s: Figure | None = None
    """What a device can send to other nodes, in one direction."""
    per_node: Processes = 1
    """Devices of one node."""
    nodes: Processes = 1
    """Nodes."""
    price_per_hour: Figure | None = None
    """Price of a device for an hour."""
    source: Text = ""
    """Where the figures come from."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device. None: not known.

    Args:
        memory: bytes.
        peak: FLOPs a second of matrix products, by the bytes of a number: 2, 4, 8.
        bandwidth: of its memory, bytes a second.
        within, between: bytes a second that it can send to others of its node, and to other nodes.
        source: where the figures come from.
        on_host: it is a process on a CPU, and its memory is the host's.
    """

    name: str
    memory: float | None
    peak: tuple[tuple[int, float], ...]
    bandwidth: float | None
    within: float | None
    between: float | None
    source: str
    on_host: bool = False

    def peak_of(self, size: int) -> float | None:
        """FLOPs a second for numbers of so many bytes; None: not known."""
        return dict(self.peak).get(size)


@dataclass(frozen=True, slots=True)
class Hardware:
    """Devices in nodes.

    Args:
        per_node: devices of each node.
        price: of a device for an hour, in any currency; None: not given.
    """

    device: Device
    per_node: int
    nodes: int = 1
    price: float | None = None

    @property
    def ranks(self) -> int:
        """Processes: one a device."""
        return self.per_node * self.nodes

    def __str__(self) -> str:
        if self.ranks == 1:
            return self.device.name
        where = f", {self.nodes:,} nodes of {self.per_node:,}" if self.nodes > 1 else ""
        return f"{self.device.name} x {self.ranks:,}{where}"

    def link(self, members: int, stride: int = 1) -> tuple[float | None, str]:
        """Bytes a second at which a rank of a ring can send, and which link that is; None where it is not known.

        Ranks lie node by node. Where a ring leaves the node, the members in a node share all their ports to other
        nodes, since the libraries run one ring through each of them.

        Args:
            members: ranks of the ring.
            stride: how far two neighbours lie apart.
        """
        here = max(1, min(members, self.per_node // stride if stride < self.per_node else 1))
        within = self.device.within
        if members * stride <= self.per_node or (here == members and self.nodes == 1):
            return within, "within the node"
        if self.device.between is None:
            return None, "between nodes"
        between = here * self.device.between
        if here == 1 or within is None:
            return between, "between nodes"
        return (between, "between nodes") if between < within else (within, "within the node")

    def with_devices(self, devices: int) -> Hardware:
        """The same with so many devices: in one node where they fit, else in whole nodes."""
        per_node = min(self.per_node, devices) if self.nodes > 1 or devices <= self.per_node else self.per_node
        return Hardware(self.device, per_node, -(-devices // per_node), self.price)


def known_devices() -> tuple[str, ...]:
    """Names of the devices whose figures come with thence."""
    return tuple(published_table("devices.toml"))


def parse_hardware(text: str, price: float | None = None) -> Hardware:
    """Hardware as it is written on the command line.

    ``h100x8`` are 8 devices. More than a node of theirs holds are whole nodes: ``h100x16`` are two nodes of 8.
    ``h100x4x2`` are two nodes of 4. A path that ends in ``.toml`` is a file of your own: :class:`OwnHardware`.

    Args:
        price: of a device for an hour; it goes before that of a file.

    Raises:
        UserError: there is no such device or file, or there cannot be so many of them.
    """
    if text.lower().endswith(".toml"):
        return _own(Path(text).expanduser(), price)
    wanted = text.strip().lower()
    known = known_devices()
    for name in sorted(known, key=len, reverse=True):
        found = _COUNTS.fullmatch(wanted.removeprefix(name)) if wanted.startswith(name) else None
        if found:
            table = published_table("devices.toml")[name]
            return _counted(_device(name, table, name == "cpu"), found, int(table["per_node"]), price, text)
    near = difflib.get_close_matches(re.split(r"x\d+(?:x\d+)?$", wanted)[0], known, n=1)
    hint = f"did you mean {near[0]}x1? " if near else ""
    raise UserError(
        f"no hardware {shown(text)}",
        remedy=f"{hint}write NAMExCOUNT, as h100x8, with one of {', '.join(known)}; or give a TOML file of your own",
        field=FLAG,
    )


def _counted(device: Device, found: re.Match[str], node: int, price: float | None, text: str) -> Hardware:
    first, second = (None if part is None else int(part) for part in found.groups())
    if 0 in (first, second):
        raise UserError(f"{shown(text)} has no device", remedy="give a count of 1 or more", field=FLAG)
    if (first or 1) * (second or 1) > MOST:
        raise UserError(f"{shown(text)} has more than {MOST:,} devices", remedy="give fewer", field=FLAG)
    if second is not None:
        return Hardware(device, first or 1, second, price)
    count = first or 1
    if count <= node:
        return Hardware(device, count, 1, price)
    if count % node:
        raise UserError(
            f"{count:,} devices are no whole number of nodes of {node}",
            remedy=f"give a multiple of {node}, or write devices of a node and nodes: {device.name}x{node}x"
            f"{-(-count // node)}",
            field=FLAG,
        )
    return Hardware(device, node, count // node, price)


def _device(name: str, figures: Mapping[str, Any], on_host: bool) -> Device:
    def giga(key: str) -> float | None:
        return figures[key] * 1e9 if figures.get(key) is not None else None

    sizes = ((2, "bfloat16_tflops"), (4, "float32_tflops"), (8, "float64_tflops"))
    peak = tuple((size, figures[key] * 1e12) for size, key in sizes if figures.get(key) is not None)
    links = (giga("within_node_gb_s"), giga("between_nodes_gb_s"))
    return Device(name, giga("memory_gb"), peak, giga("bandwidth_gb_s"), *links, figures.get("source", ""), on_host)


def _own(path: Path, price: float | None) -> Hardware:
    """Hardware from a file. Raises UserError: it cannot be read, or a figure makes no sense."""
    try:
        file = read_toml(path, "a file of hardware", field=FLAG)
    except FileNotFoundError:
        raise UserError(
            "no such file", remedy="give a TOML file with figures of hardware, or NAMExCOUNT, as h100x8", file=path
        ) from None
    own = validated(OwnHardware, file.tables, file=file)
    table = published_table("devices.toml")
    if own.like is not None and own.like not in table:
        remedy = f"use one of {', '.join(table)}"
        line = file.line_of("like")
        raise UserError(f"no device {shown(own.like)}", remedy=remedy, file=path, line=line, field="like")
    known = table[own.like] if own.like else {}
    figures = {**known, **own.model_dump(exclude_none=True)}
    source = own.source or f"{path}" + (f"; else {known['source']}" if known else "")
    device = _device(own.name or own.like or path.stem, {**figures, "source": source}, own.like == "cpu")
    if device.memory is None and not device.on_host:
        raise UserError(
            "the memory of a device is missing, and nothing fits or not without it",
            remedy='give memory_gb, in 10^9 bytes, or like = "h100"',
            file=path,
            field="memory_gb",
        )
    return Hardware(device, own.per_node, own.nodes, own.price_per_hour if price is None else price)
