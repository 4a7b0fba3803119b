"""The results of training.py as Markdown."""

from typing import Any


def to_markdown(results: dict[str, Any]) -> str:
    """Return tables of speed, of the parts of a step, and of periodic work; and start-up."""
    machine = results["machine"]
    lines = [
        f"`{results['command']}`",
        "",
        f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores, load before "
        f"{machine['load_before']}, torch {machine['torch']}, precision {results['precision']}, "
        f"{machine['date']}.",
        "",
        "Images a second; ours as a multiple of each: median of the rounds (lowest to highest).",
        "",
        "| pixels, batch | program | images/s | ours is | peak MiB |" + mfu_head(results),
        "|---|---|---|---|---|" + ("---|" if mfu_head(results) else ""),
    ]
    for result in results["sizes"].values():
        model = result["model"]
        for name, rate in result["images_per_s"].items():
            ratio = result["ratios"].get(name)
            multiple = f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else ""
            mfu = f" {result['mfu'][name]:.1%} |" if "mfu" in result else ""
            lines.append(
                f"| {model['resolution']}, {model['batch_size']} | {name} | {rate:.1f} | "
                f"{multiple} | {result['peak_memory_mib'][name]:,} |{mfu}"
            )
    lines += ["", "Fraction of a step by part:", ""]
    parts = ["data", "forward", "backward", "clip", "optimizer", "EMA", "other"]
    lines += [f"| pixels | program | {' | '.join(parts)} |", "|---" * (len(parts) + 2) + "|"]
    for result in results["sizes"].values():
        for name, fractions in result["fractions"].items():
            cells = " | ".join(f"{fractions.get(part, 0.0):.3f}" for part in parts)
            lines.append(f"| {result['model']['resolution']} | {name} | {cells} |")
    lines += ["", "Periodic work, which the speeds above leave out (seconds each, how often):", ""]
    lines += ["| pixels | program | preview | checkpoint | export |", "|---|---|---|---|---|"]
    for result in results["sizes"].values():
        for name, periodic in result["periodic"].items():
            cells = [
                f"{periodic[kind][1]:.2f} ({periodic[kind][0]})" if kind in periodic else "not seen"
                for kind in ("preview", "checkpoint", "export")
            ]
            if name != "bare":
                lines.append(f"| {result['model']['resolution']} | {name} | {' | '.join(cells)} |")
    for result in results["sizes"].values():
        starts = result["seconds_to_first_step"].items()
        times = [f"{name} {mid:.1f} ({low:.1f} to {high:.1f})" for name, (mid, low, high) in starts]
        if times:
            lines += [
                "",
                f"Seconds from the command to the end of the first step, at "
                f"{result['model']['resolution']} pixels: {', '.join(times)}.",
            ]
    return "\n".join(lines) + "\n"


def mfu_head(results: dict[str, Any]) -> str:
    return " MFU |" if any("mfu" in result for result in results["sizes"].values()) else ""
