"""Whatever is said, the page says it, and nothing of it is markup."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megadit.page.markup import quantity, tag
from tests.page.tree import Tree, read


@settings(deadline=None)
@given(st.floats(1e-8, 9e17))
def test_quantities_say_the_number(value):
    assert read(quantity(value, "s"), "s") == pytest.approx(value, rel=0.00501)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])), st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_whatever_the_text_the_markup_holds(content, attribute):
    element = Tree(tag("p", content, class_=attribute)).open[0].one("p")
    assert (element.text, element.attributes) == (content, {"class": attribute})
