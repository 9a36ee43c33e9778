"""What was measured over a link beside what the cost model predicts: as rows, lines and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from rc_agents.benchmarks import cost_model
from rc_agents.benchmarks.link_forms import Form, Pair, Profile


def rows(
    pair: Pair, form: Form, profile: Profile, wire: str, found: Any, prompt: int
) -> Iterator[dict[str, Any]]:
    """One row each of prefill and decode: measured on loopback and the link, and predicted."""
    for kind in ("prefill", "decode"):
        tokens = prompt if kind == "prefill" else 1
        times = {
            place: [one[0] for once in found[place, kind] for one in once]
            for place in ("loopback", "link")
        }
        middle = {place: statistics.median(values) for place, values in times.items()}
        by_round = [
            statistics.median(one[0] for one in far) - statistics.median(one[0] for one in near)
            for far, near in zip(found["link", kind], found["loopback", kind], strict=True)
        ]
        plan = form.plan(pair, middle["loopback"], kind, tokens, wire)
        port = cost_model.Port(up=profile.up, down=profile.down)
        predicted = cost_model.pass_seconds(plan, {"twin": port}, profile.latency)
        bare = cost_model.pass_seconds(plan)
        crossed = [one[1:] for once in found["link", kind] for one in once]
        traffic = cost_model.traffic(plan)
        yield {
            "pair": pair.name,
            "form": form.name,
            "profile": profile.name,
            "wire": wire,
            "kind": kind,
            "loopback_s": spread(times["loopback"]),
            "link_s": spread(times["link"]),
            "added_s": {**spread(by_round), "predicted": round(predicted - bare, 5)},
            "predicted_s": round(middle["loopback"] + predicted - bare, 5),
            "bytes": {
                "to_specialist": statistics.median(one[0] for one in crossed),
                "from_specialist": statistics.median(one[1] for one in crossed),
                "predicted_to": traffic["anchor", "twin"],
                "predicted_from": traffic["twin", "anchor"],
            },
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and count."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    named = {"median": middle, "low_quartile": low, "high_quartile": high}
    return {**{key: round(value, 5) for key, value in named.items()}, "count": len(values)}


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    return (
        f"{row['pair']:12} {row['form']:24} {row['profile']:4} {row['wire']:8} {row['kind']:7}"
        f" loopback {1e3 * row['loopback_s']['median']:7.1f} ms"
        f"  added {1e3 * row['added_s']['median']:7.1f} predicted {1e3 * row['added_s']['predicted']:7.1f}"
        f"  bytes to {row['bytes']['to_specialist']:.0f} from {row['bytes']['from_specialist']:.0f}"
    )


def table(rows: Sequence[dict[str, Any]], kind: str) -> str:
    """A record's rows of one kind of pass as a Markdown table, in milliseconds."""
    lines = [
        "| pair | form | link | wire | loopback (quartiles) | link (quartiles) | predicted | measured / predicted "
        "| bytes to / from specialist, counted | by the model |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["kind"] != kind:
            continue
        times = [
            "{:.0f} ({:.0f} to {:.0f})".format(
                *(1e3 * row[place][key] for key in ("median", "low_quartile", "high_quartile"))
            )
            for place in ("loopback_s", "link_s")
        ]
        size = row["bytes"]
        lines.append(
            f"| {row['pair']} | {row['form']} | {row['profile']} | {row['wire']} | {' | '.join(times)}"
            f" | {1e3 * row['predicted_s']:.0f} | {row['link_s']['median'] / row['predicted_s']:.2f}"
            f" | {size['to_specialist']:,.0f} / {size['from_specialist']:,.0f}"
            f" | {size['predicted_to']:,} / {size['predicted_from']:,} |"
        )
    return "\n".join(lines)
