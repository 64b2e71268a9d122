"""Run the GPT-2-small benchmarks and print their table of ratios.

    python -m benchmarks.summary            # print
    python -m benchmarks.summary --write    # and put the table into benchmarks/README.md

Takes some five minutes on two cores. Run it on a quiet machine: ratios stand some noise, but not a neighbour who comes
and goes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpt2_small import SCALE, SEED

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table: begin, written by python -m benchmarks.summary --write -->", "<!-- table: end -->"
TESTS = Path(__file__).with_name("test_gpt2_small.py")


def run() -> dict[str, Any]:
    """Run the benchmarks and return what pytest-benchmark recorded.

    Raises:
        SystemExit: If one failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        # Not pytest.main: pytest warns of plugins that this process has imported before it.
        command = [sys.executable, "-m", "pytest", str(TESTS), "-v", "--benchmark-quiet", f"--benchmark-json={results}"]
        code = subprocess.run(command, cwd=TESTS.parents[1], check=False).returncode
        if code:
            raise SystemExit(f"the benchmarks failed with exit code {code}; there is no table until they pass.")
        recorded: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    return recorded


class Results:
    """The benchmarks of one run by name, in the order in which they ran."""

    def __init__(self, recorded: dict[str, Any]) -> None:
        self.recorded = recorded
        self.by_name = {each["name"]: each for each in recorded["benchmarks"]}

    def info(self, name: str) -> dict[str, Any]:
        """Return what a benchmark said of itself."""
        found: dict[str, Any] = self.by_name[name]["extra_info"]
        return found

    def ratio(self, name: str) -> float:
        """Return the median time as a multiple of the median of the plain forward passes run between its rounds."""
        return float(self.by_name[name]["stats"]["median"]) / float(self.info(name)["plain"])


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:,.0f}"


def table(results: Results) -> str:
    """Return the rows of the table in Markdown."""
    lines = [
        "| what | median time | rounds | x plain | neurons scored |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, each in results.by_name.items():
        info, stats = each["extra_info"], each["stats"]
        scored = f"{info['scored']:,} of {info['total']:,}" if "scored" in info else ""
        cells = (info["row"], _time(stats["median"]), str(stats["rounds"]), _ratio(results.ratio(name)), scored)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def goals(results: Results) -> str:
    """Return the figures that have a goal, with it, in Markdown."""
    both, ffn = "test_certified_top_10[neuron]", "test_certified_top_10[ffn]"
    first = "test_certified_top_10_of_a_freshly_loaded_model"
    certified, traced = results.ratio(both), results.ratio("test_traced_forward_pass")
    published = {unit: results.ratio(f"test_published_way[{unit}]") for unit in ("ffn", "attention")}
    rows = [
        ("certified top 10, FFN + attention: (total - plain) / plain", f"{certified - 1:.2f}", "<= 1.5"),
        ("the same: (total - traced) / plain", f"{certified - traced:.2f}", ""),
        ("the same: total / plain", f"{certified:.2f}", ""),
        ("published way / certified, FFN + attention", f"{sum(published.values()) / certified:,.0f}", ">= 300"),
        ("published way / certified, FFN", f"{published['ffn'] / results.ratio(ffn):,.0f}", ""),
    ]
    if "megabytes" in results.info(first):
        size = results.info(first)["megabytes"]
        rows.append(
            (
                f"peak memory of a certified top 10 above the loaded model ({size['peak']:,.0f} MB over "
                f"{size['loaded']:,.0f} MB, of which weights {size['weights']:,.0f} MB)",
                f"{size['peak'] - size['loaded']:,.0f} MB",
                "<= 1,000 MB",
            )
        )
    else:
        rows.append(("peak memory", "not measured: needs /proc of Linux", "<= 1,000 MB"))
    return "\n".join(["| figure | measured | goal |", "|---|---:|---:|", *(f"| {' | '.join(row)} |" for row in rows)])


def conditions(results: Results) -> str:
    """Return where and on what this was measured, in Markdown."""
    plain, top = results.info("test_plain_forward_pass"), results.info("test_certified_top_10[neuron]")
    cpu = results.recorded["machine_info"]["cpu"]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "nnsight"))
    return (
        f"{results.recorded['datetime'][:10]}. {cpu.get('brand_raw', platform.processor() or platform.machine())}, "
        f"{cpu['count']} cores, {torch.get_num_threads()} threads. Python {platform.python_version()}, {versions}.\n"
        f"Prompt of {plain['tokens']} tokens; seed {SEED}; weights of scale {SCALE}: at the last position the logits "
        f"have a standard deviation of {plain['logit_std']:.2f}, the distribution has an entropy of "
        f"{plain['entropy']:.2f} nats (uniform: {torch.tensor(plain['vocabulary']).log():.2f}) and gives the answer "
        f"{plain['prob']:.3f}; the top 10 FFN and attention neurons score {top['best']:.3f} to {top['last']:.3f} nats."
    )


def main(arguments: list[str]) -> None:
    """Run, print, and write if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the table into {README.name} as well")
    options = parser.parse_args(arguments)
    results = Results(run())
    text = "\n\n".join([conditions(results), table(results), goals(results)])
    print(f"\n{text}")
    if options.write:
        before, rest = README.read_text(encoding="utf-8").split(BEGIN)
        _, after = rest.split(END)
        README.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
