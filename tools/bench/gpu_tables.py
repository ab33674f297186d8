"""The tables of tools/bench/gpu.py, from the lines of its output."""

from __future__ import annotations

from typing import Any

from tools.bench.gpu_runs import OPTIONS
from tools.bench.step import show

Lines = dict[str, dict[str, Any]]


def print_tables(done: Lines) -> None:
    """What has been measured; a table without rows is left out."""
    device = done.get("device", {})
    print(", ".join(f"{name} {value}" for name, value in device.items() if name not in ("piece", "seconds")))
    tables: list[tuple[str, list[str], list[list[str]]]] = [
        ("a toy step against plain PyTorch in float32, same noise", ["family", "of", "error"], _errors(done)),
        (
            "training step; MFU of the matrix products a family needs",
            [
                *("size", "family", "precision", "micro-batches", "tokens/s", "ms"),
                *("of measured product", "of datasheet", "peak MiB", "against compiled"),
            ],
            _steps(done, device),
        ),
        (
            "a profiled step",
            ["step", "waits", "copies", "additions", "launches", "device ms", "profiled ms", "other"],
            _counts(done),
        ),
        ("ms of device time by part", ["part", *(name for name, _ in _profiles(done))], _parts(done)),
        (
            "FP8 against bf16: where its time goes; a step takes what the device is busy and idle",
            ["step", "of", "bf16", "fp8", "fp8 less bf16"],
            _fp8_against_bf16(done),
        ),
        ("compiled", ["size", "family", "tokens/s", "peak MiB", "compile s"], _compiled(done)),
        ("memory of the head's loss and gradient", ["size", "ours MiB", "full MiB", "ratio"], _heads(done)),
        ("sampling", ["family", "tokens/s", "batch", "steps"], _sampling(done)),
        ("what an option buys", ["option", "processes", "tokens/s without", "with", "ratio"], _options(done)),
        ("IsoFLOP points", ["FLOPs", "size", "family", "steps", "batch", "nats/token"], _isoflop(done)),
        (
            "19M, same noise: B less A, nats/token, 95% intervals",
            ["B less A", "held out", "interval", "training", "interval", "verdict"],
            _gates(done),
        ),
    ]
    for title, columns, rows in tables:
        if rows:
            show(title, columns, rows)
    _print_kernels(done)
    for name, line in done.items():
        if "error" in line:
            print(f"{name}: {line['error']}")


def _good(done: Lines, prefix: str) -> list[tuple[list[str], dict[str, Any]]]:
    """Words behind a prefix, and lines, of the pieces that ended well."""
    found = [(name, line) for name, line in done.items() if name.startswith(prefix) and "error" not in line]
    return [(name.removeprefix(prefix).split(), line) for name, line in found]


def _errors(done: Lines) -> list[list[str]]:
    return [
        [words[0], key, f"{value:.1e}"]
        for words, line in _good(done, "step errors ")
        for key, value in line.items()
        if isinstance(value, float) and key != "seconds"
    ]


def _steps(done: Lines, device: dict[str, Any]) -> list[list[str]]:
    rows = []
    for (size, family, precision, *more), line in _good(done, "ours "):
        plain = done.get(f"compiled {size} {family} bf16", {}).get("tokens_per_second")
        flops, speed = line["useful_flops_per_second"], line["tokens_per_second"]
        rows.append(
            [
                *(size, family, precision, f"{more[0].removeprefix('x')} of {line['micro_batch_size']}"),
                *(f"{speed:,.0f}", f"{line['step_ms']:,.0f}"),
                *(
                    _share(flops, device.get(key))
                    for key in ("matmul_flops_per_second", "datasheet_flops_per_second")
                ),
                f"{line['mib']:,.0f}",
                f"{speed / plain:.2f}x" if plain else "",
            ]
        )
    return rows


def _share(flops: float, peak: float | None) -> str:
    return f"{flops / peak:.1%}" if peak else "unknown"


def _profiles(done: Lines) -> list[tuple[str, dict[str, Any]]]:
    lines = [(" ".join(words[:3]), line.get("profile")) for words, line in _good(done, "ours ")]
    return [(name, profile) for name, profile in lines if isinstance(profile, dict)]


def _counts(done: Lines) -> list[list[str]]:
    return [
        [
            name,
            str(sum(profile["waits"].values())),
            *(str(profile["parts"].get(part, [0, 0])[1]) for part in ("copies", "additions")),
            str(profile["launches"]),
            *(f"{profile[key]:,.1f}" for key in ("device_ms", "profiled_ms")),
            f"{profile['other_above_3_percent']} kernels above 3%",
        ]
        for name, profile in _profiles(done)
    ]


