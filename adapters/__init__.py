"""Doors to other frameworks, over the public API of rc_agents: one small file each."""

if not __name__.startswith("rc_agents."):
    raise ImportError(
        "adapters/ installs as rc_agents.adapters: run 'pip install -e .' and import that"
    )
