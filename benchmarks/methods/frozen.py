"""The models as they are: the anchor, and each specialist asked directly."""

from rc_agents.benchmarks.methods.bench import Bench, Fitted, NotApplicable


def frozen_anchor(bench: Bench) -> Fitted:
    """The anchor by itself."""
    return Fitted(scorer=bench.anchor())


def specialist(bench: Bench) -> Fitted:
    """The first specialist by itself, in its own tokens."""
    return Fitted(scorer=bench.specialist())


def second_specialist(bench: Bench) -> Fitted:
    """The second specialist by itself."""
    return Fitted(scorer=bench.specialist(1))


def third_specialist(bench: Bench) -> Fitted:
    """The third specialist by itself."""
    return Fitted(scorer=bench.specialist(2))


def adapter_on_anchor(bench: Bench) -> Fitted:
    """The specialist's own adapter on the anchor; with a shared base this is the specialist itself."""
    if not bench.shares_base:
        raise NotApplicable("the specialist's adapter does not fit another base")
    return Fitted(
        scorer=bench.specialist(), notes={"same_as": "specialist: its adapter on the anchor is it"}
    )
