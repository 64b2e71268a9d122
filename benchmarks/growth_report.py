"""The tables of what :mod:`benchmarks.growth` measured, beside what :mod:`benchmarks.cost` predicts.

Figures are kept in growth_cpu.json and growth_cuda.json; the pages hold nothing but their tables, and a test compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import cost
from benchmarks.cost import DOCS, Machine, Shape, Work, between, duration, quantity

HERE = Path(__file__).parent
README = HERE / "README.md"
GROWTH = ("<!-- growth: begin, written by python -m benchmarks.growth --write -->", "<!-- growth: end -->")
DEVICE = (
    "<!-- device: begin, written by python -m benchmarks.growth --device cuda --write -->",
    "<!-- device: end -->",
)
CHECK = ("<!-- check: begin, written by python -m benchmarks.growth --write -->", "<!-- check: end -->")

TITLES = {
    "ffn": "certified top 10, FFN",
    "neuron": "certified top 10, FFN + attention",
    "every": "every FFN neuron, exact",
    "rerun": "rerun of 10 variants",
}
DEVICE_TITLES = {"plain": "plain forward pass", **TITLES, "table 2": "Table 2", "table 13": "Table 13"}
# What the paper's experiments should take on a device of that class.
GOALS = {
    ("gpt2-large", "ffn"): "<= 2 x plain",
    ("gpt2-large", "neuron"): "<= 2 x plain",
    ("llama-7b", "ffn"): "<= 2 x plain",
    ("llama-7b", "neuron"): "<= 2 x plain",
    ("gpt2-large", "table 2"): "< 10 min",
    ("llama-7b", "table 2"): "< 1 h",
}


def kept(kind: str) -> Path:
    """Return where the figures of one kind of device are kept."""
    return HERE / f"growth_{kind}.json"


def keep(found: dict[str, Any], kind: str) -> None:
    """Keep figures."""
    kept(kind).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read(kind: str) -> dict[str, Any] | None:
    """Return the figures that are kept, if any."""
    if not kept(kind).exists():
        return None
    found: dict[str, Any] = json.loads(kept(kind).read_text(encoding="utf-8"))
    return found


def work_of(point: dict[str, Any]) -> Work:
    """Return what the model of costs says of a point."""
    shape, tokens, prompts = Shape(**point["shape"]), round(point["tokens"]), point["prompts"]
    works = {
        "plain": lambda: cost.plain_forward(shape, tokens, prompts),
        "ffn": lambda: cost.certified(shape, tokens, "ffn", prompts=prompts),
        "neuron": lambda: cost.certified(shape, tokens, "neuron", prompts=prompts),
        "every": lambda: cost.every_neuron(shape, tokens, prompts=prompts),
        "rerun": lambda: cost.rerun(shape, tokens, 10 * prompts, plain=prompts),
        "table 2": lambda: cost.table_2(shape, tokens, prompts=prompts),
        "table 13": lambda: cost.table_13(shape, tokens, prompts=prompts),
    }
    return works[point["what"]]()


def predicted_ratio(point: dict[str, Any], machine: Machine) -> float:
    """Return what the model of costs says that a point takes, in plain forward passes of the same prompts."""
    shape, plain = Shape(**point["shape"]), work_of(point | {"what": "plain"})
    return machine.seconds(work_of(point), shape) / machine.seconds(plain, shape)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _lines(header: str, rows: list[list[str]], left: int = 1) -> str:
    columns = len(header.split("|"))
    ruler = ["---"] * left + ["---:"] * (columns - left)
    return "\n".join([f"| {header} |", f"|{'|'.join(ruler)}|", *(f"| {' | '.join(row)} |" for row in rows)])


def conditions(found: dict[str, Any]) -> str:
    """Return where and on what this was measured."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"{found['date']}. {found['hardware']}; load average {found['load']} at the start. Python {found['python']}, "
        f"{versions}."
    )


