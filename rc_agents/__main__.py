"""`python -m rc_agents` is `rc-agents`."""

from rc_agents.cli import main

if __name__ == "__main__":
    main()
