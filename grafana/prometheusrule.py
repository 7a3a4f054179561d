"""Prints the rules as a PrometheusRule, for the Prometheus Operator on Kubernetes.

python grafana/prometheusrule.py > configs/kubernetes/monitoring/prometheusrule.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

RULES = Path(__file__).parent / "rules"
HEAD = """\
# Written by grafana/prometheusrule.py from grafana/rules: change those.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: sseproxy
spec:
  groups:
"""


def lines() -> Iterator[str]:
    """The manifest. The lines of the rules are what they are, further to the right."""
    yield from HEAD.splitlines()
    for name in ("alerts", "recording"):
        _, _, groups = (RULES / f"{name}.yaml").read_text().partition("\ngroups:\n")
        yield from (f"  {line}" if line else "" for line in groups.splitlines())


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in lines())
