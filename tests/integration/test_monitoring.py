"""The alerts and the dashboard of ``contrib/``, with a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from ..backup_client import Api
from ..contract.base import Rooms, key
from ..servers.accounts import fetch
from ..servers.fake_homeserver import Homeserver
from ..servers.prometheus import Prometheus, promtool
from ..servers.proxy import CONTRIB
from ..servers.service import Service

DEADLINE = 30.0
#: Metric without samples until the first download is aborted.
WITHOUT_SAMPLES = "synapse_roomkeys_broken_downloads_total"


def test_alerts(tmp_path: Path) -> None:
    """Each alert fires on its cause, none fires for a healthy service.

    Each alert has a summary and a runbook with the operator's next steps.
    """
    rules = yaml.safe_load((CONTRIB / "alerts.yaml").read_text())["groups"]
    for alert in (alert for group in rules for alert in group["rules"]):
        assert alert["annotations"].keys() == {"summary", "runbook"}, alert
    shutil.copy(CONTRIB / "alerts.yaml", tmp_path)
    shutil.copy(Path(__file__).with_name("alerts_test.yaml"), tmp_path)
    checked = promtool("check", "rules", "alerts.yaml", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = promtool("test", "rules", "alerts_test.yaml", cwd=tmp_path)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def expressions() -> list[str]:
    """Return all queries of the dashboard, as Grafana sends them."""
    dashboard = json.loads((CONTRIB / "grafana-dashboard.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    return [target["expr"].replace("$__rate_interval", "1m") for target in targets]


def cause_traffic(api: Api) -> None:
    """Cause traffic of each kind: uploads, a download, a refusal."""
    version = api.create_version()
    rooms: Rooms = {"!room": {"session": key()}}
    api.upload(version, rooms)
    assert api.download(version) == rooms
    assert api.get("/version/1").status == 404


def test_dashboard(tmp_path: Path) -> None:
    """Each query of the dashboard returns data after some traffic, and shows every
    metric."""
    with Homeserver() as homeserver, Service(tmp_path, homeserver.url) as service:
        api = Api(service.url, homeserver.new_user().access_token)
        cause_traffic(api)
        target = urlsplit(service.metrics_url).netloc
        with Prometheus(tmp_path, target) as prometheus:
            wanted = [each for each in expressions() if WITHOUT_SAMPLES not in each]
            end = time.monotonic() + DEADLINE
            missing: list[str] = wanted
            while missing:
                assert time.monotonic() < end, missing
                cause_traffic(api)
                time.sleep(0.2)
                missing = [
                    each for each in wanted if not numeric_values(prometheus, each)
                ]
            for expression in expressions():
                prometheus.query(expression)
            names = {
                series["metric"]["__name__"]
                for series in prometheus.query('{__name__=~"synapse_roomkeys_.*"}')
            }
            metrics = fetch(service.metrics_url).decode()
        checked = promtool("check", "metrics", cwd=tmp_path, given=metrics)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    shown = set(re.findall(r"synapse_roomkeys_\w+", "\n".join(expressions())))
    skipped = re.compile("_(created|sum|count)$")
    assert {name for name in names if not skipped.search(name)} <= shown


def numeric_values(prometheus: Prometheus, expression: str) -> list[Any]:
    """Return a query's current values without NaN."""
    series = prometheus.query(expression)
    return [each["value"][1] for each in series if each["value"][1] != "NaN"]
