"""Check of a cluster file before it costs anything: reads it as `ray up` does, and starts nothing.

    python jobs/check_cluster.py cluster.yaml
    python jobs/check_cluster.py jobs/cluster-gcp.yaml

Exit code: 0 if Ray accepts the file, 2 with Ray's reason if not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config


def main() -> int:
    """Print each type of node, how many there may be, and its resources; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="File for `ray up`.")
    file: Path = parser.parse_args().file
    try:
        config = prepare_config(yaml.safe_load(file.read_text(encoding="utf-8")))
        validate_config(config)
    except Exception as err:  # noqa: BLE001 - Ray's validation has no class of errors of its own
        reason = next(iter(str(err).splitlines()), type(err).__name__)
        print(f"{file}: {reason.rstrip('.')}; correct the file", file=sys.stderr)
        return 2
    for name, kind in config["available_node_types"].items():
        number = "head" if name == config["head_node_type"] else f"at most {kind['max_workers']}"
        print(f"{name:14} {number:11} {kind['resources']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
