"""A page as a tree of elements, and what its tables and numbers say."""

import dataclasses
import re
from html.parser import HTMLParser


@dataclasses.dataclass
class Element:
    name: str
    attributes: dict
    children: list = dataclasses.field(default_factory=list)

    def all(self, name=None, **attributes):
        """This element and those below, of a name and with these attributes (`class_`: one of its classes)."""
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        mine = {**self.attributes, "class": wanted.get("class") if wanted.get("class") in self.classes else None}
        if name in (None, self.name) and all(mine.get(key) == value for key, value in wanted.items()):
            yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.all(name, **attributes)

    def one(self, name=None, **attributes):
        (element,) = self.all(name, **attributes)
        return element

    @property
    def classes(self):
        return self.attributes.get("class", "").split()

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def number(self, key):
        return float(self.attributes[key])


class Tree(HTMLParser):
    """Builds the page's tree, and fails where an element is not closed or closed twice."""

    def __init__(self, page):
        super().__init__()
        self.open = [Element("", {})]
        self.feed(page)
        self.close()
        assert [element.name for element in self.open] == [""], "never closed"

    def handle_starttag(self, name, attributes):
        assert len(attributes) == len(dict(attributes)), f"an attribute of {name} comes twice"
        element = Element(name, dict(attributes))
        self.open[-1].children.append(element)
        self.open.append(element)

    def handle_endtag(self, name):
        assert self.open[-1].name == name, f"</{name}> where {self.open[-1].name} is open"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def rows(tree, section, table=0):
    """A table's body, as text."""
    body = list(tree.one("section", id=section).all("tbody"))[table]
    return [[cell.text for cell in row.all("td")] for row in body.all("tr")]


PREFIXES = {"n": 1e-9, "µ": 1e-6, "m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


def read(text, unit):
    """The number that a text such as "25.9 GB" says."""
    said = re.fullmatch(rf"([\d.,]+) (.?){re.escape(unit)}", text)
    assert said, text
    return float(said[1].replace(",", "")) * PREFIXES[said[2]]
