"""What benchmarks/training.py found, as Markdown."""

from typing import Any


def tables(found: dict[str, Any]) -> str:
    """All that was found, as Markdown."""
    m = found["machine"]
    lines = [
        f"`{found['command']}`",
        "",
        f"{m['gpu'] or m['processor']}, {m['cores']} cores, load before {m['load_before']}, torch "
        f"{m['torch']}, precision {found['precision']}, {m['date']}.",
        "",
        "Images a second; ours as a multiple of each: median of the rounds (lowest to highest).",
        "",
        "| pixels, batch | program | images/s | ours is | peak MiB |" + mfu_head(found),
        "|---|---|---|---|---|" + ("---|" if mfu_head(found) else ""),
    ]
    for result in found["sizes"].values():
        model = result["model"]
        for name, rate in result["images_per_s"].items():
            ratio = result["ratios"].get(name)
            multiple = f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else ""
            mfu = f" {result['mfu'][name]:.1%} |" if "mfu" in result else ""
            lines.append(
                f"| {model['resolution']}, {model['batch_size']} | {name} | {rate:.1f} | "
                f"{multiple} | {result['peak_memory_mib'][name]:,} |{mfu}"
            )
    lines += ["", "Share of a step by part:", ""]
    parts = ["data", "forward", "backward", "clip", "optimizer", "EMA", "other"]
    lines += [f"| pixels | program | {' | '.join(parts)} |", "|---" * (len(parts) + 2) + "|"]
    for result in found["sizes"].values():
        for name, shares in result["shares"].items():
            cells = " | ".join(f"{shares.get(part, 0.0):.3f}" for part in parts)
            lines.append(f"| {result['model']['resolution']} | {name} | {cells} |")
    lines += ["", "Chores, which the speeds above leave out (seconds each, how often seen):", ""]
    lines += ["| pixels | program | preview | checkpoint | export |", "|---|---|---|---|---|"]
    for result in found["sizes"].values():
        for name, chores in result["chores"].items():
            cells = [
                f"{chores[c][1]:.2f} ({chores[c][0]})" if c in chores else "not seen"
                for c in ("preview", "checkpoint", "export")
            ]
            if name != "bare":
                lines.append(f"| {result['model']['resolution']} | {name} | {' | '.join(cells)} |")
    for result in found["sizes"].values():
        starts = result["seconds_to_first_step"].items()
        told = [f"{name} {mid:.1f} ({low:.1f} to {high:.1f})" for name, (mid, low, high) in starts]
        if told:
            lines += [
                "",
                f"Seconds from the command to the end of the first step, at "
                f"{result['model']['resolution']} pixels: {', '.join(told)}.",
            ]
    return "\n".join(lines) + "\n"


def mfu_head(found: dict[str, Any]) -> str:
    return " MFU |" if any("mfu" in result for result in found["sizes"].values()) else ""
