"""Methods, tasks and suites that measure a coupled model against its baselines."""

if not __name__.startswith("rc_agents."):
    raise ImportError(
        "benchmarks/ installs as rc_agents.benchmarks: run 'pip install -e .' and import that"
    )
