"""Names the packages; everything else about the distribution is in pyproject.toml.

The top-level folders ``adapters`` and ``benchmarks`` install as ``rc_agents.adapters`` and
``rc_agents.benchmarks``. Finding packages under a second prefix is more than the pyproject table
can say, and a list written by hand would miss the next folder.
"""

from setuptools import find_packages, setup

MOVED = ("adapters", "benchmarks")

setup(
    packages=[
        *find_packages(include=["rc_agents", "rc_agents.*"]),
        *(
            f"rc_agents.{name}"
            for top in MOVED
            for name in find_packages(include=[top, f"{top}.*"])
        ),
    ],
    package_dir={f"rc_agents.{top}": top for top in MOVED},
)
