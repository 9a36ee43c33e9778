"""`python -m rc_agents.cli` is `rc-agents`."""

from rc_agents.cli import main

main()
