"""The files for Prometheus and Grafana by themselves; what they ask for is held against real pages in test_metrics."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

from mgpu_llm.ctl.main import cli
from tests.support.monitoring import RULES, SCRAPE, alerts, dashboard, exprs, metrics_in, needs_promtool, promtool
from tests.support.toy_setup import ROOT

STORIES = ROOT / "tests/data/prometheus/rules_test.yml"


def test_the_names_in_an_expression_are_found() -> None:
    assert metrics_in('sum by (a, b) (increase(x_total{c="d e"}[1h])) >= 2 and on (f) up{g="h"} == 1') == {
        "x_total",
        "up",
    }
    assert metrics_in("time() - y_seconds") == {"y_seconds"}


def test_every_alert_and_every_panel_asks_for_something() -> None:
    asked = {where for where, expr in exprs() if metrics_in(expr)}
    assert len(alerts()) == RULES.read_text().count("- alert:")
    assert {*alerts(), *(panel["title"] for panel in dashboard()["panels"] if panel["type"] != "row")} <= asked


@pytest.mark.parametrize("name", alerts())
def test_every_alert_says_what_is_wrong_and_which_command_of_ours_tells_more(name: str) -> None:
    rule = alerts()[name]
    assert re.search(r"severity: (critical|warning|info)$", rule, re.MULTILINE)
    assert re.search(r"^          summary: \S", rule, re.MULTILINE)
    verbs = re.findall(r"mgpuctl ([a-z]+)", " ".join(rule.partition("description:")[2].split()))
    assert verbs
    assert set(verbs) <= set(cli.list_commands(click.Context(cli)))


def test_the_dashboard_has_panels_of_their_own_ids_that_do_not_overlap() -> None:
    panels: list[dict[str, Any]] = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23


def test_all_of_the_dashboard_asks_the_source_that_its_reader_has_chosen() -> None:
    panels, variables = dashboard()["panels"], dashboard()["templating"]["list"]
    [source] = [variable for variable in variables if variable["type"] == "datasource"]
    assert source["query"] == "prometheus"
    asked = [panel["datasource"] for panel in panels if panel["type"] != "row"]
    asked += [target["datasource"] for panel in panels for target in panel.get("targets", ())]
    asked += [variable["datasource"] for variable in variables if variable["type"] == "query"]
    assert {entry["uid"] for entry in asked} == {f"${{{source['name']}}}"}
    used = set(re.findall(r"\$(\w+)", json.dumps([panel.get("targets") for panel in panels])))
    assert used - {"__rate_interval"} <= {variable["name"] for variable in variables}


def test_the_scrape_example_asks_at_the_default_address_for_the_job_that_the_alerts_name() -> None:
    listen = tomllib.loads((ROOT / "etc/mgpu-llm.toml").read_text())["metrics"]["listen"]
    assert f"- {listen}\n" in SCRAPE.read_text()
    assert set(re.findall(r'job="(\S+?)"', RULES.read_text())) == {"mgpu-llm"}
    assert "job_name: mgpu-llm\n" in SCRAPE.read_text()


@needs_promtool
def test_promtool_finds_nothing_wrong_with_the_rules_and_the_example(tmp_path: Path) -> None:
    assert f"{len(alerts())} rules found" in promtool("check", "rules", RULES)
    example = tmp_path / "prometheus.yml"
    example.write_text(SCRAPE.read_text().replace("/usr/local/share/mgpu-llm/prometheus", str(RULES.parent)))
    assert "is valid prometheus config" in promtool("check", "config", example)


@needs_promtool
def test_promtool_can_read_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    asked = [expr.replace("$__rate_interval", "1m") for where, expr in exprs() if where not in alerts()]
    rules = [{"record": f"asked:{number}", "expr": expr} for number, expr in enumerate(asked)]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)


@needs_promtool
def test_the_alerts_fire_where_the_stories_say_and_are_quiet_elsewhere() -> None:
    assert "SUCCESS" in promtool("test", "rules", STORIES)
