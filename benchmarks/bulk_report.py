"""Results of benchmarks/bulk.py as Markdown."""

from statistics import median
from typing import Any


def report(report_parts: dict[str, Any]) -> str:
    """Return a table for each part that was run."""
    parts = {"kills": kills, "memory": memory, "rates": rates, "ray": ray}
    return (
        "\n\n".join(
            [
                "# Bulk runs",
                *(parts[name](report_parts[name]) for name in parts if name in report_parts),
            ]
        )
        + "\n"
    )


def kills(results: dict[str, Any]) -> str:
    return table(
        "## Killed",
        results,
        {
            "images": results["images"],
            "SIGKILLs of the parent": results["parents_killed"],
            "SIGKILLs of a worker": results["workers_killed"],
            "done before the last start": results["done_before_the_last_start"],
            "done by the last start": results["written_by_the_last_start"],
            "failed": results["failed"],
            "lines of the manifest, keys in it": f"{results['lines']}, {results['keys']}",
            "all files as in an undisturbed run": "yes" if results["files_identical"] else "NO",
        },
    )


def memory(results: dict[str, Any]) -> str:
    return table(
        "## Memory",
        results,
        {
            "images, long side": f"{results['images']}, {results['size']}",
            "parent with the model, before": f"{results['parent_with_model_before_mib']} MiB",
            "all processes, mean from 10 to 30%": mib(results, "mean_mib_from_10_to_30_percent"),
            "all processes, mean from 80%": mib(results, "mean_mib_from_80_percent"),
            "all processes, peak": mib(results, "peak_mib"),
        },
    )


def mib(results: dict[str, Any], name: str) -> str:
    return f"{results[name]:.0f} MiB"


def rates(results: dict[str, Any]) -> str:
    rows = {}
    for stage in ("read", "model", "refine", "write"):
        rows[f"{stage}, alone"] = both(
            results, lambda rate, stage=stage: rate["alone_seconds"][stage]
        )
    rows["slower side"] = " | ".join(results[name]["slower_side"] for name in ("crf", "plain"))
    rows["slower side, alone"] = both(results, lambda rate: rate["slower_side_alone"])
    rows["slower side, the other's work beside"] = both(
        results, lambda rate: rate["slower_side_beside"]
    )
    rows["whole"] = both(results, lambda rate: rate["whole_without_others"])
    rows["slower side alone / whole"] = share(results, "share_of_slower_side")
    rows["slower side beside the other's work / whole"] = share(
        results, "share_of_slower_side_beside"
    )
    rows["share of the whole in which the busier side was at work"] = " | ".join(
        spread([busy(run) for run in results[setting]["runs"]]) for setting in ("crf", "plain")
    )
    head = (
        f"| {results['images']} images, long side {results['size']}, medians of "
        f"{results['rounds']} rounds | dense CRF, maps | plain |"
    )
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["## Rates", "", provenance(results), "", head, "|---|---|---|", *lines])


def ray(results: dict[str, Any]) -> str:
    rows = {
        "wall": "seconds, begin and end included",
        "cpu": "CPU seconds, begin and end included",
        "wall_per_image_running": "an image, once a tenth is done",
        "cpu_per_image_running": "CPU time an image, once a tenth is done",
    }
    lines = []
    for name, words in rows.items():
        unit, scale = ("ms", 1000) if "image" in name else ("s", 1)
        cells = [f"{scale * results[engine][name]:.1f} {unit}" for engine in ("local", "ray")]
        each = [
            ray_run[name] / local_run[name] - 1
            for local_run, ray_run in zip(
                results["runs"]["local"], results["runs"]["ray"], strict=True
            )
        ]
        more = f"{100 * results['ray_costs_more'][name]:+.0f}%"
        spread = f"({100 * min(each):+.0f} to {100 * max(each):+.0f})"
        lines.append(f"| {words} | {' | '.join(cells)} | {more} {spread} |")
    runs = f"{results['images']} images, {results['repeats']} runs each"
    head = f"| {runs}, long side {results['size']} "
    same = "as the local engine's" if results["files_identical"] else "NOT as the local engine's"
    return "\n".join(
        [
            *("## Ray on one machine", "", provenance(results), f"Ray's files are {same}.", ""),
            *(f"{head}| local | Ray | Ray costs more |", "|---|---|---|---|", *lines),
        ]
    )


def both(results: dict[str, Any], value: Any) -> str:
    return " | ".join(f"{1000 * value(results[name]):.1f} ms" for name in ("crf", "plain"))


def share(results: dict[str, Any], name: str) -> str:
    return " | ".join(
        spread(results[setting]["shares_by_round"][name]) for setting in ("crf", "plain")
    )


def busy(run: dict[str, Any]) -> float:
    """Return the share of the time per image in which the busier side worked."""
    ran: float = max(side["ran"] for side in run["busiest_thread"].values())
    return ran / run["without_others"]


def spread(each: list[float]) -> str:
    return f"{100 * median(each):.0f}% ({100 * min(each):.0f} to {100 * max(each):.0f})"


def provenance(results: dict[str, Any]) -> str:
    machine = results["machine"]
    return f"`{results['command']}`, {machine['cores']} cores of {machine['cpu']}."


def table(title: str, results: dict[str, Any], rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([title, "", provenance(results), "", "| | |", "|---|---|", *lines])
