"""HTML page that plays back how a sampler fills in a text, as one file that needs no network access."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PAGE, PLACE = "trace_page.html", "__TRACE__"
LARGEST_CHANGES = 5_000_000
"""Most token changes, over all samples and steps, that a page can hold; this many make about 60 MB."""


class Trace:
    """Collects the states of one batch; pass `keep` to the sampler."""

    def __init__(self, start_BL: Tensor, given_BL: Tensor) -> None:
        """Start from the tokens before the first step.

        Args:
            start_BL: int64 [B, L] tokens before the first step.
            given_BL: bool [B, L], True where a token is given.
        """
        self._last = start_BL.clone()
        self._given = given_BL
        self._start = start_BL.tolist()
        self._steps: list[list[list[tuple[int, int]]]] = [[] for _ in self._start]
        self._changes = 0

    def keep(self, step: int, ids_BL: Tensor) -> None:
        """Record the tokens that changed since the last step.

        Args:
            step: step of the sampler.
            ids_BL: int64 [B, L] tokens after the step.

        Raises:
            ValueError: more changes than a page can hold.
        """
        ids_BL = ids_BL.cpu()
        changed_BL = ids_BL != self._last
        self._changes += int(changed_BL.sum())
        if self._changes > LARGEST_CHANGES:
            raise ValueError(
                f"trace: more than {LARGEST_CHANGES:,} changes of tokens; trace fewer samples or steps"
            )
        for row, steps in enumerate(self._steps):
            places = changed_BL[row].nonzero()[:, 0]
            steps.append(list(zip(places.tolist(), ids_BL[row, places].tolist(), strict=True)))
        self._last = ids_BL.clone()

    def write(
        self,
        path: Path,
        *,
        title: str,
        facts: str,
        mask_token_id: int,
        names: Sequence[str],
        string_of: Callable[[int], str],
    ) -> None:
        """Write the page.

        Args:
            path: HTML file to write.
            title: heading of the page.
            facts: line of text under the heading.
            mask_token_id: id of the mask token, shown as a grey block.
            names: name of each sample.
            string_of: function from a token id to its text.
        """
        samples: list[dict[str, Any]] = [
            {
                "name": name,
                "given": torch.nonzero(self._given[row])[:, 0].tolist(),
                "start": self._start[row],
                "steps": self._steps[row],
            }
            for row, name in enumerate(names)
        ]
        used = {token for start in self._start for token in start}
        used |= {token for steps in self._steps for changes in steps for _, token in changes}
        data = {
            "title": title,
            "facts": facts,
            "mask": mask_token_id,
            "strings": {token: string_of(token) for token in sorted(used)},
            "samples": samples,
        }
        page = resources.files("megatron_dlm.evaluation").joinpath(PAGE).read_text(encoding="utf-8")
        # Inside <script> only "</" and "<!--" would end the data early.
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        page = page.replace("<title>Denoising, step by step</title>", f"<title>{html.escape(title)}</title>")
        path.write_text(page.replace(PLACE, text), encoding="utf-8")
