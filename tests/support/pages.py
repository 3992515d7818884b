"""A page of HTML, taken apart: what is in it, and what is wrong with its form."""

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input"}
LEADING_AWAY = {"src", "href", "xlink:href", "srcset", "action", "formaction", "data", "poster", "background", "style"}


class Page(HTMLParser):
    """The elements of a page in their order, with the text in each.

    Attributes:
        elements: (name, attributes, text) of each element, with the text of those inside it.
        faults: what is not well formed.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.faults: list[str] = []
        self._open: list[int] = []
        self.feed(html)
        self.close()
        self.faults += [f"<{self.elements[i][0]}> is not closed" for i in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if len({name for name, _ in attrs}) != len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice: {attrs}")
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self.elements[self._open[-1]][0] != tag:
            self.faults.append(f"</{tag}> closes nothing")
        else:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        for i in self._open:
            self.elements[i][2].append(data)

    def names(self) -> list[str]:
        """The names of the elements, in their order."""
        return [name for name, _, _ in self.elements]

    def texts(self, name: str, **attributes: str) -> list[str]:
        """The text of each element of this name, with these attributes if any; `class_` is class."""
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return ["".join(t) for n, a, t in self.elements if n == name and wanted.items() <= a.items()]

    def attributes(self, name: str, class_: str) -> list[dict[str, str | None]]:
        """The attributes of each element of this name and class."""
        return [a for n, a, _ in self.elements if n == name and a.get("class") == class_]
