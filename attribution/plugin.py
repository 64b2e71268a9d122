"""The pytest plugin, under the address that pytest finds it by; what it does is in :mod:`attribution.pytest_plugin`."""

from __future__ import annotations

from attribution.pytest_plugin.collection import (
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_generate_tests,
    pytest_xdist_make_scheduler,
    pytest_xdist_node_collection_finished,
)
from attribution.pytest_plugin.configuration import (
    pytest_addhooks,
    pytest_addoption,
    pytest_configure,
    pytest_load_initial_conftests,
    pytest_report_header,
    pytest_sessionfinish,
)
from attribution.pytest_plugin.fixtures import (
    _attribution_threads,
    assert_claim,
    attribution_bench,
    attribution_exhibit,
    attribution_model,
    attribution_prompts,
)
from attribution.pytest_plugin.recorded import pytest_runtest_makereport

__all__ = [
    "_attribution_threads",
    "assert_claim",
    "attribution_bench",
    "attribution_exhibit",
    "attribution_model",
    "attribution_prompts",
    "pytest_addhooks",
    "pytest_addoption",
    "pytest_collection_finish",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_generate_tests",
    "pytest_load_initial_conftests",
    "pytest_report_header",
    "pytest_runtest_makereport",
    "pytest_sessionfinish",
    "pytest_xdist_make_scheduler",
    "pytest_xdist_node_collection_finished",
]
