"""Reading a page back: its elements, balanced, with their text."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

_WITHOUT_END = {"meta", "br", "link", "wbr"}


class Page(HTMLParser):
    """A parsed page. It asserts that every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self._may_break = False
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._may_break = tag == "wbr"
        if tag not in _WITHOUT_END:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if {"style", "script"} & set(self._open):
            return
        if self._may_break:  # Such a place is no space.
            self.words[-1] += data
        else:
            self.words.append(data)

    @property
    def shown(self) -> str:
        """All text of the page, spaces collapsed."""
        return " ".join(" ".join(self.words).split())

    def classes(self, name: str) -> list[dict[str, str | None]]:
        """The attributes of the elements of a class."""
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    def titles(self) -> list[str]:
        """The pictures' titles, as their captions begin."""
        return [word.rstrip(".") for word in self.words if word.startswith("Figure ")]