def _grouped(found: dict[str, Any], axis: str) -> Iterator[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """Yield each model and number of prompts with its points by what was timed."""
    groups: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {}
    for point in found["points"]:
        if point["axis"] == axis:
            key = (point["shape"]["name"], point["shape"]["vocabulary"], point["prompts"])
            groups.setdefault(key, {})[point["what"]] = point
    for points in groups.values():
        yield next(iter(points.values())), points


def growth_table(found: dict[str, Any]) -> str:
    """Return the table of growth: one line for each model and number of prompts."""
    rows = []
    for axis in ("prompts", "size"):
        for first, points in _grouped(found, axis):
            shape = first["shape"]
            row = [
                shape["name"],
                f"{shape['layers']} x {shape['width']}",
                f"{shape['layers'] * shape['ffn']:,}",
                f"{shape['vocabulary']:,}",
                f"{first['prompts']:,}",
                duration(points["rerun"]["plain"]),
            ]
            for name in TITLES:
                point = points.get(name)
                row.append(
                    "-"
                    if point is None
                    else f"{duration(point['seconds'])}, {_ratio(point['seconds'] / point['plain'])}"
                )
            row.append(" / ".join(f"{points[name]['scored']:.1f}" for name in ("ffn", "neuron")))
            rows.append(row)
    names = ["model", "layers x width", "FFN neurons", "vocabulary", "prompts", "plain", *TITLES.values(), "scored"]
    return _lines(" | ".join(names), rows)


def peers_table(found: dict[str, Any]) -> str:
    """Return the table of peers, with this package's own lines at the same size."""
    rows = []
    for peer in found["peers"]:
        if "error" in peer:
            rows.append([peer["peer"], f"not measured: {peer['error']}", *[""] * 6])
            continue
        versions = ", ".join(f"{name} {number}" for name, number in peer["versions"].items())
        rows.append(
            [
                peer["peer"],
                versions,
                f"{peer['scored']:,}",
                str(peer["forward"]),
                str(peer["backward"]),
                duration(peer["plain"]),
                duration(peer["seconds"]),
                _ratio(peer["seconds"] / peer["plain"]),
            ]
        )
    for point in found["points"]:
        if point["axis"] == "size" and point["shape"] == found["peers_shape"] and point["what"] in ("ffn", "every"):
            rows.append(
                [
                    f"this package: {TITLES[point['what']]}",
                    "",
                    f"{point['shape']['layers'] * point['shape']['ffn']:,}",
                    "1",
                    "0",
                    duration(point["plain"]),
                    duration(point["seconds"]),
                    _ratio(point["seconds"] / point["plain"]),
                ]
            )
    header = "what | versions | neurons | forward | backward | its plain pass | time | x its plain pass"
    return _lines(header, rows, left=2)


def tables(found: dict[str, Any]) -> str:
    """Return all that README.md shows of growth."""
    return "\n\n".join([conditions(found), growth_table(found), peers_table(found)])


def device_table(found: dict[str, Any] | None) -> str:
    """Return the table of large shapes on an accelerator, or that there was none."""
    if found is None:
        return "Not measured yet: no CUDA device has been at hand. The same code runs in a test, on a tiny shape."
    rows = []
    for point in found["points"]:
        name, prompts = point["shape"]["name"], point["prompts"]
        rows.append(
            [
                name,
                DEVICE_TITLES[point["what"]],
                f"{prompts:,}",
                f"{point['seconds'] / prompts * 1e3:,.2f} ms",
                duration(point["seconds"]),
                _ratio(point["seconds"] / point["plain"]),
                "-" if point["memory"] is None else f"{quantity(point['memory'])}B",
                f"{quantity(work_of(point).memory)}B",
                GOALS.get((name, point["what"]), ""),
            ]
        )
    header = "model | what | prompts | per prompt | in all | x plain | peak memory above the weights | predicted | goal"
    return "\n\n".join([conditions(found), _lines(header, rows, left=2)])


def _is_dai(peer: dict[str, Any]) -> bool:
    return peer["peer"] == "knowledge-neurons" and "error" not in peer


def _check_of_peer(peer: dict[str, Any], shape: Shape, machine: Machine) -> str:
    """Return what the scheme of Dai et al. 2022 should take and took."""
    work, plain = cost.knowledge_neurons(shape, cost.TOKENS), cost.plain_forward(shape, cost.TOKENS)
    predicted, measured = machine.seconds(work, shape) / machine.seconds(plain, shape), peer["seconds"] / peer["plain"]
    return (
        f"Dai et al. 2022 as in knowledge-neurons, {shape.name}, vocabulary {shape.vocabulary:,}: {work.forward:,.0f} "
        f"passes forward and {work.backward:,.0f} backward predicted, {peer['forward']:,} and {peer['backward']:,} "
        f"counted; ratio {_ratio(predicted)} / {_ratio(measured)} = {predicted / measured:.2f}."
    )


def check(found: dict[str, Any]) -> str:
    """Return predicted ratios beside the measured ones."""
    machine = Machine(**found["machine"])
    rates = (
        f"Rates measured in the same run: {quantity(machine.flops)}FLOP/s in float32, {quantity(machine.double_flops)}"
        f"FLOP/s in float64, {quantity(machine.bandwidth)}B/s; a block takes {duration(machine.block)} to launch, "
        f"{duration(machine.traced_block)} where its activations are read, and a question "
        f"{duration(machine.question)} of its own."
    )
    rows = []
    for axis in ("prompts", "size"):
        for first, points in _grouped(found, axis):
            shape = first["shape"]
            row = [shape["name"], f"{shape['vocabulary']:,}", f"{first['prompts']:,}"]
            for name in TITLES:
                if name not in points:
                    row.append("-")
                    continue
                measured = points[name]["seconds"] / points[name]["plain"]
                predicted = predicted_ratio(points[name], machine)
                row.append(f"{_ratio(predicted)} / {_ratio(measured)} = {predicted / measured:.2f}")
            rows.append(row)
    names = ["model", "vocabulary", "prompts", *TITLES.values()]
    text = [conditions(found), rates, _lines(" | ".join(names), rows)]
    text += [_check_of_peer(peer, Shape(**found["peers_shape"]), machine) for peer in found["peers"] if _is_dai(peer)]
    if found["memory"]:
        shape = Shape(**[point for point in found["points"] if point["axis"] == "size"][-1]["shape"])
        predicted = cost.certified(shape, cost.TOKENS, "neuron").memory / 1e6
        measured = ", ".join(f"{each['peak'] - each['loaded']:,.0f}" for each in found["memory"])
        text.append(
            f"Memory of the first certified top 10 of FFN + attention above the loaded model, {shape.name}: "
            f"{predicted:,.0f} MB predicted, {measured} MB measured as resident memory of fresh processes."
        )
    return "\n\n".join(text)


def write() -> None:
    """Put the tables of all figures that are kept into the pages."""
    found = read("cpu")
    if found is not None:
        between(README, *GROWTH, tables(found))
        between(DOCS, *CHECK, check(found))
    between(README, *DEVICE, device_table(read("cuda")))
