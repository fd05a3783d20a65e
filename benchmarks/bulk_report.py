"""What benchmarks/bulk.py measured, as Markdown."""

from statistics import median
from typing import Any


def report(kept: dict[str, Any]) -> str:
    """A table for each part that was run."""
    parts = {"kills": kills, "memory": memory, "rates": rates, "ray": ray}
    return (
        "\n\n".join(["# Bulk runs", *(parts[name](kept[name]) for name in parts if name in kept)])
        + "\n"
    )


def kills(found: dict[str, Any]) -> str:
    return table(
        "## Killed",
        found,
        {
            "images": found["images"],
            "SIGKILLs of the parent": found["parents_killed"],
            "SIGKILLs of a worker": found["workers_killed"],
            "done before the last start": found["done_before_the_last_start"],
            "done by the last start": found["written_by_the_last_start"],
            "failed": found["failed"],
            "lines of the manifest, keys in it": f"{found['lines']}, {found['keys']}",
            "all files as in an undisturbed run": "yes" if found["files_identical"] else "NO",
        },
    )


def memory(found: dict[str, Any]) -> str:
    return table(
        "## Memory",
        found,
        {
            "images, long side": f"{found['images']}, {found['size']}",
            "parent with the model, before": f"{found['parent_with_model_before_mib']} MiB",
            "all processes, mean from 10 to 30%": mib(found, "mean_mib_from_10_to_30_percent"),
            "all processes, mean from 80%": mib(found, "mean_mib_from_80_percent"),
            "all processes, peak": mib(found, "peak_mib"),
        },
    )


def mib(found: dict[str, Any], name: str) -> str:
    return f"{found[name]:.0f} MiB"


def rates(found: dict[str, Any]) -> str:
    rows = {}
    for stage in ("read", "model", "refine", "write"):
        rows[f"{stage}, alone"] = both(found, lambda one, stage=stage: one["alone_seconds"][stage])
    rows["slower side"] = " | ".join(found[name]["slower_side"] for name in ("crf", "plain"))
    rows["slower side, alone"] = both(found, lambda one: one["slower_side_alone"])
    rows["slower side, the other's work beside"] = both(
        found, lambda one: one["slower_side_beside"]
    )
    rows["whole"] = both(found, lambda one: one["whole_without_others"])
    rows["slower side alone / whole"] = share(found, "share_of_slower_side")
    rows["slower side beside the other's work / whole"] = share(
        found, "share_of_slower_side_beside"
    )
    rows["share of the whole in which the busier side was at work"] = " | ".join(
        spread([busy(run) for run in found[one]["runs"]]) for one in ("crf", "plain")
    )
    head = (
        f"| {found['images']} images, long side {found['size']}, medians of {found['rounds']} "
        "rounds | dense CRF, maps | plain |"
    )
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["## Rates", "", told(found), "", head, "|---|---|---|", *lines])


def ray(found: dict[str, Any]) -> str:
    rows = {
        "wall": "seconds, begin and end included",
        "cpu": "CPU seconds, begin and end included",
        "wall_per_image_running": "an image, once a tenth is done",
        "cpu_per_image_running": "CPU time an image, once a tenth is done",
    }
    lines = []
    for name, words in rows.items():
        unit, scale = ("ms", 1000) if "image" in name else ("s", 1)
        cells = [f"{scale * found[engine][name]:.1f} {unit}" for engine in ("local", "ray")]
        each = [
            other[name] / own[name] - 1
            for own, other in zip(found["runs"]["local"], found["runs"]["ray"], strict=True)
        ]
        more = f"{100 * found['ray_costs_more'][name]:+.0f}%"
        spread = f"({100 * min(each):+.0f} to {100 * max(each):+.0f})"
        lines.append(f"| {words} | {' | '.join(cells)} | {more} {spread} |")
    head = f"| {found['images']} images, {found['repeats']} runs each, long side {found['size']} "
    same = "as the local engine's" if found["files_identical"] else "NOT as the local engine's"
    return "\n".join(
        [
            *("## Ray on one machine", "", told(found), f"Ray's files are {same}.", ""),
            *(f"{head}| local | Ray | Ray costs more |", "|---|---|---|---|", *lines),
        ]
    )


def both(found: dict[str, Any], value: Any) -> str:
    return " | ".join(f"{1000 * value(found[name]):.1f} ms" for name in ("crf", "plain"))


def share(found: dict[str, Any], name: str) -> str:
    return " | ".join(spread(found[one]["shares_by_round"][name]) for one in ("crf", "plain"))


def busy(run: dict[str, Any]) -> float:
    """How much of the time an image takes the busier of both sides was at work."""
    ran: float = max(side["ran"] for side in run["busiest_thread"].values())
    return ran / run["without_others"]


def spread(each: list[float]) -> str:
    return f"{100 * median(each):.0f}% ({100 * min(each):.0f} to {100 * max(each):.0f})"


def told(found: dict[str, Any]) -> str:
    machine = found["machine"]
    return f"`{found['command']}`, {machine['cores']} cores of {machine['cpu']}."


def table(title: str, found: dict[str, Any], rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([title, "", told(found), "", "| | |", "|---|---|", *lines])
