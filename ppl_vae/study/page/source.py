"""What the sections are made of: the numbers, the figures, the pictures and the words about them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ppl_vae.reports.page import Block, Picture, Text
from ppl_vae.study.answers import Answer
from ppl_vae.study.figures import Drawn

Study = Mapping[str, Any]
Row = Mapping[str, Any]


class Source(NamedTuple):
    """What the sections are made of."""

    study: Study
    folder: Path
    drawn: Mapping[str, Drawn]
    answers: Mapping[str, Answer]

    def long(self, *keys: str) -> list[Block]:
        """What the answers say at length."""
        found = [self.answers[key] for key in keys if key in self.answers]
        return [Text("\n\n".join([answer.short, *answer.long])) for answer in found]

    def figure(self, name: str, caption: str, alt: str) -> list[Block]:
        """A figure, where there is one."""
        if name not in self.drawn:
            return []
        light, dark = self.drawn[name]
        return [Picture(light, caption, alt, dark_png=dark)]

    def parts(self, section: str) -> dict[str, Any]:
        """A section of study.json by data set."""
        of_section = self.study.get(section) or {}
        return {word: of_section[word] for word in self.study["datasets"] if of_section.get(word)}

    def picture(self, path: str | None) -> bytes | None:
        """The bytes of a picture file of the study."""
        where = None if path is None else self.folder / path
        return where.read_bytes() if where is not None and where.is_file() else None

    def picture_of(self, run: str | None, name: str) -> bytes | None:
        """A run's picture by its name."""
        record = self.study["runs"].get(run) or {}
        return self.picture((record.get("pictures") or {}).get(name))

    def originals(self, dataset: str) -> bytes | None:
        """The test images that are shown of a data set."""
        return self.picture(((self.study.get("data") or {}).get(dataset) or {}).get("originals"))