def _parts(done: Lines) -> list[list[str]]:
    """Side by side, so that where FP8's time goes beside bf16's can be read: products, casts, amax."""
    profiles = _profiles(done)
    names = dict.fromkeys(part for _, profile in profiles for part in profile["parts"])

    def cell(profile: dict[str, Any], part: str) -> str:
        if part not in profile["parts"]:
            return ""
        ms, calls = profile["parts"][part]
        return f"{ms:,.1f} ({ms / profile['device_ms']:.0%}, {calls} calls)"

    return [[part, *(cell(profile, part) for _, profile in profiles)] for part in names]


def _fp8_against_bf16(done: Lines) -> list[list[str]]:
    rows = []
    for (size, family, precision, *more), fp8 in _good(done, "ours "):
        bf16 = done.get(" ".join(["ours", size, family, "bf16", *more]), {})
        if precision != "fp8" or not all(isinstance(line.get("profile"), dict) for line in (bf16, fp8)):
            continue
        sides = [_reckoning(line) for line in (bf16, fp8)]
        name, ratio = f"{size} {family}", fp8["tokens_per_second"] / bf16["tokens_per_second"]
        speeds = (f"{line['tokens_per_second']:,.0f}" for line in (bf16, fp8))
        rows.append([name, "tokens/s", *speeds, f"{ratio:.2f}x"])
        for key in dict.fromkeys([*sides[0], *sides[1]]):
            ours, theirs = (side.get(key, 0.0) for side in sides)
            rows.append([name, key, f"{ours:,.1f}", f"{theirs:,.1f}", f"{theirs - ours:+,.1f}"])
    return rows


def _reckoning(line: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each part and of what is none, and launches, of one step."""
    profile = line["profile"]
    parts = {f"ms of {part}": ms for part, (ms, _) in profile["parts"].items()}
    idle = line["step_ms"] - profile["device_ms"]
    return parts | {"ms idle": idle, "ms of a step": line["step_ms"], "launches": profile["launches"]}


def _print_kernels(done: Lines) -> None:
    for name, profile in _profiles(done):
        for title, rows in (("top kernels", profile["top"]), ("kernels without a part", profile["other"])):
            if rows:
                cells = [[f"{ms:,.2f}", str(calls), part, kernel] for kernel, part, ms, calls in rows]
                show(f"{title}: {name}", ["ms", "calls", "part", "kernel"], cells)


def _compiled(done: Lines) -> list[list[str]]:
    return [
        [*words[:2], f"{line['tokens_per_second']:,.0f}", f"{line['mib']:,.0f}", str(line["compile_seconds"])]
        for words, line in _good(done, "compiled ")
    ]


def _heads(done: Lines) -> list[list[str]]:
    return [
        [words[0], *(f"{line[key]:,.0f}" for key in ("ours_mib", "full_mib")), f"{line['ratio']:.3f}"]
        for words, line in _good(done, "head ")
    ]


def _sampling(done: Lines) -> list[list[str]]:
    return [
        [words[0], f"{line['tokens_per_second']:,.0f}", str(line["batch_size"]), str(line["steps"])]
        for words, line in _good(done, "sampling ")
    ]


def _options(done: Lines) -> list[list[str]]:
    rows = []
    for option in OPTIONS:
        with_it, without = (done.get(f"option {option.name}, {side}", {}) for side in ("with", "without"))
        if "tokens_per_second" in with_it and "tokens_per_second" in without:
            speeds = [side["tokens_per_second"] for side in (without, with_it)]
            cells = [*(f"{speed:,.0f}" for speed in speeds), f"{speeds[1] / speeds[0]:.2f}x"]
            rows.append([option.name, str(option.processes), *cells])
    return rows


def _isoflop(done: Lines) -> list[list[str]]:
    return [
        [*words, str(line["steps"]), str(line["batch_size"]), f"{line['nats_per_token']:.4f}"]
        for words, line in _good(done, "isoflop ")
    ]


def _gates(done: Lines) -> list[list[str]]:
    rows = []
    for name, line in done.items():
        if name.startswith("gate: ") and "passed" in line:
            cells = [name.removeprefix("gate: ")]
            for mean in (line["difference"], line["training"]["difference"]):
                cells += [f"{mean['nats_per_token']:+.6f}", _interval(mean)]
            rows.append([*cells, f"{'within' if line['passed'] else 'not within'} {line['tolerance']}"])
    return rows


def _interval(mean: dict[str, Any]) -> str:
    return "none" if mean["low"] is None else f"{mean['low']:+.6f} to {mean['high']:+.6f}"
