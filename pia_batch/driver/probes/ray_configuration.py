"""Configuration probe: imports Ray's compiled part, which reads the variables of its configuration, and prints null.

A process of its own runs it, because Ray ends a process by a signal where such a variable has a value of another type.
"""

import json

import ray._raylet  # noqa: F401 - for what it does at import

if __name__ == "__main__":
    print(json.dumps(None))  # noqa: T201 - its output
