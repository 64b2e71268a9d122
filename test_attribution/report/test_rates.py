"""What is printed of how often claims err."""

from __future__ import annotations

from attribution.claims.error_rates import Rates
from attribution.report.rates import rates_table


def test_rates_are_a_markdown_table_with_the_claim_that_errs_most_on_top() -> None:
    rates = {
        ("tiny", "b"): Rates({"shifted": 0.01, "mixed": 0.02}, 0.5, 50, 400),
        ("tiny", "a | b"): Rates({"swapped": 0.05}, 1.0, 300, 400),
        ("tiny", "a"): Rates({}, 0.0, 2, 400),
    }
    assert rates_table(rates).markdown(tight_rule=True) == [
        "| Model | Claim | Facts | Shifted | Tilted | Mixed | Swapped | Power |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
        r"| tiny | a \| b | 300 |  |  |  | 0.050 | 1.00 |",
        "| tiny | b | 50 | 0.010 |  | 0.020 |  | 0.50 |",
        "| tiny | a | 2 |  |  |  |  | 0.00 |",
    ]
